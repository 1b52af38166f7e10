"""The ranks' slices are the whole vector again, however many ranks there are, without a second device."""

from __future__ import annotations

import pytest
import torch

from ia3_vllm.slices import Shard, even, grouped_heads, joined

HEADS, KEY_HEADS, SIZE, VALUE_SIZE = 8, 4, 6, 5


def projected(ranks, rank, vectors, hidden):
    """A rank's rows of the fused projection, scaled: its query heads, then its keys, then its values."""
    own_heads, own_keys = HEADS // ranks, max(1, KEY_HEADS // ranks)
    first = rank // max(1, ranks // KEY_HEADS) * own_keys
    queries = hidden["q"].view(HEADS, SIZE)[rank * own_heads :][:own_heads]
    keys = hidden["k"].view(KEY_HEADS, SIZE)[first:][:own_keys]
    values = hidden["v"].view(KEY_HEADS, VALUE_SIZE)[first:][:own_keys]
    local = torch.cat([part.reshape(-1) for part in (queries, keys, values)])
    return local * joined(vectors, grouped_heads(HEADS, KEY_HEADS, SIZE, VALUE_SIZE, ranks, rank))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("absent", [(), ("q",), ("q", "v")])
def test_grouped_heads_of_all_ranks_are_those_of_one(ranks, absent):
    widths = {"q": HEADS * SIZE, "k": KEY_HEADS * SIZE, "v": KEY_HEADS * VALUE_SIZE}
    hidden = {name: torch.randn(width) for name, width in widths.items()}
    vectors = {name: None if name in absent else torch.randn(width) for name, width in widths.items()}
    whole = {name: hidden[name] * (1 if vectors[name] is None else vectors[name]) for name in widths}
    for rank in range(ranks):
        local = projected(ranks, rank, list(vectors.values()), hidden)
        expected = projected(ranks, rank, [None] * 3, whole)
        assert torch.equal(local, expected)


def test_query_heads_of_the_ranks_meet_their_own_keys():
    for ranks in (1, 2, 4, 8):
        for rank in range(ranks):
            queries, keys, _ = grouped_heads(HEADS, KEY_HEADS, SIZE, VALUE_SIZE, ranks, rank)
            group = HEADS // KEY_HEADS
            first_query = queries.place * queries.width // SIZE
            assert first_query // group == keys.place * keys.width // SIZE


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_products_summed_over_the_ranks_of_a_row_parallel_layer_are_the_whole_ones(ranks):
    weight, x, vector = torch.randn(7, 12).double(), torch.randn(5, 12).double(), torch.randn(12).double()
    total = torch.zeros(5, 7).double()
    for rank in range(ranks):
        shard = even(12, ranks, rank)
        total += (shard.of(x.T).T * shard.of(vector)) @ shard.of(weight.T)
    assert torch.allclose(total, (x * vector) @ weight.T)


@pytest.mark.parametrize("ranks", [1, 2])
def test_halves_of_a_gated_projection_keep_their_halves(ranks):
    gate, up = torch.randn(8), torch.randn(8)
    for rank in range(ranks):
        shards = (even(8, ranks, rank), even(8, ranks, rank))
        own = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        assert torch.equal(joined([gate, up], shards), torch.cat([gate[own], up[own]]))
        assert torch.equal(joined([None, up], shards), torch.cat([torch.ones(8 // ranks), up[own]]))


def test_vectors_for_another_number_of_projections_are_an_error():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        joined([torch.ones(4)], [Shard(4, 4), Shard(4, 4)])
