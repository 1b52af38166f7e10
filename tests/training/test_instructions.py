from __future__ import annotations

from dataclasses import replace
from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_causal
from builders import vector_gradients
from fitted import fit
from ia3 import IA3Config, get_peft_model
from ia3.fast.ragged import IGNORE_INDEX
from ia3.inference.complete import complete
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Example, Examples
from ia3.tasks.task import Task, TaskKind
from ia3.tasks.template import Template
from ia3.training.learners.instructions import Dialogue, Instructions, Texts, count_cut, find_separation, pack
from ia3.training.loop import Training
from ia3.training.plan import RunPlan

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


def learned(made: Instructions, dialogue: Dialogue) -> list[str]:
    """The stretches of tokens that are learned."""
    assert len(dialogue.ids) == len(dialogue.labels)
    stretches = groupby(zip(dialogue.ids, dialogue.labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX)
    found = [list(stretch) for is_learned, stretch in stretches if is_learned]
    assert all(token == label for stretch in found for token, label in stretch)
    return [made.tokenizer.decode([label for _, label in stretch]) for stretch in found]


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
    assert dialogue.asked == prompt
    # The template ends in `</s> <line>`, and generation ends at `</s>`.
    assert dialogue.ids == whole[:-1]
    assert learned(made, dialogue) == ["two </s>", "three four </s>"]
    last = learner(task=made.task, train_on="last")
    ((other,),) = last.tokenise([Example("then two", "three four", TURNS)])
    assert (other.ids, learned(last, other)) == (dialogue.ids, ["three four </s>"])
    assert not dialogue.cut


def test_plain_text_begins_and_ends_as_the_tokenizer_has_it(learner) -> None:
    made = learner(template=None)
    ((dialogue,),) = made.tokenise([Example("say one", "two")])
    assert made.tokenizer.decode(dialogue.ids) == "<s> say one two </s>"
    assert learned(made, dialogue) == ["two </s>"]


def test_an_end_token_is_added_where_the_template_has_none(learner) -> None:
    made = learner(template=tiny_causal.CHATS.replace(" </s> <line>", ""))
    ((dialogue,),) = made.tokenise([Example("say one", "two")])
    assert learned(made, dialogue) == ["two </s>"]


def test_an_answer_ends_where_writing_it_does(learner) -> None:
    twice = learner(template=tiny_causal.CHATS + "{% if not add_generation_prompt %}</s>{% endif %}")
    (row,) = twice.tokenise([Example("then two", "three </s> four", TURNS)])
    assert learned(twice, row[0]) == ["two </s>", "three </s> four </s>"]


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
    completions = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][completions], batch["input_ids"][completions])


FAMILIES = {
    "llama": {},
    "gpt2": {},
    "qwen2": {},
    "gemma3_text": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "opt": {},
    "falcon-plain": {},
}


SEVERAL = [
    Example("then two", "three four", TURNS),
    Example("say two", "three", (("system", "be brief"), ("assistant", "please"), *TURNS, ("user", "then"))),
    Example("please say three", "four", (*TURNS, ("user", "say seven"), ("assistant", "one two"))),
]


@pytest.mark.parametrize("packing", [False, True])
def test_every_answer_is_learned_as_prefixes_of_the_conversation_tell(learner, packing: bool) -> None:
    """Labels by hand: each prefix with its answer, against the prefix that asks for it, through the model itself."""
    made = learner(packing=packing)
    rows = made.tokenise(SEVERAL)
    losses, count = 0.0, 0
    template = made.tokenizer.apply_chat_template
    for example in SEVERAL:
        turns = [*example.turns, ("user", example.text), ("assistant", example.label)]
        conversation = [{"role": role, "content": content} for role, content in turns]
        labels = torch.full((len(template(conversation)["input_ids"]) - 1,), IGNORE_INDEX)
        for place in range(1, len(turns)):
            if (turns[place - 1][0], turns[place][0]) == ("user", "assistant"):
                start = len(template(conversation[:place], add_generation_prompt=True)["input_ids"])
                whole = template(conversation[: place + 1])["input_ids"][:-1]
                labels[start : len(whole)] = torch.tensor(whole[start:])
        ids = torch.tensor([template(conversation)["input_ids"][:-1]])
        targets = int((labels != IGNORE_INDEX).sum())
        with torch.no_grad():
            losses += targets * float(made.model(input_ids=ids, labels=labels[None]).loss)
        count += targets
    assert sum(len(learned(made, each)) for row in rows for each in row) == 7
    batch = made.collate(rows)
    assert made.targets(batch) == count
    # transformers computes its loss in float32.
    assert float(made.loss(batch).detach()) == pytest.approx(losses / count, abs=1e-6)


