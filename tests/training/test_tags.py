"""Classes of words: the loss against transformers' own, the measurement against each text alone."""

from __future__ import annotations

import pytest
import torch

import tiny_classifier
from ia3 import IA3Config, get_peft_model
from ia3.runs.settings import TrainSettings
from ia3.tasks.entities import entity_scores
from ia3.tasks.examples import Example
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template
from ia3.training.learners.heads import TokenClasses
from tiny_classifier import TAGS, names

KIND = TaskKind.TOKEN_CLASSIFICATION
EXAMPLES = [
    Example("the share of nokia rises", "O O O B-LOC O"),
    Example("ann lee falls", "B-PER I-PER O"),
    Example("stays", "O"),
    Example("in new york the share falls", "O B-LOC I-LOC O O O"),
]
# [CLS] the share o ##f n ##o ##k ##i ##a rises [SEP] and so on: where each word's first token stands.
STARTS = [[1, 2, 3, 5, 10], [1, 4, 7], [1], [1, 3, 6, 10, 11, 12]]


@pytest.fixture
def learner(tiny, randomise):
    """`learner(dtype=…, max_length=…, **settings)`."""

    def make(family="bert", dtype=torch.float64, max_length=32, **settings):
        model = tiny(family, task="TOKEN_CLS", dtype=dtype, initializer_range=0.3, **names(TAGS))
        model = randomise(get_peft_model(model, IA3Config(task_type="TOKEN_CLS")))
        task = tiny_classifier.task(KIND, max_length)
        return TokenClasses(model, tiny_classifier.tokenizer(), task, TrainSettings(**settings))

    return make


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_the_loss_is_transformers_own_over_first_tokens(learner, family):
    own = learner(family, pad_to_multiple_of=8)
    batch = own.collate(own.tokenise(EXAMPLES))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
    assert own.targets(batch) == 15
    encoded = own.tokenizer([row.text for row in EXAMPLES], padding=True, return_tensors="pt")
    labels = torch.full_like(encoded["input_ids"], -100)
    for index, (row, places) in enumerate(zip(EXAMPLES, STARTS, strict=True)):
        for place, name in zip(places, row.label.split(), strict=True):
            labels[index, place] = TAGS.index(name)
    loss = own.loss(batch)
    # transformers itself takes some of these losses in fp32.
    assert loss.item() == pytest.approx(own.model(**encoded, labels=labels).loss.item(), abs=1e-6)
    loss.backward()
    trained = [p for p in own.model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("size", [1, 3])
def test_the_measurement_is_that_of_each_text_alone(learner, size):
    own = learner(evaluation_batch_size=size)
    beats: list[int] = []
    found = own.measure(own.tokenise(EXAMPLES), beats.append)
    assert sum(beats) == 4
    losses, answers = [], []
    for row, places in zip(EXAMPLES, STARTS, strict=True):
        with torch.no_grad():
            logits = own.model(**own.tokenizer(row.text, return_tensors="pt")).logits[0, places]
        right = torch.tensor([TAGS.index(name) for name in row.label.split()])
        losses += (-logits.log_softmax(dim=-1)[torch.arange(len(places)), right]).tolist()
        answers.append([TAGS[index] for index in logits.argmax(dim=-1).tolist()])
    assert found.loss == pytest.approx(sum(losses) / 15, abs=1e-12)
    assert found.shown == " ".join(row.text for row in EXAMPLES).split()
    assert found.references == " ".join(row.label for row in EXAMPLES).split()
    assert found.predictions == [name for text in answers for name in text]
    scores = entity_scores([row.label.split() for row in EXAMPLES], answers)
    assert found.scores == {
        "entity_f1": scores.f1,
        "entity_precision": scores.precision,
        "entity_recall": scores.recall,
    }


def test_words_behind_the_cut_are_counted_and_in_no_figure(learner, caplog):
    own = learner(max_length=8)
    rows = own.tokenise(EXAMPLES)
    # [CLS] a ##n ##n l ##e ##e [SEP]: of the three texts of several words 1, 1 and 3 words are cut.
    assert "5 of 15 words have no token within the first 8" in caplog.text
    found = own.measure(rows, lambda count: None)
    assert found.shown == ["the", "share", "of", "nokia", "ann", "lee", "stays", "in", "new", "york"]
    assert found.references == ["O", "O", "O", "B-LOC", "B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC"]
    assert found.scores["words_left_out"] == 5
    assert own.targets(own.collate(rows)) == 10


def test_it_learns_whole_entities(learner):
    own = learner(dtype=torch.float32)
    rows = own.tokenise(EXAMPLES)
    optimiser = torch.optim.AdamW([p for p in own.model.parameters() if p.requires_grad], lr=2e-2)
    batch = own.collate(rows)
    for _ in range(80):
        optimiser.zero_grad()
        own.loss(batch).backward()
        optimiser.step()
    found = own.measure(rows, lambda count: None)
    assert found.predictions == found.references
    assert found.scores["entity_f1"] == 1


def test_tags_that_mark_no_entities_have_no_entity_scores(tiny):
    labels = ("NOUN", "VERB")
    model = tiny("bert", task="TOKEN_CLS", **names(labels))
    task = Task(kind=KIND, template=Template.of_column("text"), labels=labels, max_length=32)
    own = TokenClasses(model, tiny_classifier.tokenizer(), task, TrainSettings())
    assert own.measure(own.tokenise([Example("share rises", "NOUN VERB")]), lambda count: None).scores == {}


@pytest.mark.parametrize(
    ("text", "tags", "message"),
    [
        ("ann lee falls", "B-PER I-PER", "'ann lee falls' has 3 words and 2 tags"),
        ("ann  lee", "B-PER I-PER", "'ann  lee' has 3 words and 2 tags"),
        ("ann", "B-ORG", r"'B-ORG' of the text 'ann' is not among .*'B-LOC'"),
    ],
)
def test_tags_that_do_not_fit_are_refused(learner, text, tags, message):
    with pytest.raises(ValueError, match=message):
        learner().tokenise([Example(text, tags)])
