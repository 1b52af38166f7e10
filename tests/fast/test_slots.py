"""Slots: whoever comes when, each request gets the tokens that it gets alone."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import builders
from described import FORMS, described
from ia3 import IA3Config, get_peft_model
from ia3.fast.generate import compile_generate
from ia3.fast.sessions import AHEAD, Watch
from ia3.fast.slots import Slots
from ia3.mixing import gather_flat
from ia3.rows import BASE
from ia3.sites import Layout
from replayed import recording

ENDS, NEW, SOURCE = [1, 5, 9], 8, 20
NAMES = ["a", "b", "default", BASE]
CUDA = torch.cuda.is_available()
HAS_KERNELS = importlib.util.find_spec("triton") is not None and (CUDA or os.environ.get("TRITON_INTERPRET") == "1")
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no GPU with Triton, nor Triton with TRITON_INTERPRET=1")
on_gpu = pytest.mark.skipif(not CUDA, reason="there is no GPU")
WRITES = [form for form, (_, task, _) in FORMS.items() if task == "SEQ_2_SEQ_LM"]
SETTINGS: dict[str, Any] = {
    **{"eos_token_id": ENDS, "forced_eos_token_id": None, "min_length": 0, "num_beams": 1, "do_sample": False},
    **{"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bos_token_id": 1, "pad_token_id": 0},
}


def mixed(form: str, dtype: torch.dtype = torch.float32, *, everywhere: bool = False) -> Any:
    """A model with three adapters, whose answers differ and end at different lengths."""
    scaled = {"scale_embedding": False} if form == "plbart" else {}  # with it PLBart repeats itself
    model = described(form, dtype, everywhere=everywhere, **scaled).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and ".ia3_l." not in name:
                parameter.mul_(3)
    for name in ("a", "b"):
        model.add_adapter(name, IA3Config(task_type="SEQ_2_SEQ_LM"))
    builders.randomise(model, spread=1.0)
    return model


@dataclass
class Request:
    """What somebody asks for, and what was written."""

    row: list[int]
    name: str
    most: int
    least: int
    tokens: list[int] = field(default_factory=list)


def requests(count: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(
            [draw.randrange(10, 64) for _ in range(draw.choice((1, 2, 5, 11, SOURCE)))],
            draw.choice(NAMES),
            draw.choice((1, 3, NEW, NEW)),
            draw.choice((0, 0, 2)),
        )
        for _ in range(count)
    ]


def alone(model: Any, request: Request, **settings: Any) -> list[int]:
    """The tokens of the request by itself, without what the decoder starts with."""
    least = {"min_new_tokens": min(request.least, request.most)} if request.least else {}
    generate = compile_generate(model, **{**SETTINGS, **settings, **least, "max_new_tokens": request.most})
    ids = torch.tensor([request.row])
    tokens: list[int] = generate(ids, torch.ones_like(ids), adapter_names=[request.name])[0, 1:].tolist()
    return tokens


def made(model: Any, count: int = 4, **settings: Any) -> Slots:
    layout, _ = gather_flat(model, NAMES)
    return Slots(model, count, SOURCE, NEW, layout, **{**SETTINGS, **settings})


def let_in(slots: Slots, free: Sequence[int], coming: Sequence[Request]) -> dict[int, Request]:
    layout, flat = gather_flat(slots.model, [request.name for request in coming])
    most, least = [request.most for request in coming], [request.least for request in coming]
    slots.admit(free, [request.row for request in coming], layout, flat, most, least)
    return dict(zip(free, coming, strict=True))


def serve(slots: Slots, coming: Sequence[Request], seed: int = 0) -> None:
    """Let requests in at random moments, into random slots, and several at once, until all are written."""
    draw, waiting, inside = random.Random(seed), list(coming), dict[int, Request]()
    while waiting or inside:
        free = draw.sample(slots.free, draw.randint(0, len(slots.free)))[: len(waiting)]
        inside |= let_in(slots, free, waiting[: len(free)])
        waiting = waiting[len(free) :]
        assert set(slots.free) == set(range(slots.count)) - set(inside)
        for slot in slots.step():
            inside.pop(slot).tokens = slots.tokens(slot)


@pytest.mark.parametrize(
    ("form", "everywhere"), [*((form, False) for form in WRITES), ("flan-t5", True), ("bart", True)]
)
def test_the_tokens_of_each_request_alone(form: str, everywhere: bool) -> None:
    model = mixed(form, everywhere=everywhere)
    slots, coming = made(model), requests(24, seed=1)
    serve(slots, coming)
    for request in coming:
        assert request.tokens == alone(model, request)
    assert len({tuple(request.tokens) for request in coming}) > 5
    assert {len(request.tokens) for request in coming} >= {1, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_any_order_and_company(dtype: torch.dtype, count: int) -> None:
    model = mixed("flan-t5", dtype)
    slots, found = made(model, count), []
    for seed in range(3):
        coming = requests(20, seed=2)
        order = random.Random(seed).sample(coming, len(coming))
        serve(slots, order, seed)
        found.append([request.tokens for request in coming])
    assert found[0] == found[1] == found[2] == [alone(model, request) for request in coming]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["mt5", "bart"])
def test_replays_of_what_was_recorded(form: str, dtype: torch.dtype) -> None:
    model, coming = mixed(form, dtype), requests(40, seed=3)
    with recording() as recorded:
        slots = made(model)
        serve(slots, coming)
    for request in coming:
        assert request.tokens == alone(model, request)
    assert recorded.count(slots.stepping) == 1  # whoever is inside
    assert recorded.count(slots.reading) > 1


@needs_kernels
def test_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ia3.fast.fused.backend_for", lambda *_: "triton")
    model = mixed("flan-t5").to("cuda" if CUDA else "cpu")
    slots, coming = made(model, 3, forced_eos_token_id=1), requests(8, seed=4)
    assert slots.backend == "triton"
    serve(slots, coming)
    for request in coming:
        assert request.tokens == alone(model, request, forced_eos_token_id=1)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    model, coming = mixed("flan-t5", dtype).cuda(), requests(60, seed=5)
    serve(made(model, 5), coming)
    for request in coming:
        assert request.tokens == alone(model, request)


@contextmanager
def seen_late() -> Iterator[None]:
    """As on a GPU, what a step leaves is seen when others are under way."""

    def sees(self: Watch, left: torch.Tensor) -> torch.Tensor | None:
        self.pending.append((left.clone(), None))  # type: ignore[arg-type]
        return None if len(self.pending) <= AHEAD else self.pending.popleft()[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "sees", sees)
        yield


def test_an_end_that_is_seen_late_is_not_the_next_requests() -> None:
    model, coming = mixed("flan-t5"), requests(40, seed=6)
    with seen_late(), recording():
        slots = made(model)
        serve(slots, coming)
        (slot,) = let_in(slots, [2], [Request([12, 13], "a", NEW, NEW)])
        slots.step()
        slots.stop([slot])
        let_in(slots, [slot], [last := Request([30] * 5, "b", NEW, 2)])
        while not slots.step():
            pass
    for request in coming:
        assert request.tokens == alone(model, request)
    assert slots.tokens(slot) == alone(model, last)


@pytest.mark.parametrize("ends", [None, 3, ENDS])
@pytest.mark.parametrize("more", [{"forced_eos_token_id": 3}, {"min_length": 5}, {"min_new_tokens": 3}], ids=str)
def test_settings(ends: Any, more: dict[str, Any]) -> None:
    model, settings = mixed("t5"), {"eos_token_id": ends, **more}
    coming = [Request(request.row, request.name, NEW, 0) for request in requests(8, seed=7)]
    slots = made(model, 3, **settings)
    layout, flat = gather_flat(model, [request.name for request in coming])
    for begin in range(0, 8, 3):
        free = slots.free[: len(coming[begin : begin + 3])]
        slots.admit(free, [request.row for request in coming[begin : begin + 3]], layout, flat[begin : begin + 3])
        while slots.lengths:
            for slot in slots.step():
                assert slots.tokens(slot) == alone(model, coming[begin + slot], **settings)


def test_tokens_are_seen_as_they_come() -> None:
    model = mixed("flan-t5")
    slots, request = made(model), Request([20, 21, 22], "a", NEW, NEW)
    let_in(slots, [3], [request])
    assert slots.tokens(3) == []
    wanted = alone(model, request)
    for count in range(1, NEW + 1):
        assert slots.step() == ([3] if count == NEW else [])
        assert slots.tokens(3) == wanted[:count]
    assert slots.step() == []
    assert slots.free == [0, 1, 2, 3]
    assert slots.tokens(3) == wanted  # until it is lent again
    let_in(slots, [3], [request])
    assert slots.tokens(3) == []


def test_who_is_stopped_disturbs_nobody() -> None:
    model = mixed("flan-t5")
    slots, coming = made(model), [Request([20 + i] * (i + 1), NAMES[i], NEW, 4) for i in range(4)]
    let_in(slots, [0, 1, 2, 3], coming)
    slots.step()
    slots.stop([1, 2])
    assert slots.free == [1, 2]
    assert slots.answers.ended.tolist() == [False, True, True, False, True]  # and one to fill up with
    let_in(slots, [1], [late := Request([50] * 9, "b", NEW, 2)])
    while slots.lengths:
        slots.step()
    for slot, request in ((0, coming[0]), (1, late), (3, coming[3])):
        assert slots.tokens(slot) == alone(model, request)


def test_no_number_stays_behind() -> None:
    """An adapter of infinities spoils its own request, not the next in its slot nor those beside it."""
    model = mixed("flan-t5")
    slots = made(model, 2)
    beside, after = Request([20] * 7, "b", NEW, NEW), Request([30] * 2, "a", NEW, 2)
    let_in(slots, [1], [beside])
    layout, flat = gather_flat(model, ["a"])
    slots.admit([0], [[40] * SOURCE], layout, flat * torch.inf, [4])
    while 0 in slots.lengths:
        slots.step()
    let_in(slots, [0], [after])
    while slots.lengths:
        slots.step()
    assert slots.tokens(0) == alone(model, after)
    assert slots.tokens(1) == alone(model, beside)


def test_a_cpu_computes_up_to_the_last_live_slot() -> None:
    slots = made(mixed("flan-t5"), 8)
    reaches, write = [], slots.stepping.function

    def watched(*reach: int) -> torch.Tensor:
        reaches.append(reach)
        return write(*reach)

    slots.stepping.function = watched
    let_in(slots, [0], [Request([20, 21], "a", 2, 2)])
    slots.step()
    let_in(slots, [5], [Request([20] * 9, "a", 3, 3)])
    while slots.lengths:
        slots.step()
    assert reaches == [(1, 16, 2), (6, 16, 9), (6, 16, 9), (6, 16, 9)]
    assert slots.step() == []
    assert len(reaches) == 4


def test_an_adapter_of_few_sites_has_ones_at_the_others() -> None:
    model = mixed("flan-t5")
    few = IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["v"], feedforward_modules=[])
    model.add_adapter("few", few)
    builders.randomise(model, spread=1.0)
    slots, row = made(model), [20, 21, 22, 23]
    found = []
    for name in ("few", "a", BASE, "few"):
        (slot,) = let_in(slots, [0], [request := Request(row, name, NEW, 2)])
        assert (gather_flat(model, [name])[0] == slots.layout) == (name == "a")
        while slots.lengths:
            slots.step()
        found.append(slots.tokens(slot))
        assert found[-1] == alone(model, request)
    assert found[0] == found[3]
    assert len(set(map(tuple, found))) == 3


def test_what_is_refused_changes_nothing() -> None:
    model = mixed("flan-t5")
    slots = made(model)
    layout, flat = gather_flat(model, ["a"])
    slots.admit([], [], layout, flat[:0])
    slots.admit([1], [[20, 21]], layout, flat)
    for given, message in (
        (([0, 2], [[20]], layout, flat), "There are 2 slots, 1 inputs, 1 rows of vectors"),
        (([0], [[20]], layout, flat, [1, 1]), "limits for 2 and 1: pass one of each"),
        (([4], [[20]], layout, flat), "There is no slot 4: these are 0 to 3"),
        (([-1], [[20]], layout, flat), "There is no slot -1"),
        (([1], [[20]], layout, flat), "Slot 1 is not free"),
        (([2, 2], [[20], [21]], layout, flat.repeat(2, 1)), "Slot 2 is not free, or named twice"),
        (([0], [[]], layout, flat), "An input has 0 tokens: these slots take from 1 to 20"),
        (([0], [[20] * 21], layout, flat), "An input has 21 tokens"),
        (([0], [[20]], layout, flat, [9]), "max_new is 9: these slots write from 1 to 8"),
        (([0], [[20]], layout, flat, [0]), "max_new is 0"),
        (([0], [[20]], layout, flat[:, 1:]), "Expected a last dimension"),
    ):
        with pytest.raises(ValueError, match=message):
            slots.admit(*given)
    assert slots.free == [0, 2, 3]
    with pytest.raises(ValueError, match="There is no slot 7"):
        slots.tokens(7)
    narrow = Slots(model, 1, SOURCE, NEW, Layout(layout.sites[1:]), **SETTINGS)
    with pytest.raises(ValueError, match=f"There are vectors at {layout.sites[0].path}, and these slots have no place"):
        narrow.admit([0], [[20]], layout, flat)


def test_slots_do_not_compute_in_the_precision_of_autocast() -> None:
    slots, coming = made(mixed("t5")), requests(2, seed=1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="Autocast is on"):
        let_in(slots, slots.free[:2], coming)
    let_in(slots, slots.free[:2], coming)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="Autocast is on"):
        slots.step()


def test_a_model_that_has_changed_needs_new_slots() -> None:
    model = mixed("flan-t5")
    slots = made(model)
    assert slots.is_valid()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert not slots.is_valid()
    with pytest.raises(RuntimeError, match="The model has changed since these slots were made"):
        let_in(slots, [0], [Request([20], "a", 1, 0)])


def test_another_generation_configuration_needs_new_slots() -> None:
    model = mixed("t5")
    slots = made(model)
    assert slots.is_valid()
    model.generation_config.suppress_tokens = [3]
    assert not slots.is_valid()


def test_models_and_sizes_without_slots(tiny: Any) -> None:
    nothing = Layout(())
    for model, sizes, settings, message in (
        (tiny("llama"), (1, 1, 1), {}, "a LlamaForCausalLM is no encoder-decoder"),
        (tiny("t5").train(), (1, 1, 1), {}, "the model is in training mode"),
        (tiny("t5"), (0, 1, 1), {}, "slots is 0: it must be at least 1"),
        (tiny("t5"), (1, 1, 0), {}, "max_new_tokens is 0"),
        (tiny("t5"), (1, 1, 1), {"num_beams": 2}, "num_beams is 2"),
        (described("bart").eval(), (1, 33, 1), SETTINGS, r"max_source is 33, and its .* has 32 positions"),
        (described("bart").eval(), (1, 1, 33), SETTINGS, r"max_new_tokens is 33, and its .* has 32 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            Slots(model, *sizes, nothing, **settings)


def test_a_table_of_adapters(tiny: Any, tmp_path: Any) -> None:
    """As a server has them: by the table's rows, which come and go."""
    from ia3 import AdapterTable

    paths = {}
    for seed, name in enumerate(("news", "sports")):
        model = get_peft_model(tiny("t5-gated"), IA3Config(task_type="SEQ_2_SEQ_LM"))
        builders.randomise(model, seed, spread=1.0)
        model.save_pretrained(tmp_path / name)
        paths[name] = tmp_path / name
    base = tiny("t5-gated")
    table = AdapterTable(base)
    table.register("news", paths["news"])
    slots = Slots(base, 2, SOURCE, NEW, table.layout, **SETTINGS)
    first, second = Request([20, 21, 22], "news", NEW, NEW), Request([20, 21, 22], "sports", NEW, NEW)
    let_in(slots, [0], [first])
    slots.step()
    table.register("sports", paths["sports"])
    assert slots.is_valid()
    let_in(slots, [1], [second])
    while slots.lengths:
        slots.step()
    assert [slots.tokens(0), slots.tokens(1)] == [alone(base, first), alone(base, second)]
    assert slots.tokens(0) != slots.tokens(1)


