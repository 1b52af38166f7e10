"""With `batch_invariant` an answer is the same to the last bit, alone and in any company."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet import CAUSAL, QUESTIONS, TASKS, TEXTS, serving

from ia3.serving.engine import Engine
from ia3.serving.requests import Request

Asked = list[tuple[str, str]]


def asked_of(names: list[str], texts: list[str], count: int) -> Asked:
    """Requests of many lengths."""
    draw = random.Random(1)
    return [(draw.choice(names), " ".join(draw.choices(texts, k=draw.choice((1, 1, 2, 3, 9))))) for _ in range(count)]


def answers(engine: Engine, asked: Asked, seed: int | None) -> list[Any]:
    """What is answered to each: alone where there is no seed, else in batches of any size and order."""
    draw, order, found = random.Random(seed), list(range(len(asked))), {}
    if seed is not None:
        draw.shuffle(order)
    while order:
        count = 1 if seed is None else draw.randint(1, 16)
        futures = {index: engine.submit(Request(asked[index][1], asked[index][0])) for index in order[:count]}
        for index, future in futures.items():
            answer = future.result(60)
            found[index] = (answer.text, answer.completion_tokens, answer.finish_reason, answer.probabilities)
        order = order[count:]
    return [found[index] for index in range(len(asked))]


def differing(folder: Path, asked: Asked, **how: Any) -> int:
    """How many of the requests are answered otherwise in some company."""
    with serving(folder, batch_size=6, gather_s=0.005, **how) as engine:
        alone = answers(engine, asked, None)
        others = [answers(engine, asked, seed) for seed in range(2)]
    assert len({each[0] for each in alone}) > 3
    return sum(any(other[index] != alone[index] for other in others) for index in range(len(asked)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_decoder(fleet: Path, dtype: torch.dtype) -> None:
    asked = asked_of(list(TASKS), TEXTS, 40)
    assert differing(fleet, asked, dtype=dtype, batch_invariant=True) == 0
    assert differing(fleet, asked[:16], dtype=dtype) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_model(chats: Path, dtype: torch.dtype) -> None:
    """Whose own numbers nobody sees: that its shapes are fixed is seen at what it is called with."""
    asked = asked_of(list(CAUSAL), QUESTIONS, 40)
    with serving(chats, causal=True, dtype=dtype, batch_size=6, batch_invariant=True) as engine:
        shapes, generate = set[tuple[int, ...]](), engine._answer.model.generate

        def note(**given: Any) -> Any:
            mask = given["attention_mask"]
            assert not mask[:, 0].any()  # a batch without padding has other kernels
            shapes.add(tuple(given["input_ids"].shape))
            return generate(**given)

        engine._answer.model.generate = note
        alone = answers(engine, asked, None)
        assert all(answers(engine, asked, seed) == alone for seed in range(2))
    assert shapes <= {(8, 16), (8, 64), (8, 128)}
    assert len(shapes) > 1
