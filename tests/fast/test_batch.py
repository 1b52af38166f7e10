"""Packed batches: the same losses with any fillers, and what can't be packed is refused."""

from __future__ import annotations

import pytest
import torch
from test_t5 import FORMS, adapted, batch_of

from ia3.fast.batch import FEW_PARTS, filled_examples, round_up
from ia3.fast.batch import pack_seq2seq as pack
from ia3.fast.fused import FusedLoss
from ia3.fast.ragged import Ragged
from ia3.state import attached


def test_tokens_without_padding() -> None:
    batch = batch_of(rows=3, source=9)
    packed = pack(batch)
    assert packed["cu_seqlens"].tolist() == [0, 9, 15, 18]
    assert packed.max_seqlen == 9
    assert torch.equal(
        packed["tokens"], torch.cat([batch["input_ids"][row, :length] for row, length in enumerate((9, 6, 3))])
    )


def test_padding_on_the_left_is_left_out_too() -> None:
    batch = batch_of(rows=3, source=9)
    left = {name: tensor if name == "labels" else tensor.flip(1) for name, tensor in batch.items()}
    right = left | {"input_ids": left["input_ids"].clone(), "attention_mask": batch["attention_mask"]}
    for row, length in enumerate((9, 6, 3)):
        right["input_ids"][row, :length] = left["input_ids"][row, 9 - length :]
    assert torch.equal(pack(left)["tokens"], pack(right)["tokens"])
    assert torch.equal(pack(left)["cu_seqlens"], pack(right)["cu_seqlens"])


@pytest.mark.parametrize("form", FORMS)
def test_rounding_up_changes_no_loss_and_no_gradient(tiny, randomise, form) -> None:
    model = adapted(tiny, randomise, form)
    adapter = attached(model).adapters["default"]
    loss_of = FusedLoss(model, adapter.layout)
    packed = pack(batch_of(rows=3, source=19, target=3))
    rounded = round_up(packed, examples=5, filler=0)
    assert (rounded.total_tokens, rounded["labels"].shape, rounded.max_seqlen) == (64, (5, 4), 64)
    table = (1 + torch.randn(1, adapter.layout.size, dtype=torch.float64) / 3).requires_grad_()
    found = [
        (loss, *torch.autograd.grad(loss.sum(), table)) for loss in (loss_of(each, table) for each in (packed, rounded))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", [[3, 1, 4], [2, 2, 2], [4, 0, 1, 3], [0, 3]])
def test_padding_and_back(lengths: list[int]) -> None:
    rows = sum(lengths) + 2
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    ragged = Ragged(starts, max_seqlen=max(lengths) + 1, total_tokens=rows, groups=len(lengths))
    x = torch.arange(rows * 2.0).view(rows, 2)
    padded = ragged.pad(x)
    for example, (start, length) in enumerate(zip(starts.tolist(), lengths, strict=False)):
        assert torch.equal(padded[example, :length], x[start : start + length])
        assert ragged.mask[example].tolist() == [place < length for place in range(max(lengths) + 1)]
    assert torch.equal(ragged.unpad(padded)[: sum(lengths)], x[: sum(lengths)])
    assert ragged.group_of_token[: sum(lengths)].tolist() == [
        e for e, length in enumerate(lengths) for _ in range(length)
    ]
    assert ragged.group_edges.tolist() == starts.tolist()


def test_few_shapes() -> None:
    sizes = set()
    for rows in range(1, 65):
        batch = batch_of(rows=1, source=rows * 37, target=1)
        sizes.add(round_up(pack(batch), 1, 0).total_tokens)
        assert round_up(pack(batch), 1, 0).total_tokens <= max(64, rows * 37 + 64, rows * 37 * 17 / 16)
    assert len(sizes) < 36


def test_examples_that_fill_up_cost_little() -> None:
    assert [filled_examples(count) for count in (1, 7, 8, 9, 100)] == [8, 8, 8, 16, 128]
    assert [filled_examples(1, tokens) for tokens in (9, 16, 33, 64, 65, 128, 700)] == [8, 8, 2, 2, 1, 1, 1]
    assert [filled_examples(3, tokens) for tokens in (9, 33, 700)] == [8, 4, 4]


def test_fewer_shapes_where_nothing_is_trained() -> None:
    sizes = set()
    for tokens in range(1, 4097, 7):
        found = round_up(pack(batch_of(rows=1, source=tokens, target=1)), 1, 0, FEW_PARTS).total_tokens
        assert tokens <= found <= max(tokens + 64, tokens * 8 / 7)
        sizes.add(found)
    assert len(sizes) == 8 + 3 * FEW_PARTS


def test_what_cannot_be_packed_is_refused() -> None:
    batch = batch_of(rows=3, source=9)
    holes = {**batch, "attention_mask": batch["attention_mask"].clone()}
    holes["attention_mask"][1, 2] = 0
    with pytest.raises(ValueError, match="example 1 hides tokens between others"):
        pack(holes)
    nothing = {**batch, "attention_mask": batch["attention_mask"].clone()}
    nothing["attention_mask"][2] = 0
    with pytest.raises(ValueError, match="Example 2 has labels, and no token"):
        pack(nothing)
    with pytest.raises(ValueError, match="and no more"):
        pack({**batch, "position_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="3 examples can't be divided into 2 equal groups"):
        pack(batch).ragged(2)
