"""examples/guide.py runs with ia3 and with peft, and both train alike."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from ia3 import PeftModelForSeq2SeqLM
from ia3.bundled import resolve_model

GUIDE = Path(__file__).parents[1] / "examples" / "guide.py"
LABELS = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def guide():
    spec = importlib.util.spec_from_file_location("guide", GUIDE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(tmp_path):
    """A folder with a tiny T5 without dropout and a tokenizer, and a CSV of 120 labelled lines."""
    words = ["<pad>", "</s>", "<unk>", *LABELS, *(f"w{i}" for i in range(40))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    model.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(words),
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    folder = tmp_path / "model"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    lines = ["text,label"]
    for i in range(120):
        text = " ".join(f"w{n}" for n in torch.randint(40, (6,), generator=generator).tolist())
        lines.append(f"{text},{LABELS[i % 3]}")
    data = tmp_path / "data.csv"
    data.write_text("\n".join(lines) + "\n")
    return folder, data


def run(guide, library, output, *arguments):
    losses = output / f"{library}.json"
    guide.main(["--library", library, "--output", str(output / library), "--losses", str(losses), *arguments])
    return json.loads(losses.read_text())


def test_float64_losses_over_100_steps(guide, tiny, tmp_path):
    folder, data = tiny
    arguments = ["--model", str(folder), "--data", str(data), "--dtype", "float64", "--max-length", "12"]
    arguments += ["--epochs", "8", "--steps", "100"]
    ours, theirs = (run(guide, library, tmp_path, *arguments) for library in ("ia3", "peft"))
    assert len(ours["train_losses"]) == 100
    differences = [abs(a - b) for a, b in zip(ours["train_losses"], theirs["train_losses"], strict=True)]
    assert max(differences) < 1e-8
    assert ours["train_losses"][-1] < ours["train_losses"][0]
    assert ours["predictions"] == theirs["predictions"]
    assert ours["word"] == theirs["word"]


def test_the_real_model_over_20_steps_without_dropout(guide, tmp_path):
    """With dropout the two draw other masks."""
    folder = shutil.copytree(resolve_model("bundled:flan-t5-small-titler"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0}))
    arguments = ["--model", str(folder), "--limit", "180", "--padding", "longest", "--steps", "20"]
    ours, theirs = (run(guide, library, tmp_path, *arguments) for library in ("ia3", "peft"))
    assert len(ours["train_losses"]) == 20
    differences = [abs(a - b) for a, b in zip(ours["train_losses"], theirs["train_losses"], strict=True)]
    assert max(differences) < 1e-5
    assert ours["predictions"] == theirs["predictions"]
    assert ours["word"] == theirs["word"]


def test_the_saved_adapter_loads_in_peft(guide, tiny, tmp_path):
    import peft

    folder, data = tiny
    run(guide, "ia3", tmp_path, "--model", str(folder), "--data", str(data), "--max-length", "12", "--epochs", "1")
    theirs = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "ia3").eval()
    ours = PeftModelForSeq2SeqLM.from_pretrained(T5ForConditionalGeneration.from_pretrained(folder), tmp_path / "ia3")
    ids = torch.tensor([[6, 7, 8, 1]])
    labels = torch.tensor([[3, 1]])
    assert torch.equal(ours(input_ids=ids, labels=labels).logits, theirs(input_ids=ids, labels=labels).logits)
