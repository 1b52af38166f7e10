from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_causal
from builders import vector_gradients
from ia3 import IA3Config, get_peft_model
from ia3.fast.ragged import IGNORE_INDEX
from ia3.inference.complete import complete
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Example
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template
from ia3.training.learners.instructions import Instructions, count_cut, find_separation, pack

TURNS = (("user", "say one"), ("assistant", "two"))


def task_of(**arguments) -> Task:
    usual = {"max_length": 48, "max_new_tokens": 4}
    return Task(kind=TaskKind.INSTRUCTIONS, template=Template("{text}"), **(usual | arguments))


@pytest.fixture
def learner(tiny, randomise):
    """`learner(family, template=…, task=…, **settings)`: an adapted tiny model with random vectors."""

    def make(family="llama", *, template=tiny_causal.CHATS, task=None, dtype=torch.float64, base=None, **settings):
        shape = {"vocab_size": len(tiny_causal.WORDS), "bos_token_id": 3} | (base or {})
        model = tiny(family, dtype=dtype, **shape)
        model = randomise(get_peft_model(model, IA3Config(task_type="CAUSAL_LM")))
        return Instructions(
            model,
            tiny_causal.tokenizer(template),
            task or task_of(),
            TrainSettings(evaluation_batch_size=3, **settings),
        )

    return make


def test_a_conversation_is_what_the_chat_template_makes_of_it(learner) -> None:
    made = learner(task=task_of(system="be brief"))
    (row,) = made.tokenise([Example("then two", "three four", TURNS)])
    (dialogue,) = row
    conversation = [
        {"role": "system", "content": "be brief"},
        *({"role": role, "content": content} for role, content in TURNS),
        {"role": "user", "content": "then two"},
    ]
    template = made.tokenizer.apply_chat_template
    prompt = template(conversation, add_generation_prompt=True)["input_ids"]
    whole = template([*conversation, {"role": "assistant", "content": "three four"}])["input_ids"]
    assert dialogue.prompt == dialogue.asked == prompt
    # The template ends in `</s> <line>`, and generation ends at `</s>`.
    assert [*dialogue.prompt, *dialogue.completion] == whole[:-1]
    assert made.tokenizer.decode(dialogue.completion) == "three four </s>"
    assert not dialogue.cut


def test_plain_text_begins_and_ends_as_the_tokenizer_has_it(learner) -> None:
    made = learner(template=None)
    ((dialogue,),) = made.tokenise([Example("say one", "two")])
    assert made.tokenizer.decode(dialogue.prompt) == "<s> say one"
    assert made.tokenizer.decode(dialogue.completion) == "two </s>"


def test_an_end_token_is_added_where_the_template_has_none(learner) -> None:
    made = learner(template=tiny_causal.CHATS.replace(" </s> <line>", ""))
    ((dialogue,),) = made.tokenise([Example("say one", "two")])
    assert made.tokenizer.decode(dialogue.completion) == "two </s>"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_loss_is_the_models_own_on_the_completions(learner, family: str) -> None:
    made = learner(family, dtype=torch.float32, pad_to_multiple_of=8)
    rows = made.tokenise(tiny_causal.examples(5))
    batch = made.collate(rows)
    assert batch["input_ids"].shape[1] % 8 == 0
    words = sum(len(row.label.split()) + 1 for row in tiny_causal.examples(5))
    assert made.targets(batch) == words
    own = made.model(**batch).loss
    torch.testing.assert_close(made.loss(batch), own, rtol=1e-6, atol=0)
    prompts = batch["input_ids"].masked_fill(batch["labels"] != IGNORE_INDEX, 0)
    assert prompts.count_nonzero() == sum(len(dialogue.prompt) for row in rows for dialogue in row)