def with_decoders_own(model: Any) -> Any:
    """Two more adapters, whose vectors act in the decoder alone."""
    for name in ("c", "d"):
        keys_and_values = r".*decoder\.block.*\.(k|v)"
        model.add_adapter(
            name,
            IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=keys_and_values, feedforward_modules=[]),
        )
    builders.randomise(model, spread=1.0)
    return model


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_text_is_encoded_once_for_those_who_see_it_alike(recorded: bool, invariant: bool) -> None:
    model = with_decoders_own(mixed("flan-t5"))
    layout, _ = gather_flat(model, [*NAMES, "c", "d"])
    text, other = [20, 21, 22, 23, 24], [30] * 11
    coming = [
        Request(row, name, NEW, 3)
        for row, name in [(text, "c"), (text, "d"), (text, "a"), (other, "c"), (text, BASE), (text, "b"), (text, "a")]
    ]
    with recording() if recorded else nullcontext():
        slots, encoded = Slots(model, 9, SOURCE, NEW, layout, invariant=invariant, **SETTINGS), 0
        read = slots.fused.read_source

        def count(run: Any, packed: Any, source: Any) -> torch.Tensor:
            nonlocal encoded
            encoded += int((packed["cu_seqlens"].diff() > 0).sum()) if not recorded else 0
            return read(run, packed, source)

        slots.fused.read_source = count  # type: ignore[method-assign]
        for turn in range(3 if recorded else 1):
            let_in(slots, list(range(turn, turn + len(coming))), coming)
            while slots.lengths:
                slots.step()
            for slot, request in enumerate(coming, turn):
                assert slots.tokens(slot) == alone(model, request)
    assert len({tuple(slots.tokens(slot)) for slot in range(2, 9)}) > 4
    # The base, c and d see the text alike, and so do both of a.
    assert recorded or encoded == 4


