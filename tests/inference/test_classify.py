"""Heads: what they answer in batches against each text alone, and how they come to a base model."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import tiny_classifier
from ia3 import IA3Config, PeftModel, get_peft_model
from ia3.inference.classify import Tagged, classify, head_modules, load_classifier, tag
from ia3.tasks.task import TaskKind
from tiny_classifier import LABELS, TAGS, TEXTS, names

TEXT_CLASSES, WORD_CLASSES = TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.TOKEN_CLASSIFICATION


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_probabilities_are_those_of_each_text_alone(tiny, family, batch_size):
    model = tiny(family, task="SEQ_CLS", dtype=torch.float64, **names(LABELS), initializer_range=0.5)
    tokenizer = tiny_classifier.tokenizer()
    tokenizer.padding_side = "left"  # where a causal model's positions would be others
    model.train()
    rankings = classify(model, tokenizer, TEXTS, batch_size=batch_size)
    model.eval()
    for text, ranking in zip(TEXTS, rankings, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(dim=-1).tolist()
        assert ranking.probabilities == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-12)
        assert ranking.label == LABELS[expected.index(max(expected))]
    assert len({round(ranking.probabilities[LABELS[0]], 3) for ranking in rankings}) > 3


@pytest.mark.parametrize("spelling", [tiny_classifier.tokenizer, tiny_classifier.byte_tokenizer])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_word_is_tagged_by_its_first_token_in_the_plain_text(tiny, spelling, batch_size):
    tokenizer = spelling()
    model = tiny("bert", task="TOKEN_CLS", dtype=torch.float64, vocab_size=300, initializer_range=0.5, **names(TAGS))
    answers = tag(model, tokenizer, [text.split() for text in TEXTS], batch_size=batch_size)
    assert len({found.tag for tagged in answers for found in tagged}) > 2
    for text, tagged in zip(TEXTS, answers, strict=True):
        encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            probabilities = model(**encoded).logits[0].softmax(dim=-1)
        words = text.split()
        assert [found.word for found in tagged] == words
        for place, found in enumerate(tagged):
            begin = len(" ".join(words[:place])) + (place > 0)
            first = next(i for i, (start, _) in enumerate(offsets) if i > 0 and start == begin)
            assert found.tag == TAGS[int(probabilities[first].argmax())]
            assert found.probability == pytest.approx(float(probabilities[first].max()), abs=1e-12)


def test_words_behind_the_cut_get_no_tag_and_are_counted(tiny, caplog):
    model = tiny("bert", task="TOKEN_CLS", **names(TAGS))
    tokenizer = tiny_classifier.tokenizer()
    cut, whole = tag(model, tokenizer, [["the", "share", "of", "it", "rises"], ["falls"]], max_length=6)
    # [CLS] the share o ##f [SEP]
    assert cut[3:] == [Tagged("it", None, None), Tagged("rises", None, None)]
    assert all(found.tag in TAGS for found in (*cut[:3], *whole))
    assert "2 of 6 words have no token within the first 6" in caplog.text


def test_no_texts(tiny):
    assert classify(tiny("bert", **names(LABELS)), tiny_classifier.tokenizer(), []) == []
    assert tag(tiny("bert", task="TOKEN_CLS", **names(TAGS)), tiny_classifier.tokenizer(), []) == []


def test_what_would_give_wrong_answers_is_refused(tiny):
    tokenizer = tiny_classifier.tokenizer()
    with pytest.raises(ValueError, match=r"set model\.config\.pad_token_id"):
        classify(tiny("gpt2", task="SEQ_CLS", pad_token_id=None, **names(LABELS)), tokenizer, TEXTS)
    bert = tiny("bert", max_position_embeddings=8, **names(LABELS))
    with pytest.raises(ValueError, match=r"10 tokens .* has 8 positions: cut at max_length 8"):
        classify(bert, tokenizer, ["the share", "share of company"], max_length=10)
    assert classify(bert, tokenizer, ["share of company"], max_length=8)
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="no token of the text ''"):
        classify(tiny("gpt2", task="SEQ_CLS", **names(LABELS)), tokenizer, ["the", ""])


@pytest.fixture
def headless(tiny, tmp_path):
    """A folder with a BERT that has no head, and whose pooler was trained."""
    model = tiny("bert", task=None)
    nn.init.normal_(model.pooler.dense.bias)
    model.save_pretrained(tmp_path / "headless")
    return tmp_path / "headless"


@pytest.mark.parametrize(("kind", "labels"), [(TEXT_CLASSES, LABELS), (WORD_CLASSES, TAGS)])
def test_a_base_without_a_head_gets_one(headless, kind, labels, capfd, caplog):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = load_classifier(str(headless), kind, labels)
    assert torch.equal(before, torch.get_rng_state())
    assert model.classifier.weight.shape == (len(labels), 16)
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.label2id == {label: index for index, label in enumerate(labels)}
    assert model.name_or_path == str(headless)
    assert not model.training
    saved = load_file(headless / "model.safetensors")
    own = {name.removeprefix("bert."): value for name, value in model.state_dict().items() if "bert." in name}
    assert own
    assert all(torch.equal(value, saved[name]) for name, value in own.items())
    assert "REPORT" not in capfd.readouterr().err + caplog.text


def test_the_seed_alone_decides_the_head(headless):
    heads = []
    for noise, seed in ((1, 3), (2, 3), (3, 4)):
        torch.manual_seed(noise)
        heads.append(load_classifier(str(headless), TEXT_CLASSES, LABELS, seed=seed).classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_head_of_another_size_is_replaced_and_one_of_the_same_kept(tiny, tmp_path, caplog):
    saved = tiny("bert", **names(("bad", "good")))
    saved.save_pretrained(tmp_path)
    replaced = load_classifier(str(tmp_path), TEXT_CLASSES, LABELS)
    assert replaced.classifier.weight.shape == (3, 16)
    assert torch.equal(replaced.bert.pooler.dense.weight, saved.bert.pooler.dense.weight)
    load_classifier(str(tmp_path), TEXT_CLASSES, ("bad", "good"))
    assert not caplog.records
    kept = load_classifier(str(tmp_path), TEXT_CLASSES, ("no", "yes"))
    assert torch.equal(kept.classifier.weight, saved.classifier.weight)
    assert "comes with a head for ['bad', 'good']; its outputs now mean ['no', 'yes']" in caplog.text


def test_a_causal_model_pads_with_its_end_token(tiny, tmp_path):
    tiny("gpt2", pad_token_id=None, eos_token_id=5).save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), TEXT_CLASSES, LABELS)
    assert model.config.pad_token_id == 5
    assert head_modules(model) == ["score"]


def test_bases_that_cannot_be_classifiers_are_refused(headless, tiny, tmp_path):
    tensors = load_file(headless / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors besides the head.*bert\.encoder\.layer\.1\.output"):
        load_classifier(str(headless), TEXT_CLASSES, LABELS)
    for labels in (("good",), ("good", "good"), ("good", "bad", "good")):
        with pytest.raises(ValueError, match="at least two to choose from, each once"):
            load_classifier(str(headless), TEXT_CLASSES, labels)
    with pytest.raises(ValueError, match="'label-words' has no head"):
        load_classifier(str(headless), TaskKind.LABEL_WORDS, LABELS)
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"is a vit model, .*AutoModelForSequenceClassification"):
        load_classifier(str(tmp_path / "vit"), TEXT_CLASSES, LABELS)


@pytest.mark.parametrize(
    ("family", "task", "expected"),
    [
        ("bert", "SEQ_CLS", ["bert.pooler", "classifier"]),
        ("bert", "TOKEN_CLS", ["classifier"]),
        ("roberta", "SEQ_CLS", ["classifier"]),
        ("llama", "TOKEN_CLS", ["score"]),
        ("bart", "SEQ_CLS", ["classification_head"]),
        ("t5", "SEQ_CLS", ["classification_head"]),
    ],
)
def test_the_modules_of_a_head(tiny, family, task, expected):
    assert head_modules(tiny(family, task=task)) == expected


def test_a_trained_pooler_stays_frozen(headless):
    assert head_modules(load_classifier(str(headless), TEXT_CLASSES, LABELS)) == ["classifier"]


@pytest.mark.parametrize("library", ["ia3", "peft"])
def test_an_adapter_goes_to_disk_and_back_with_its_head(tiny, randomise, tmp_path, library):
    tiny("bert", task=None).save_pretrained(tmp_path / "base")
    tokenizer = tiny_classifier.tokenizer()

    def base(seed):
        return load_classifier(str(tmp_path / "base"), TEXT_CLASSES, LABELS, seed=seed)

    model = base(0)
    model = get_peft_model(model, IA3Config(task_type="SEQ_CLS", modules_to_save=head_modules(model)))
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    loader = PeftModel if library == "ia3" else pytest.importorskip("peft").PeftModel
    loaded = loader.from_pretrained(base(1), str(tmp_path / "adapter"))
    for found, expected in zip(classify(loaded, tokenizer, TEXTS), classify(model, tokenizer, TEXTS), strict=True):
        assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