FAMILIES = {
    "llama": {},
    "gpt2": {},
    "qwen2": {},
    "gemma3_text": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "opt": {},
    "falcon-plain": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_changes_neither_loss_nor_gradients(learner, family: str) -> None:
    examples = [*tiny_causal.examples(7), Example("then two", "three four", TURNS)]
    apart = learner(family, base=FAMILIES[family])
    packed = replace(apart, settings=replace(apart.settings, packing=True))
    packed_rows = packed.tokenise(examples)
    assert 1 < len(packed_rows) < len(examples)

    def loss_and_gradients(made, rows):
        made.model.zero_grad()
        batch = made.collate(rows)
        loss = made.loss(batch)
        loss.backward()
        return made.targets(batch), loss.detach(), vector_gradients(made.model)

    count, loss, gradients = loss_and_gradients(apart, apart.tokenise(examples))
    packed_count, packed_loss, packed_gradients = loss_and_gradients(packed, packed_rows)
    assert packed_count == count
    torch.testing.assert_close(packed_loss, loss, rtol=0, atol=1e-10)
    assert gradients
    torch.testing.assert_close(packed_gradients, gradients, rtol=0, atol=1e-10)


def test_how_a_model_keeps_conversations_apart_is_found_in_training_too(learner) -> None:
    model = learner("opt").model.train()
    assert find_separation(model) == "mask"
    assert model.training
    assert find_separation(learner("mistral", dtype=torch.bfloat16).model) == "positions"


def test_packing_is_refused_where_conversations_would_read_each_other(learner) -> None:
    made = learner("bloom", packing=True)
    with pytest.raises(
        ValueError, match=r"in one row of a bloom model would read each other: train it without packing"
    ):
        made.tokenise(tiny_causal.examples(3))


@given(st.lists(st.integers(1, 20), max_size=60))
def test_rows_are_full_and_hold_each_piece_once(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert not filled or filled[-1] <= 20
    assert len(filled) < 2 or filled[0] + filled[1] > 20  # no two rows could be one


def test_prompts_are_cut_for_training_and_counted_but_asked_whole(learner) -> None:
    made = learner(task=task_of(max_length=9))
    long, short = made.tokenise([Example("please say the number one", "two three"), Example("one", "two three")])
    text = made.tokenizer.decode
    assert text(long[0].prompt) == "<user> number one </s> <line> <assistant>"
    assert text(long[0].completion) == "two three </s>"
    assert text(long[0].asked) == "<user> please say the number one </s> <line> <assistant>"
    assert text(short[0].prompt) == text(short[0].asked) == "<user> one </s> <line> <assistant>"
    assert count_cut([long, short]) == 1
    assert made.length(long) == 9


def test_a_completion_is_never_cut(learner) -> None:
    made = learner(task=task_of(max_length=6))
    with pytest.raises(ValueError, match=r"'one two three four five' takes 6 tokens.*never cut. Raise max_length"):
        made.tokenise([Example("say", "one two three four five")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (tiny_causal.CHATS.replace("message['content']", "message['content'][:9]"), r"changes or drops the answer"),
        ("{{ messages | length }} " + tiny_causal.CHATS, r"differently once it is answered.*'1 <user> .*'2 <user> "),
        (
            tiny_causal.CHATS.replace("> {{", "> {{ 'then ' if message['role'] == 'assistant' }}{{"),
            r"writes 'then ' before an answer, but doesn't when it asks",
        ),
    ],
)
def test_a_template_that_does_not_keep_the_answer_is_refused(learner, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(template=template).tokenise([Example("one", "number after two")])


@pytest.mark.parametrize("packing", [False, True])
def test_measuring_answers_in_order_as_complete_does(learner, packing: bool) -> None:
    examples = tiny_causal.examples(8)
    made = learner(packing=packing)
    rows, beats = made.tokenise(examples), []
    found = made.measure(rows, beats.append)
    assert sum(beats) == len(rows)
    assert found.shown == [row.text for row in examples]
    assert found.references == [row.label for row in examples]
    task = made.task
    assert found.predictions == complete(
        made.model, made.tokenizer, found.shown, max_length=task.max_length, max_new_tokens=task.max_new_tokens
    )
    with torch.no_grad():
        batches = [made.collate([row]) for row in learner().tokenise(examples)] if not packing else [made.collate(rows)]
        losses = [(float(made.loss(batch)), made.targets(batch)) for batch in batches]
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert found.loss == pytest.approx(mean, abs=1e-10)


def test_a_model_learns_to_answer_and_to_end(tiny) -> None:
    model = tiny(
        "llama", vocab_size=len(tiny_causal.WORDS), bos_token_id=3, tie_word_embeddings=False, initializer_range=0.3
    )
    config = IA3Config(task_type="CAUSAL_LM", modules_to_save=["lm_head", "embed_tokens"])
    made = Instructions(get_peft_model(model, config), tiny_causal.tokenizer(), task_of(), TrainSettings(packing=True))
    examples = tiny_causal.examples(12)
    rows = made.tokenise(examples)
    before = made.measure(rows, lambda rows: None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.0)
    for _ in range(60):
        made.loss(made.collate(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = made.measure(rows, lambda rows: None)
    assert before.predictions != after.predictions == after.references
    assert after.loss < 0.1 < before.loss