MARKED = (
    "{% for message in messages %}<{{ message['role'] }}> {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }} </s>{% endgeneration %}{% else %}{{ message['content'] }} </s>{% endif %}"
    " <line> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def test_what_is_learned_are_the_tokens_that_a_template_marks_as_the_assistants(learner) -> None:
    made = learner(template=MARKED)
    examples = [SEVERAL[0], SEVERAL[2]]
    for example, (dialogue,) in zip(examples, made.tokenise(examples), strict=True):
        turns = [*example.turns, ("user", example.text), ("assistant", example.label)]
        marked = made.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert 1 in marked["assistant_masks"]
        assert [int(label != IGNORE_INDEX) for label in dialogue.labels] == marked["assistant_masks"][:-1]


@pytest.mark.parametrize("packing", [False, True])
def test_steps_on_several_answers_are_those_of_the_models_own_loss(learner, tmp_path, packing: bool) -> None:
    """The run's first loss, by the step that leaves padding out or by the ordinary one, against the batch's own."""
    made = learner(dtype=torch.float32, packing=packing, steps=2, batch_size=3, dropout=False)
    batch = made.collate(made.tokenise(SEVERAL))
    expected = float(made.loss(batch).detach())
    rows = Examples(tuple(SEVERAL), (), "three", 0, 0, TaskKind.INSTRUCTIONS)
    if not packing:
        assert "no padding" in Training(RunPlan(made, rows, rows)).describe_path()
    run = fit(made, rows, rows, tmp_path / "run")
    assert run.losses[0] == pytest.approx(expected, rel=1e-5)


FORGETFUL = tiny_causal.CHATS.replace(
    "{{ message['content'] }}", "{{ message['content'] if loop.last or message['role'] == 'user' else 'please' }}"
)


def test_a_template_that_changes_earlier_answers_makes_each_a_row_of_its_own(learner, caplog) -> None:
    made = learner(template=FORGETFUL)
    rows = made.tokenise([Example("one", "two"), *SEVERAL[::2]])
    found = [(made.tokenizer.decode(each.ids), learned(made, each), each.place) for (each,) in rows]
    start = "<user> say one </s> <line> <assistant>"
    assert found[1:3] == [
        (f"{start} two </s>", ["two </s>"], 1),
        (f"{start} please </s> <line> <user> then two </s> <line> <assistant> three four </s>", ["three four </s>"], 1),
    ]
    assert [place for *_, place in found] == [0, 1, 1, 2, 2, 2]
    assert "2 of 3 conversations are learned in parts" in caplog.text
    # In evaluation the last answer alone is asked for, and the loss is that of all.
    evaluated = made.measure(rows, lambda count: None)
    assert evaluated.shown == ["one", *(each.text for each in SEVERAL[::2])]
    assert evaluated.references == ["two", *(each.label for each in SEVERAL[::2])]
    with torch.no_grad():
        assert evaluated.loss == pytest.approx(float(made.loss(made.collate(rows))), abs=1e-10)


def test_a_conversation_that_is_too_long_keeps_every_answer(learner, caplog) -> None:
    made = learner(task=task_of(max_length=20))
    rows = made.tokenise([SEVERAL[2]])
    found = [(made.tokenizer.decode(each.ids), learned(made, each), each.cut) for (each,) in rows]
    one = "<user> say one </s> <line> <assistant> two </s>"
    two = "<user> say seven </s> <line> <assistant> one two </s>"
    three = "<user> please say three </s> <line> <assistant> four </s>"
    assert found == [
        (f"{one} <line> {two}", ["two </s>", "one two </s>"], False),
        (f"{two} <line> {three}", ["four </s>"], True),
    ]
    assert "1 of 1 conversations are learned in parts" in caplog.text
    assert made.measure(rows, lambda count: None).shown == ["please say three"]


@pytest.mark.parametrize("template", [tiny_causal.CHATS, None])
@pytest.mark.parametrize("packing", [False, True])
def test_every_token_of_a_text_is_learned_once(learner, packing: bool, template: str | None) -> None:
    task = replace(task_of(max_length=6), kind=TaskKind.LANGUAGE_MODELLING)
    like = learner(template=template, task=task, packing=packing)
    made = Texts(like.model, like.tokenizer, task, like.settings)
    texts = ["say one", "then two three four five six seven", "please say the number after", "one two three four five"]
    rows = made.tokenise([Example(text, "") for text in texts])
    pieces = [each for row in rows for each in row]
    for place, text in enumerate(texts):
        own = [each for each in pieces if each.place == place]
        assert made.tokenizer.decode([token for each in own for token in each.labels[1:]]) == f"{text} </s>"
        assert all(former.ids[-1] == each.ids[0] for former, each in pairwise(own))
        assert made.tokenizer.decode(own[0].ids[:1]) == "<s>"
    assert max(map(len, pieces)) == 6
    assert packing == (len(rows) < len(pieces))
    losses = []
    for piece in pieces:
        with torch.no_grad():
            ids = torch.tensor([piece.ids])
            losses += [float(made.model(input_ids=ids, labels=ids).loss)] * (len(piece) - 1)
    found = made.measure(rows, lambda count: None)
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)  # in float32
    assert (found.shown, found.references, found.predictions, found.scores) == ([], [], [], {})
    batch = made.collate(rows)
    assert made.targets(batch) == len(losses)
    assert float(made.loss(batch).detach()) == pytest.approx(found.loss, abs=1e-10)


def test_a_length_that_holds_no_next_token(learner) -> None:
    task = replace(task_of(max_length=1), kind=TaskKind.LANGUAGE_MODELLING)
    like = learner(task=task)
    with pytest.raises(ValueError, match="max_length is 1: expected at least 2"):
        Texts(like.model, like.tokenizer, task, like.settings).tokenise([Example("say one", "")])


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_changes_neither_loss_nor_gradients(learner, family: str) -> None:
    examples = [*tiny_causal.examples(7), *SEVERAL]
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
    assert text(long[0].ids) == "<user> number one </s> <line> <assistant> two three </s>"
    assert learned(made, long[0]) == ["two three </s>"]
    assert text(long[0].asked) == "<user> please say the number one </s> <line> <assistant>"
    assert text(short[0].asked) == "<user> one </s> <line> <assistant>"
    assert text(short[0].ids) == f"{text(short[0].asked)} two three </s>"
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