def logits_of(slots: Slots, coming: Sequence[Request], seed: int) -> list[torch.Tensor]:
    """Of each request those behind each of its tokens, in an order and a company of the seed's."""
    draw, order, inside = random.Random(seed), list(range(len(coming))), dict[int, int]()
    found: list[list[torch.Tensor]] = [[] for _ in coming]
    last: list[torch.Tensor] = []
    compute = slots.decoding.logits_behind

    def note(*given: Any) -> torch.Tensor:
        last[:] = [compute(*given)]
        return last[0]

    slots.decoding.logits_behind = note  # type: ignore[method-assign]
    draw.shuffle(order)
    while order or inside:
        free = draw.sample(slots.free, draw.randint(0, len(slots.free)))[: len(order)]
        let_in(slots, free, [coming[index] for index in order[: len(free)]])
        inside |= zip(free, order, strict=False)
        order = order[len(free) :]
        ended = slots.step()
        for slot, index in inside.items():
            found[index].append(last[0][slot].clone())
        for slot in ended:
            del inside[slot]
    return [torch.stack(each) for each in found]


@pytest.mark.parametrize("form", ["flan-t5", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_invariant_slots_compute_the_same_numbers_in_any_company(form: str, dtype: torch.dtype) -> None:
    model, coming = mixed(form, dtype), requests(24, seed=8)
    equal = []
    for invariant in (True, False):
        first, *others = (logits_of(made(model, 5, invariant=invariant), coming, seed) for seed in range(3))
        pairs = [pair for other in others for pair in zip(first, other, strict=True)]
        equal.append([torch.equal(*pair) for pair in pairs])
    assert all(equal[0])
    assert not all(equal[1])
