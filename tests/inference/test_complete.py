from __future__ import annotations

import pytest
import torch

import tiny_causal
from ia3.inference import complete as completing
from ia3.inference.complete import complete, cut_prompt, render

TEXTS = ["say one", "please please say the number after four", "two", "say the number after five then six"]


def words_of(tokenizer, model, text: str, new_tokens: int = 6, **messages) -> str:
    """What transformers' own `generate` answers to one prompt of its own chat template."""
    conversation = [
        *({"role": "system", "content": system} for system in messages.get("system", ())),
        *({"role": role, "content": content} for role, content in messages.get("turns", ())),
        {"role": "user", "content": text},
    ]
    prompt = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(
        input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=new_tokens
    )
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture
def model(tiny):
    """Answers that differ by text: the random weights are large."""

    def make(family: str):
        # transformers' BLOOM turns the padding of float64 into NaN: its softmax is of float32.
        dtype = torch.float32 if family == "bloom" else torch.float64
        made = tiny(family, dtype=dtype, vocab_size=len(tiny_causal.WORDS), bos_token_id=3, tie_word_embeddings=False)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.7)
        made.generation_config.suppress_tokens = [0, *range(2, 8)]
        return made

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "qwen2", "falcon-plain"])
def test_a_batch_answers_as_each_text_alone_does(model, family: str) -> None:
    base, tokenizer = model(family), tiny_causal.tokenizer()
    expected = [words_of(tokenizer, base, text) for text in TEXTS]
    assert len({*expected}) > 1
    for batch_size in (1, 3, 32):
        assert complete(base, tokenizer, TEXTS, max_new_tokens=6, batch_size=batch_size) == expected


def test_system_messages_and_turns_are_read(model) -> None:
    base, tokenizer = model("llama"), tiny_causal.tokenizer()
    turns = [("user", "say one"), ("assistant", "two")]
    own = [("system", "please"), *turns]
    expected = [
        words_of(tokenizer, base, "say two", system=["be brief"]),
        words_of(tokenizer, base, "say two", system=["be brief"], turns=turns),
        words_of(tokenizer, base, "say two", turns=own),
    ]
    assert len({*expected}) == 3
    found = complete(base, tokenizer, ["say two"] * 3, system="be brief", turns=[(), turns, own], max_new_tokens=6)
    assert found == expected


@pytest.mark.parametrize("named_by", ["model", "tokenizer"])
def test_an_answer_ends_at_any_end_token(model, named_by: str) -> None:
    base, tokenizer = model("llama"), tiny_causal.tokenizer()
    whole = words_of(tokenizer, base, "say one", 8).split()
    end = next(word for word in whole if word not in whole[:2] and word in tiny_causal.WORDS[8:])
    if named_by == "model":
        base.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids(end)]
    else:
        tokenizer.eos_token = end
    answer, steps = whole[: whole.index(end)], []
    base.register_forward_hook(lambda *_: steps.append(1))
    assert complete(base, tokenizer, ["say one"], max_new_tokens=8) == [" ".join(answer)]
    assert len(steps) == len(answer) + 1


def test_answers_are_greedy_whatever_penalty_the_model_asks_for(model) -> None:
    base, tokenizer = model("llama"), tiny_causal.tokenizer()
    expected = [words_of(tokenizer, base, text) for text in TEXTS]
    base.generation_config.repetition_penalty = 3.0
    assert [words_of(tokenizer, base, text) for text in TEXTS] != expected
    assert complete(base, tokenizer, TEXTS, max_new_tokens=6) == expected


def test_a_tokenizer_without_padding_stays_so(model) -> None:
    base, tokenizer = model("llama"), tiny_causal.tokenizer(pad=False)
    found = complete(base, tokenizer, TEXTS, max_new_tokens=6)
    assert found == complete(base, tiny_causal.tokenizer(), TEXTS, max_new_tokens=6)
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "right"


def test_plain_text_is_gone_on_from(model) -> None:
    base, tokenizer = model("llama"), tiny_causal.tokenizer(None)
    start = torch.tensor([[3, *tokenizer.convert_tokens_to_ids(["say", "one"])]])
    expected = base.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=6)[0, 3:]
    assert complete(base, tokenizer, ["say one", TEXTS[1]], max_new_tokens=6)[0] == tokenizer.decode(
        expected, skip_special_tokens=True
    )


def test_no_texts(model) -> None:
    assert complete(model("llama"), tiny_causal.tokenizer(), []) == []


def spelt(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids)


