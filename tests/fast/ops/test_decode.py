"""One new token's attention: the kernel and its plain twin beside the formula, example by example."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import DEVICE, NARROW, draw, near, needs_kernels, vector

from ia3.fast.ops.decode import Scores, Source, attend_across, attend_to_cache
from ia3.fast.ops.norm import Norm
from ia3.fast.ops.rotary import rotated
from ia3.fast.ragged import Ragged

BACKENDS = ["torch", pytest.param("triton", marks=needs_kernels)]
MOST = 70
PLACES = [0, 1, 15, 16, 64, 69]


def case(heads: int, kv_heads: int, dim: int, which: str, groups: int, turned: int, **scores: Any) -> dict[str, Any]:
    """Inputs in float64; `turned` channels of a head rotate."""
    count = len(PLACES)
    bias = draw(heads, MOST) if scores.pop("biased", False) else None
    normed = {None: (), "each": (dim, dim), "all": (heads * dim, kv_heads * dim)}[scores.pop("normed", None)]
    norms = tuple(Norm(draw(width), None, 1e-3, centred=False) for width in normed)
    return {
        "qkv": draw(count, (heads + 2 * kv_heads) * dim),
        "cache": draw(2, count, kv_heads, MOST, dim),
        "place": torch.tensor(PLACES, device=DEVICE),
        "l_k": vector(1, groups, kv_heads * dim) if "k" in which else None,
        "l_v": vector(1, groups, kv_heads * dim) if "v" in which else None,
        "ragged": Ragged.even(count, 1, groups, torch.device(DEVICE)),
        "heads": heads,
        "scores": Scores(0.3, bias=bias, **scores),
        "qk_norm": norms or None,
        "angles": (draw(MOST, turned // 2), draw(MOST, turned // 2)) if turned else None,
    }


def formula(
    qkv: Tensor, cache: Tensor, place: Tensor, l_k: Any, l_v: Any, ragged: Ragged, heads: int, scores: Scores,
    angles: Any, qk_norm: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What is returned, and the cache behind it."""
    _, examples, kv_heads, _, dim = cache.shape
    cache, out = cache.clone(), []
    for e, at in enumerate(place.tolist()):
        group = e // (examples // ragged.groups)
        q, k, v = qkv[e].split([heads * dim, kv_heads * dim, kv_heads * dim])
        k, v = k if l_k is None else k * l_k[0, group], v if l_v is None else v * l_v[0, group]
        if qk_norm is not None:
            q, k = (norm(x.view(-1, len(norm.weight))) for norm, x in zip(qk_norm, (q, k), strict=True))
        q, k, v = (x.view(-1, dim) for x in (q, k, v))
        if angles is not None:
            q, k = (rotated(x, angles[0][at], angles[1][at]) for x in (q, k))
        cache[0, e, :, at], cache[1, e, :, at] = k, v
        first = 0 if scores.window is None else max(0, at + 1 - scores.window)
        for head in range(heads):
            keys, values = cache[:, e, head // (heads // kv_heads), first : at + 1]
            found = keys @ q[head] * scores.scale
            if scores.softcap is not None:
                found = scores.softcap * torch.tanh(found / scores.softcap)
            if scores.bias is not None:
                found = found + scores.bias[head, : at + 1 - first].flip(0)
            out.append(found.softmax(0) @ values)
    return torch.stack(out).view(examples, -1), cache


def to(dtype: torch.dtype, given: dict[str, Any]) -> dict[str, Any]:
    """The inputs in a dtype; vectors and angles may be wider."""
    scores, angles, norms = given["scores"], given["angles"], given["qk_norm"]
    bias = None if scores.bias is None else scores.bias.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return {
        **given,
        **{name: given[name].to(dtype) for name in ("qkv", "cache")},
        **{name: None if given[name] is None else given[name].to(dtype) for name in ("l_k", "l_v")},
        "scores": Scores(scores.scale, scores.softcap, scores.window, bias),
        "qk_norm": norms and tuple(replace(norm, weight=norm.weight.to(wide)) for norm in norms),
        "angles": None if angles is None else tuple(angle.to(wide) for angle in angles),
    }


CASES = {
    "T5": ((2, 2, 8, "kv", 1, 0), {"biased": True}),
    "T5 with an adapter an example": ((2, 2, 16, "kv", 6, 0), {"biased": True}),
    "without vectors": ((2, 2, 16, "", 1, 0), {}),
    "grouped": ((6, 2, 16, "kv", 6, 16), {}),
    "grouped, values alone, two groups": ((4, 1, 32, "v", 2, 32), {}),
    "rotated in part": ((2, 2, 20, "k", 3, 12), {}),
    "each head normed": ((4, 2, 20, "kv", 3, 12), {"normed": "each"}),
    "all heads normed": ((4, 2, 16, "kv", 3, 16), {"normed": "all"}),
    "with a window": ((4, 2, 16, "k", 1, 16), {"window": 17}),
    "with a soft cap": ((4, 2, 16, "", 1, 16), {"softcap": 0.7, "window": 20}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_the_new_token_attends_to_itself_and_those_before(name: str, dtype: torch.dtype, backend: Any) -> None:
    shape, scores = CASES[name]
    given = to(dtype, case(*shape, **scores))
    wanted, cache = formula(**to(torch.float64, given))
    found = attend_to_cache(**given, backend=backend)
    near(found, wanted, dtype)
    near(given["cache"], cache, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_later_is_neither_read_nor_written(backend: Any) -> None:
    given = to(torch.float32, case(2, 1, 16, "kv", 1, 16))
    later = torch.arange(MOST, device=DEVICE) > given["place"][:, None]
    later = later[None, :, None, :, None].expand_as(given["cache"])
    given["cache"][later] = 1e30
    found = attend_to_cache(**given, backend=backend)
    assert float(found.abs().max()) < 1e3
    assert bool((given["cache"][later] == 1e30).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [8, 20, 64])
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_across(dim: int, dtype: torch.dtype, backend: Any) -> None:
    lengths, heads = [3, 0, 70, 1], 2
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    source = Source(cu_seqlens[:-1], cu_seqlens[1:], 128)
    q = draw(4, heads * dim).to(dtype)
    k, v = draw(80, 5 * heads * dim).to(dtype)[:, heads * dim : 3 * heads * dim].chunk(2, -1)
    found = attend_across(q, k, v, source, heads, 1 / math.sqrt(dim), backend)
    for e, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        keys, values = (x[begin:end].double().view(-1, heads, dim) for x in (k, v))
        weights = torch.einsum("hd,nhd->hn", q[e].double().view(heads, dim), keys).div(math.sqrt(dim)).softmax(-1)
        near(found[e], torch.einsum("hn,nhd->hd", weights, values).flatten(), dtype)
