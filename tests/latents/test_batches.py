"""Check that batches have one shape and are a pure function of (seed, epoch, rank, world, position)."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.errors import UserError
from latent_codec.latents.batches import BatchIndices, ShapeBatches
from tests.support.errors import refused

SHAPES = [(2, 3)] * 13 + [(4, 4)] * 7 + [(1, 9)]


def epoch_of(shapes: Any, size: int, world: int, epoch: int = 0, **options: bool) -> list[list[BatchIndices]]:
    """Return an epoch's batches by rank."""
    found: list[list[BatchIndices]] = []
    for rank in range(world):
        batches = ShapeBatches(shapes, size, seed=3, rank=rank, world=world, **options)
        batches.set_epoch(epoch)
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
    return found


@given(
    st.lists(st.sampled_from([(1, 1), (2, 1), (2, 2)]), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 5)
)
def test_ranks_share_every_item_in_batches_of_one_shape(shapes: list[tuple[int, int]], size: int, world: int) -> None:
    ranks = epoch_of(shapes, size, world)
    assert len({len(rank) for rank in ranks}) == 1
    taken = [rank[i] for i in range(len(ranks[0])) for rank in ranks]  # as they come in time
    assert all(1 <= len(rows.indices) <= size and len({shapes[i] for i in rows.indices}) == 1 for rows in taken)
    once = sum(-(-shapes.count(shape) // size) for shape in set(shapes))
    assert sorted(i for rows in taken[:once] for i in rows.indices) == list(range(len(shapes)))
    assert len(taken) - once < world and all(taken[once + i] == taken[i % once] for i in range(len(taken) - once))


def test_drop_last_leaves_out_incomplete_batches_and_rounds() -> None:
    ranks = epoch_of(SHAPES, 4, 2, drop_last=True)  # three batches of the first shape, one of the second
    assert [len(rank) for rank in ranks] == [2, 2]
    items = [i for rank in ranks for rows in rank for i in rows.indices]
    assert len(items) == len(set(items)) == 16
    assert [len(rank) for rank in epoch_of(SHAPES, 4, 3, drop_last=True)] == [1, 1, 1]
    with pytest.raises(UserError, match=r"21 items of 3 shapes make no batch of 4 for each of 5 ranks"):
        ShapeBatches(SHAPES, 4, world=5, drop_last=True)


def test_epochs_and_seeds_differ_and_come_back() -> None:
    first, second = (epoch_of(SHAPES, 4, 1, epoch)[0] for epoch in (0, 1))
    assert {rows.epoch for rows in second} == {1}
    assert [rows.indices for rows in first] != [rows.indices for rows in second]
    assert {frozenset(rows.indices) for rows in first} != {frozenset(rows.indices) for rows in second}
    torch.manual_seed(1)  # the global state plays no part
    assert first == epoch_of(SHAPES, 4, 1, 0)[0] != list(ShapeBatches(SHAPES, 4, seed=2))


def test_an_epoch_resumes_at_any_batch() -> None:
    whole = epoch_of(SHAPES, 4, 2, 5)[1]
    for position in range(len(whole) + 1):
        batches = ShapeBatches(SHAPES, 4, seed=3, rank=1, world=2)
        batches.set_epoch(5, position)
        assert len(batches) == len(whole) - position and list(batches) == whole[position:]
        batches.set_epoch(5)
        assert list(batches) == whole
    with pytest.raises(UserError, match=f"position {len(whole) + 1} is outside an epoch of {len(whole)} batches"):
        ShapeBatches(SHAPES, 4, seed=3, rank=1, world=2).set_epoch(5, len(whole) + 1)


def test_each_pass_has_the_next_epoch_from_the_one_that_was_set() -> None:
    batches = ShapeBatches(SHAPES, 4, seed=3)
    iter(batches)  # an iterator that gives nothing is no pass
    passes = [list(batches), list(batches)]
    batches.set_epoch(7, 2)
    passes += [list(batches), list(batches)]
    expected = [epoch_of(SHAPES, 4, 1, epoch)[0] for epoch in (0, 1, 7, 8)]
    assert passes == [*expected[:2], expected[2][2:], expected[3]] and batches.epoch == 8
    assert len(batches) == len(expected[3])


def test_impossible_numbers_are_refused() -> None:
    for options in ({"batch_size": 0}, {"rank": 2, "world": 2}, {"rank": -1}):
        refused("must be at least 1, and rank", ShapeBatches, SHAPES, **{"batch_size": 4} | options)
    refused("0 items", ShapeBatches, [], 4)