@pytest.mark.parametrize("own", [False, True])
def test_the_earliest_turns_and_then_the_beginning_of_the_text_are_cut(own: bool) -> None:
    tokenizer = tiny_causal.tokenizer()
    turns = [("user", "say one"), ("assistant", "two"), ("user", "then three"), ("assistant", "four")]
    if own:  # the conversation's own system message stands instead of the task's
        turns = [("system", "be brief"), *turns]
    arguments = {"text": "say the number after five", "turns": turns, "system": "then then" if own else "be brief"}
    start = "<system> be brief </s> <line>"
    later = "<user> then three </s> <line> <assistant> four </s> <line>"
    end = "</s> <line> <assistant>"

    def cut(room: int) -> str:
        return spelt(tokenizer, cut_prompt(tokenizer, **arguments, room=room))

    first = "<user> say one </s> <line> <assistant> two </s> <line>"
    assert cut(32) == f"{start} {first} {later} <user> say the number after five {end}"
    assert cut(31) == cut(23) == f"{start} {later} <user> say the number after five {end}"
    assert cut(22) == cut(14) == f"{start} <user> say the number after five {end}"
    assert cut(13) == f"{start} <user> the number after five {end}"
    assert cut(10) == f"{start} <user> five {end}"
    with pytest.raises(ValueError, match=r"can't be cut to 9 tokens.*raise the length.*'say the number after five'"):
        cut(9)


def test_plain_text_keeps_its_first_token_and_its_end() -> None:
    tokenizer = tiny_causal.tokenizer(None)
    assert spelt(tokenizer, cut_prompt(tokenizer, "say the number after five", room=3)) == "<s> after five"


def test_long_prompts_are_cut_before_they_are_answered(model) -> None:
    base, tokenizer = model("llama"), tiny_causal.tokenizer()
    long = "please please please say one"
    assert complete(base, tokenizer, [long], max_length=6, max_new_tokens=6) == [words_of(tokenizer, base, "say one")]


def test_an_answer_ends_where_the_models_positions_do_and_not_with_its_neighbours(model, caplog, monkeypatch) -> None:
    base, tokenizer = model("gpt2"), tiny_causal.tokenizer()
    base.generation_config.suppress_tokens = [0, 1, *range(2, 8)]  # so that no answer ends by itself
    lengths = [4 + len(text.split()) for text in TEXTS]  # with the template's words
    base.config.max_position_embeddings = max(lengths) + 3
    rooms = [min(6, max(lengths) + 3 - length) for length in lengths]
    assert rooms == [6, 3, 6, 3]
    expected = [words_of(tokenizer, base, text, room) for text, room in zip(TEXTS, rooms, strict=True)]
    assert [len(answer.split()) for answer in expected] == rooms
    made, compile_once = [], completing.compile_answers
    monkeypatch.setattr(completing, "compile_answers", lambda *args: made.append(args) or compile_once(*args))
    assert complete(base, tokenizer, TEXTS, max_new_tokens=6) == expected
    assert len(made) == 1  # whatever room there is
    short = sum(room < 6 for room in rooms)
    assert f"{short} of {len(TEXTS)} prompts leave less room than 6 tokens" in caplog.text


def test_what_cannot_be_answered_is_refused(model) -> None:
    base = model("gpt2")
    plain = tiny_causal.tokenizer(None)
    with pytest.raises(ValueError, match=r"no chat template.*system message or earlier turns"):
        complete(base, plain, ["one"], system="be brief")
    with pytest.raises(ValueError, match=r"1 lists of earlier turns for 2 texts"):
        complete(base, plain, ["one", "two"], turns=[()])
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    with pytest.raises(ValueError, match=r"refuses a conversation of the roles system, user: no system here"):
        complete(base, tiny_causal.tokenizer(no_system + tiny_causal.CHATS), ["one"], system="be brief")
    base.config.max_position_embeddings = 5
    with pytest.raises(ValueError, match=r"takes 6 tokens with its answer, and the model reads 5"):
        complete(base, tiny_causal.tokenizer(), ["one"], max_new_tokens=12)
    base.config.max_position_embeddings = 32
    endless = tiny_causal.tokenizer()
    endless.eos_token = None
    base.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"names an end token.*set tokenizer.eos_token"):
        complete(base, endless, ["one"], max_new_tokens=2)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    ],
    ids=["time", "memory"],
)
def test_a_template_without_an_end_is_stopped(template: str) -> None:
    """jinja's sandbox stops neither a loop in a loop nor a text that doubles."""
    tokenizer = tiny_causal.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template takes longer"):
        render(tokenizer, [{"role": "user", "content": "hello"}], answering=True)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert render(tokenizer, [{"role": "user", "content": "hello"}], answering=True) == "hello"
