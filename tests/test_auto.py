"""AutoPeftModel…: an adapter together with the base that it names."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

import ia3
from builders import randomise, seq2seq_batch
from ia3 import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    IA3Config,
    get_peft_model,
)
from ia3.inference.loading import load_adapter

CLASSES = {
    "SEQ_2_SEQ_LM": (AutoPeftModelForSeq2SeqLM, "t5"),
    "CAUSAL_LM": (AutoPeftModelForCausalLM, "llama"),
    "SEQ_CLS": (AutoPeftModelForSequenceClassification, "bert"),
    "TOKEN_CLS": (AutoPeftModelForTokenClassification, "bert"),
    "QUESTION_ANS": (AutoPeftModelForQuestionAnswering, "bert"),
    "FEATURE_EXTRACTION": (AutoPeftModelForFeatureExtraction, "bert"),
}


def saved(base, folder, **config):
    """The base and an adapter of it on disk; the adapted model."""
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = get_peft_model(base, IA3Config(**config))
    randomise(model)
    model.save_pretrained(folder / "adapter")
    return model


def edit(folder, **changes):
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("task", CLASSES)
def test_every_task(task, tiny, output, tmp_path):
    auto, family = CLASSES[task]
    model = saved(tiny(family, task=task), tmp_path, task_type=task)
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is type(model)
    assert torch.equal(output(loaded), output(model))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_trainable_and_named(tiny, tmp_path):
    saved(tiny("t5"), tmp_path, task_type="SEQ_2_SEQ_LM")
    model = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter", adapter_name="mine", is_trainable=True)
    assert model.active_adapter == "mine"
    model(**seq2seq_batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_arguments_of_the_base_pass_through(tiny, tmp_path):
    saved(tiny("t5"), tmp_path, task_type="SEQ_2_SEQ_LM")
    model = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert model.shared.weight.dtype == torch.bfloat16
    assert model.encoder.block[0].layer[0].SelfAttention.k.ia3_l.default.dtype == torch.float32


def test_the_bases_revision_is_asked_for(tiny, tmp_path, monkeypatch):
    saved(tiny("t5"), tmp_path, task_type="SEQ_2_SEQ_LM", revision="abc")
    seen = []
    load = T5ForConditionalGeneration.from_pretrained

    def from_pretrained(name, *, revision, **arguments):
        seen.append(revision)
        return load(name, **arguments)

    monkeypatch.setattr("transformers.AutoModelForSeq2SeqLM.from_pretrained", from_pretrained)
    AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter", revision="of the adapter")
    assert seen == ["abc"]


def test_an_adapter_in_a_folder_of_its_name(tiny, output, tmp_path):
    base = tiny("t5")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, IA3Config(task_type="SEQ_2_SEQ_LM"), adapter_name="mine")
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter", subfolder="mine")
    assert torch.equal(output(loaded), output(model))


def test_the_wrong_class_names_the_right_one(tiny, tmp_path):
    saved(tiny("t5"), tmp_path, task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match="use AutoPeftModelForSeq2SeqLM"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="use AutoPeftModelForSeq2SeqLM"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_an_adapter_without_a_task_loads_with_any_class(tiny, output, tmp_path):
    model = saved(tiny("t5"), tmp_path)
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded), output(model))


def test_no_base_named(tiny, tmp_path):
    saved(tiny("t5"), tmp_path, task_type="SEQ_2_SEQ_LM")
    edit(tmp_path, base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"names no base model.*PeftModel\.from_pretrained"):
        AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("base", ["not/there", "empty"])
def test_a_base_that_cannot_be_loaded_is_said_with_the_adapter_that_names_it(tiny, tmp_path, monkeypatch, base):
    saved(tiny("t5"), tmp_path, task_type="SEQ_2_SEQ_LM")
    edit(tmp_path, base_model_name_or_path=base)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((OSError, ValueError)) as caught:
        AutoPeftModelForSeq2SeqLM.from_pretrained("adapter")
    assert str(caught.value).startswith(f"adapter names the base model '{base}': ")
    with pytest.raises(FileNotFoundError, match=f"^adapter names the base model '{base}': The tokenizer"):
        load_adapter("adapter")


def test_no_such_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a directory nor"):
        AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "nothing" / "here" / "at all")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path)


def test_without_a_task_the_configuration_names_the_class(tiny, output, tmp_path):
    model = saved(tiny("t5"), tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["auto_mapping"] == {
        "base_model_class": "T5ForConditionalGeneration",
        "parent_library": "transformers.models.t5.modeling_t5",
    }
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, T5ForConditionalGeneration)
    assert torch.equal(output(loaded), output(model))


def test_only_trusted_packages_are_imported(tiny, output, tmp_path):
    model = saved(tiny("t5"), tmp_path)
    mapping = {"base_model_class": "T5ForConditionalGeneration", "parent_library": "builders"}
    edit(tmp_path, auto_mapping=mapping)
    with pytest.raises(ValueError, match=r"wants to import 'builders'.*import_allowlist=\['builders'\]"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["builders"])
    assert torch.equal(output(loaded), output(model))
    edit(tmp_path, auto_mapping=None)
    with pytest.raises(ValueError, match="neither a task nor the base model's class"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_a_tokenizer_with_more_tokens_makes_room(tiny, tmp_path):
    base = tiny("t5")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = get_peft_model(base, IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.save_pretrained(tmp_path / "adapter")  # the vocabulary was resized: the embeddings go with it
    words = {f"w{i}": i for i in range(70)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert loaded.shared.weight.shape[0] == 70
    assert torch.equal(loaded.shared.weight, model.shared.weight)
    batch = seq2seq_batch()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_it_is_not_made_by_calling_it():
    with pytest.raises(OSError, match="use from_pretrained"):
        AutoPeftModelForSeq2SeqLM()


def test_the_bundled_model_is_found_by_its_name(tmp_path):
    pytest.importorskip("traceforge_title_model")
    from transformers import AutoModelForSeq2SeqLM

    from ia3.bundled import TITLER, load_model

    model = get_peft_model(load_model(TITLER, AutoModelForSeq2SeqLM), IA3Config(task_type="SEQ_2_SEQ_LM"))
    model.save_pretrained(tmp_path)
    assert ia3.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == TITLER
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.get_nb_trainable_parameters() == (0, 76_995_968)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("bare", [True, False], ids=["no head in the base", "another head in the base"])
def test_a_head_of_the_adapters_own_size(family, bare, tiny, output, tmp_path):
    classes = {"num_labels": 5, "pad_token_id": 0}
    model = saved(tiny(family, task="SEQ_CLS", **classes), tmp_path, task_type="SEQ_CLS")
    expected = output(model)
    base = tiny(family, task="SEQ_CLS", num_labels=2)
    trained = model.unload()
    base.base_model.load_state_dict(trained.base_model.state_dict())
    (base.base_model if bare else base).save_pretrained(tmp_path / "base")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert loaded.config.num_labels == 5
    torch.testing.assert_close(output(loaded), expected)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_decoders_head_pads_by_its_end_token(tiny, tmp_path, task):
    base = tiny("gpt2", task=task, num_labels=3, pad_token_id=None, eos_token_id=1)
    saved(base, tmp_path, task_type=task)
    loaders = {"SEQ_CLS": AutoPeftModelForSequenceClassification, "TOKEN_CLS": AutoPeftModelForTokenClassification}
    loaded = loaders[task].from_pretrained(tmp_path / "adapter")
    assert loaded.config.pad_token_id == 1


def test_the_labels_stand_in_the_task_file(tiny, tmp_path):
    saved(tiny("bert", task="TOKEN_CLS", num_labels=3), tmp_path, task_type="TOKEN_CLS")
    task = tmp_path / "adapter" / "ia3_task.json"
    task.write_text(json.dumps({"labels": ["O", "B-X", "I-X"]}))
    loaded = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter")
    assert loaded.config.id2label == {0: "O", 1: "B-X", 2: "I-X"}
    assert AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter", num_labels=3).num_labels == 3
    task.write_text("{")
    with pytest.raises(ValueError, match=r"ia3_task\.json is not valid JSON"):
        AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter")


def test_a_base_that_lacks_more_than_the_head_is_refused(tiny, tmp_path):
    saved(tiny("bert", task="SEQ_CLS", num_labels=3), tmp_path, task_type="SEQ_CLS")
    tiny("bert", task="SEQ_CLS", num_labels=3, intermediate_size=12).save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    edit(tmp_path, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"lacks \d+ tensors that the adapter doesn't bring"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
