"""Completions of a causal model: prompts by the tokenizer's chat template or as plain text, answered in batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

from ia3.errors import shorten
from ia3.fast.generate import Generate, compile_generate
from ia3.inference.predict import Beat, answer_in_batches, most_positions, names_of, pad_rows, sorted_batches
from ia3.inference.watching import within_limits

_logger = logging.getLogger(__name__)

Turns = Sequence[tuple[str, str]]


def complete(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    system: str | None = None,
    turns: Sequence[Turns] | None = None,
    max_length: int = 128,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    generate: Generate | None = None,
    beat: Beat | None = None,
    adapter_names: Sequence[str] | None = None,
) -> list[str]:
    """Answer each text greedily, as an assistant where the tokenizer has a chat template.

    Args:
        model: a causal model, with or without an adapter; left in evaluation mode.
        tokenizer: the base model's tokenizer.
        texts: the user's messages; without a chat template, the texts to go on from.
        system: the system message before each conversation that has none of its own.
        turns: the earlier messages of each text as (role, content).
        max_length: the longest prompt in tokens, the template's included. Of a longer one the earliest turns are
            left out, then the beginning of the text.
        max_new_tokens: the longest answer in tokens; where the model's positions end before, the answer does, too, and
            a warning counts the prompts.
        batch_size, beat, adapter_names: as in `predict`.
        generate: what `compile_answers` made for the model and `max_new_tokens`, to use it again; made here otherwise.

    Returns:
        One answer a text, in the order of `texts`, special tokens and outer spaces removed.

    Raises:
        ValueError: a chat template that refuses the messages, none where there is a system message or a turn, a
            prompt that no cut makes short enough, or one that leaves no room for any answer in the model.
    """
    turns = [()] * len(texts) if turns is None else turns
    if len(turns) != len(texts):
        raise ValueError(f"There are {len(turns)} lists of earlier turns for {len(texts)} texts: expected one a text.")
    conversations = [(text, own, system) for text, own in zip(texts, turns, strict=True)]
    prompts = encode(tokenizer, [prompt_text(tokenizer, *each) for each in conversations])
    prompts = [
        prompt if len(prompt) <= max_length else cut_prompt(tokenizer, *each, room=max_length)
        for prompt, each in zip(prompts, conversations, strict=True)
    ]
    check_positions(model, max(map(len, prompts), default=0) + 1)
    model.eval()
    lengths = [len(prompt) for prompt in prompts]
    short = sum(_room(model, length, max_new_tokens) < max_new_tokens for length in lengths)
    if short:
        said = "%d of %d prompts leave less room than %d tokens in the model, so answers may be cut: lower max_length."
        _logger.warning(said, short, len(prompts), max_new_tokens)
    made = generate or compile_answers(model, tokenizer, max_new_tokens)

    def answer(indices: list[int]) -> list[str]:
        own, names = [prompts[i] for i in indices], names_of(adapter_names, indices)
        return write(model, tokenizer, own, max_new_tokens, made, names)

    return answer_in_batches(prompt_batches(model, lengths, max_new_tokens, batch_size), answer, beat)


def prompt_text(tokenizer: Any, text: str, turns: Turns = (), system: str | None = None) -> str:
    """What the model reads before it answers: the chat template around the messages, or the text as it is.

    Raises:
        ValueError: the template refuses the messages, or there are other messages than the text and no template.
    """
    if has_template(tokenizer):
        return render(tokenizer, messages(text, turns, system), answering=True)
    if turns or system is not None:
        raise ValueError(
            "The tokenizer has no chat template, so there is no form for a system message or earlier turns: take a "
            "model that was tuned for chats, set tokenizer.chat_template, or write them into the text."
        )
    return text


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def without_template(tokenizer: Any) -> Any:
    """The tokenizer without its chat template, for plain texts; it stays as it is itself."""
    if not has_template(tokenizer):
        return tokenizer
    plain = copy(tokenizer)
    plain.chat_template = None
    return plain


def messages(text: str, turns: Turns = (), system: str | None = None) -> list[dict[str, str]]:
    """The conversation up to the user's text; a system message among the turns stands instead of `system`."""
    if system is not None and not any(role == "system" for role, _ in turns):
        turns = [("system", system), *turns]
    return [{"role": role, "content": content} for role, content in [*turns, ("user", text)]]


