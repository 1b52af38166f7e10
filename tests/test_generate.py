"""`generate` and `pipeline` with an adapter, against PEFT and against merged weights."""

import copy

import peft
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.pipelines import SUPPORTED_TASKS

from builders import CAUSAL, SEQ2SEQ, adapted, gpt2, llama, randomise, seq2seq_batch, t5
from ia3 import IA3Config, get_peft_model

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "top_k": 10},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}
MODELS = {"t5": (t5, SEQ2SEQ), "llama": (llama, CAUSAL), "gpt2": (gpt2, CAUSAL)}


def prompt(kind, mask):
    batch = seq2seq_batch()
    if mask and kind == "t5":
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return {"input_ids": batch["input_ids"]}


def generated(model, inputs, **way):
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=6, **way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mask", [True, False])
def test_generate_equals_merged_weights(kind, way, mask):
    build, config = MODELS[kind]
    model = adapted(build(), **config)
    randomise(model, spread=30)  # enough to move a tiny model's words
    merged = copy.deepcopy(model).merge_and_unload()
    inputs = prompt(kind, mask)
    got = generated(model, inputs, **WAYS[way])
    assert torch.equal(got, generated(merged, inputs, **WAYS[way]))
    if way in ("greedy", "beams"):
        assert not torch.equal(got, generated(build(), inputs, **WAYS[way]))


@pytest.mark.parametrize("way", ["greedy", "beams", "sampling"])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_generate_equals_peft(kind, way, tmp_path):
    build, config = MODELS[kind]
    model = adapted(build(), **config)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path))
    inputs = prompt(kind, mask=True)
    assert torch.equal(generated(model, inputs, **WAYS[way]), generated(theirs, inputs, **WAYS[way]))


def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def bert(cls, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return cls(BertConfig(vocab_size=64, **sizes, **config)).eval()


PIPELINES = {
    "text-classification": (lambda: bert(BertForSequenceClassification, num_labels=3), "SEQ_CLS", "w1 w2 w3"),
    "token-classification": (lambda: bert(BertForTokenClassification, num_labels=3), "TOKEN_CLS", "w1 w2 w3"),
    "feature-extraction": (lambda: bert(BertModel), "FEATURE_EXTRACTION", "w1 w2 w3"),
    "text-generation": (gpt2, "CAUSAL_LM", "w1 w2 w3"),
    "question-answering": (
        lambda: bert(BertForQuestionAnswering),
        "QUESTION_ANS",
        {"question": "w1 w2", "context": "w3 w4 w5"},
    ),
}


@pytest.mark.parametrize("task", [task for task in PIPELINES if task in SUPPORTED_TASKS])
def test_pipeline(task, caplog):
    build, task_type, text = PIPELINES[task]
    model = adapted(build(), task_type=task_type)
    options = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}

    def answer(model):
        return pipeline(task, model=model, tokenizer=tokenizer(), device="cpu")(text, **options)

    merged = copy.deepcopy(model).merge_and_unload()
    assert str(answer(model))[:60] == str(answer(merged))[:60]
    assert "not supported for" not in caplog.text
    with model.disable_adapter():
        assert str(answer(model)) == str(answer(build()))


def test_a_static_cache_decoder_still_follows_the_active_adapter():
    model = adapted(llama(), "a", **CAUSAL)
    inputs = prompt("llama", mask=False)
    first = generated(model, inputs, cache_implementation="static")
    model.set_adapter("a")
    second = generated(model, inputs, cache_implementation="static")
    model.set_adapter("default")
    assert torch.equal(generated(model, inputs, cache_implementation="static"), first)
    assert not torch.equal(first, second)


def test_generate_of_a_model_that_can_not_says_so():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), IA3Config(target_modules=["0"]))
    with pytest.raises(AttributeError, match="generate"):
        model.generate()
