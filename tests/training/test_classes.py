"""Classes of texts: the loss against transformers' own, the measurement against each text alone."""

from __future__ import annotations

import pytest
import torch

import tiny_classifier
from ia3 import IA3Config, get_peft_model
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Example
from ia3.tasks.task import TaskKind
from ia3.training.learners.heads import SequenceClasses
from tiny_classifier import LABELS, labelled, names

KIND = TaskKind.SEQUENCE_CLASSIFICATION


@pytest.fixture
def learner(tiny, randomise):
    """`learner(family, dtype=…, max_length=…, **settings)`: dropout must act in training alone."""

    def make(family="bert", dtype=torch.float64, max_length=32, **settings):
        model = tiny(family, task="SEQ_CLS", dtype=dtype, initializer_range=0.3, **names(LABELS))
        model = randomise(get_peft_model(model, IA3Config(task_type="SEQ_CLS")))
        task = tiny_classifier.task(KIND, max_length)
        return SequenceClasses(model, tiny_classifier.tokenizer(), task, TrainSettings(**settings))

    return make


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_the_loss_is_transformers_own_and_trains_vectors_and_head(learner, family):
    own = learner(family, pad_to_multiple_of=8)
    examples = labelled(7)
    batch = own.collate(own.tokenise(examples))
    assert batch["input_ids"].shape[1] % 8 == 0
    assert own.targets(batch) == 7
    classes = torch.tensor([LABELS.index(row.label) for row in examples])
    encoded = own.tokenizer([row.text for row in examples], padding=True, return_tensors="pt")
    expected = own.model(**encoded, labels=classes).loss
    loss = own.loss(batch)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    loss.backward()
    trained = {name: p for name, p in own.model.named_parameters() if p.requires_grad}
    assert {".ia3_l." in name for name in trained} == {True, False}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


@pytest.mark.parametrize("size", [1, 3, 32])
def test_the_measurement_is_that_of_each_text_alone(learner, size):
    own = learner("gpt2", evaluation_batch_size=size)
    examples = labelled(7)
    own.model.train()
    beats: list[int] = []
    found = own.measure(own.tokenise(examples), beats.append)
    assert not own.model.training
    assert sum(beats) == 7
    assert max(beats) <= size
    losses, answers = [], []
    for row in examples:
        with torch.no_grad():
            logits = own.model(**own.tokenizer(row.text, return_tensors="pt")).logits[0]
        losses.append(-float(logits.log_softmax(dim=-1)[LABELS.index(row.label)]))
        answers.append(LABELS[int(logits.argmax())])
    assert found.loss == pytest.approx(sum(losses) / 7, abs=1e-12)
    assert found.predictions == answers
    assert len(set(answers)) > 1
    assert found.shown == [row.text for row in examples]
    assert found.references == [row.label for row in examples]


def test_a_long_text_is_cut(learner):
    own = learner(max_length=4)
    rows = own.tokenise([Example("the share rises falls", "neutral"), Example("the share", "neutral")])
    assert rows[0].input_ids == rows[1].input_ids
    assert own.length(rows[0]) == 4


def test_it_learns(learner):
    own = learner(dtype=torch.float32)
    rows = own.tokenise(labelled(24))
    before = own.measure(rows, lambda count: None)
    trained = [p for p in own.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=2e-2)
    batch = own.collate(rows)
    for _ in range(60):
        optimiser.zero_grad()
        own.loss(batch).backward()
        optimiser.step()
    after = own.measure(rows, lambda count: None)
    assert after.predictions == after.references != before.predictions
    assert after.loss < 0.1 < before.loss


def test_labels_that_the_head_does_not_have_are_refused(learner, tiny):
    with pytest.raises(ValueError, match=r"'bullish' of the text 'the share' is not among .*'positive'"):
        learner().tokenise([Example("the share", "bullish")])
    two = tiny("bert", **names(("bad", "good")))
    with pytest.raises(ValueError, match=r"head is for the labels \['bad', 'good'\].*load_classifier"):
        SequenceClasses(two, tiny_classifier.tokenizer(), tiny_classifier.task(KIND), TrainSettings())


def test_a_model_that_cannot_tell_padding_is_refused(tiny):
    model = tiny("gpt2", task="SEQ_CLS", pad_token_id=None, **names(LABELS))
    with pytest.raises(ValueError, match=r"set model\.config\.pad_token_id"):
        SequenceClasses(model, tiny_classifier.tokenizer(), tiny_classifier.task(KIND), TrainSettings())