def render(tokenizer: Any, conversation: Sequence[dict[str, str]], *, answering: bool) -> str:
    """A conversation as the chat template writes it.

    Args:
        tokenizer: with a chat template.
        conversation: messages with `role` and `content`.
        answering: end where the assistant's answer begins.

    Raises:
        ValueError: the template refuses the messages, or comes to no end.
    """
    from jinja2 import TemplateError

    try:
        # Templates of models that can reason aloud then write the empty reasoning that they were trained with.
        with within_limits("The tokenizer's chat template"):
            text: str = tokenizer.apply_chat_template(
                list(conversation), tokenize=False, add_generation_prompt=answering, enable_thinking=False
            )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in conversation)
        raise ValueError(
            f"The tokenizer's chat template refuses a conversation of the roles {roles}: {error}. Leave out what it "
            "doesn't take (often the system message), or set another tokenizer.chat_template."
        ) from error
    return text


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of rendered prompts; a chat template writes its special tokens itself.

    Raises:
        ValueError: a text without a token.
    """
    if not texts:
        return []
    # Before plain text stands the tokenizer's first token, where it has one.
    first = [] if has_template(tokenizer) else tokenizer("")["input_ids"][:1]
    head = [token for token in first if token == tokenizer.bos_token_id]
    rows = [[*head, *ids] for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise ValueError(f"The text {shorten(text)} has no tokens, so there is nothing to go on from: remove it.")
    return rows


def cut_prompt(tokenizer: Any, text: str, turns: Turns = (), system: str | None = None, *, room: int) -> list[int]:
    """A prompt's tokens, made to fit: what stands furthest from the answer goes first.

    The template around the messages stays whole, and so does the system message. The earliest turns go, a
    question with its answer; where none is left, the beginning of the text.

    Args:
        tokenizer: the base model's tokenizer.
        text: the user's message, or plain text.
        turns: the messages before it.
        system: the system message.
        room: the most tokens.

    Raises:
        ValueError: not even one token of the text fits.
    """
    prompt = _tokens(tokenizer, text, turns, system)
    while len(prompt) > room and (fewer := _without_oldest(turns)) is not None:
        turns = fewer
        prompt = _tokens(tokenizer, text, turns, system)
    words = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    while len(prompt) > room:
        words = words[len(prompt) - room :]
        if not words:
            raise ValueError(
                f"A prompt can't be cut to {room} tokens, since what stands around its text takes as many: raise "
                f"the length, or shorten the system message or the template. The text begins {text[:60]!r}."
            )
        # A cut within a character leaves bytes that are none.
        rest = tokenizer.decode(words, clean_up_tokenization_spaces=False).lstrip("\ufffd")
        prompt = _tokens(tokenizer, rest, turns, system) if rest else prompt
    return prompt


def _tokens(tokenizer: Any, text: str, turns: Turns, system: str | None) -> list[int]:
    return encode(tokenizer, [prompt_text(tokenizer, text, turns, system)])[0]


def _without_oldest(turns: Turns) -> list[tuple[str, str]] | None:
    """The turns without the first message of the user and what follows up to the next; None where it is the last."""
    asked = [place for place, (role, _) in enumerate(turns) if role != "system"]
    if not asked:
        return None
    following = [place for place in asked[1:] if turns[place][0] == "user"]
    kept = turns[following[0] :] if following else ()
    return [*turns[: asked[0]], *kept]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, the tokenizer's own first.

    Raises:
        ValueError: there are none.
    """
    known = getattr(model.generation_config, "eos_token_id", None)
    known = known if isinstance(known, list) else [known]
    ends = [token for token in dict.fromkeys([tokenizer.eos_token_id, *known]) if token is not None]
    if not ends:
        raise ValueError(
            "Neither the tokenizer nor the model's generation configuration names an end token, so no answer would "
            "end: set tokenizer.eos_token."
        )
    return ends


def prompt_batches(model: Any, lengths: Sequence[int], max_new_tokens: int, batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts in sorted batches, the answers of each with the same room in the model.

    So no answer ends sooner because its neighbour's prompt is longer.
    """
    rooms = [_room(model, length, max_new_tokens) for length in lengths]
    for indices in sorted_batches(lengths, batch_size):
        for room in dict.fromkeys(rooms[i] for i in indices):
            yield [i for i in indices if rooms[i] == room]


def _room(model: Any, length: int, max_new_tokens: int) -> int:
    """How many tokens the answer to a prompt may have."""
    limit = most_positions(model)
    return max_new_tokens if limit is None else min(max_new_tokens, limit - length)


def check_positions(model: Any, longest: int) -> None:
    """Refuse sequences that are longer than the model can read.

    Raises:
        ValueError: there are more tokens than the model has positions.
    """
    limit = most_positions(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"The longest prompt takes {longest} tokens with its answer, and the model reads {limit}: lower max_length."
        )


def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    generate: Generate,
    adapter_names: list[str] | None = None,
) -> list[str]:
    """Answer one batch of prompts greedily, in training's evaluations and after.

    Args:
        model: a causal model.
        tokenizer: the base model's tokenizer; one without a padding token stays without.
        prompts: the tokens of each, one of `prompt_batches`.
        max_new_tokens: the longest answer; one that the model has fewer positions for ends with them.
        generate: what `compile_answers` made for the model and `max_new_tokens`.
        adapter_names: the adapter of each prompt; the active ones where left out.

    Returns:
        The answers without special tokens and outer spaces.
    """
    room = _room(model, max(map(len, prompts)), max_new_tokens)
    ends = end_tokens(model, tokenizer)
    batch = pad_rows(prompts, _padding(tokenizer, ends), left=True)
    tokens = generate(batch["input_ids"], batch["attention_mask"], adapter_names=adapter_names, max_new_tokens=room)
    answers = [_up_to_end(row, ends) for row in tokens[:, batch["input_ids"].shape[1] :].tolist()]
    return [answer.strip() for answer in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def compile_answers(model: Any, tokenizer: Any, max_new_tokens: int) -> Generate:
    """What generates a model's answers greedily; see `compile_generate`."""
    return compile_generate(model, **_settings(model, tokenizer, max_new_tokens))


def _settings(model: Any, tokenizer: Any, max_new_tokens: int) -> dict[str, Any]:
    ends = end_tokens(model, tokenizer)
    return {
        "max_new_tokens": max_new_tokens,
        "num_beams": 1,
        "do_sample": False,
        # A model's own repetition penalty would count the padding, and so make an answer depend on its neighbours.
        "repetition_penalty": 1.0,
        "eos_token_id": ends,
        "pad_token_id": _padding(tokenizer, ends),
    }


def _padding(tokenizer: Any, ends: Sequence[int]) -> int:
    """Padding is masked, so any token will do where there is none for it."""
    return ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """What stands before the first end token; what follows is padding."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
