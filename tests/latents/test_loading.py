"""`Latents` under a `DataLoader`: one by one, in batches and in workers the same draws come out."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from latent_codec.errors import UserError
from latent_codec.latents.batches import Rows, ShapeBatches
from latent_codec.latents.dataset import LatentBatch, Latents, LatentSample, Moments
from latent_codec.model.codec import Codec
from tests.latents.test_dataset import PATHS, store

MANY = (*(f"{'bac'[i % 3]}/{i}.png" for i in range(24)), "top.png")


@pytest.fixture
def latents(codec: Codec, tmp_path: Path) -> Latents:
    """Of two sizes."""
    store(tmp_path, codec, MANY, "float16")
    found = Latents(tmp_path, seed=5, normalize=True)
    assert len(set(found.shapes)) == 2
    return found


def drawn(latents: Latents, epoch: int) -> dict[str, torch.Tensor]:
    """By path, one by one."""
    latents.set_epoch(epoch)
    return {sample.path: sample.z for sample in (latents[i] for i in range(len(latents)))}


def test_classes_are_sorted_and_labels_their_numbers(latents: Latents) -> None:
    assert latents.classes == ("a", "b", "c")
    for i, entry in enumerate(latents.entries):
        expected = -1 if entry.label is None else "abc".index(entry.label)
        assert latents[i].label == latents.labels[i] == expected
    assert -1 in latents.labels


def test_batches_of_any_kind_hold_what_single_items_are(latents: Latents) -> None:
    expected = drawn(latents, 7)
    latents.set_epoch(0)
    for rows in ShapeBatches(latents.shapes, 4, seed=1):
        rows = rows._replace(epoch=7)
        batch, samples, moments = latents[rows], latents.__getitems__(rows), latents.moments(rows)
        assert isinstance(batch, LatentBatch) and isinstance(moments, Moments)
        assert (
            batch.paths == moments.paths == [s.path for s in samples] == [latents.entries[i].path for i in rows.indices]
        )
        assert batch.labels.tolist() == [s.label for s in samples] == latents.labels[list(rows.indices)].tolist()
        assert moments.mean.dtype == moments.logvar.dtype == torch.float16
        assert torch.equal(latents.draw(moments.to("cpu")), batch.z)
        for path, z, sample in zip(batch.paths, batch.z, samples, strict=True):
            assert torch.equal(z, expected[path]) and torch.equal(sample.z, z)


def test_several_of_different_sizes_are_fetched_in_their_order(latents: Latents) -> None:
    expected = drawn(latents, 2)
    indices = [5, 0, 24, 7, 5, 13]
    assert len({latents.shapes[i] for i in indices}) == 2
    samples = latents.__getitems__(indices)
    assert [s.path for s in samples] == [latents.entries[i].path for i in indices]
    assert all(torch.equal(s.z, expected[s.path]) for s in samples)
    with pytest.raises(UserError, match="its latents are no"):
        latents.moments(Rows((0, next(i for i in range(24) if latents.shapes[i] != latents.shapes[0])), 0))


def found_in(batches: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for batch in batches:
        yield from zip(batch[1], batch[0], strict=True)


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_that_stay_draw_each_epochs_own_noise(latents: Latents, context: str) -> None:
    expected = {epoch: drawn(latents, epoch) for epoch in (0, 1)}
    latents.set_epoch(9)  # plays no part
    batches = ShapeBatches(latents.shapes, 4)
    loader = DataLoader(
        latents,
        sampler=batches,
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context=context,
    )
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        found = dict(found_in(loader))
        assert set(found) == set(MANY)
        assert all(torch.equal(z, expected[epoch][path]) for path, z in found.items())


def test_the_loader_may_make_the_batches(latents: Latents, codec: Codec, tmp_path: Path) -> None:
    expected = drawn(latents, 0)
    by_shape = DataLoader(latents, batch_sampler=ShapeBatches(latents.shapes, 4))
    assert all(torch.equal(z, expected[path]) for path, z in found_in(by_shape))
    store(tmp_path / "one", codec, ("b/ü.png", "b/x.png"), "float16")
    same = [i for i, shape in enumerate(latents.shapes) if shape == latents.shapes[0]]
    plain = DataLoader(torch.utils.data.Subset(latents, same), batch_size=3)
    for sample in plain:
        assert isinstance(sample, LatentSample) and sample.z.ndim == 4
        assert all(torch.equal(z, expected[path]) for path, z in zip(sample.path, sample.z, strict=True))


def test_a_pickled_copy_draws_the_same(latents: Latents) -> None:
    latents.set_epoch(3)
    expected = [latents[i] for i in range(len(latents))]
    copy = pickle.loads(pickle.dumps(latents))
    for i, sample in enumerate(expected):
        assert torch.equal(copy[i].z, sample.z) and copy[i][1:] == sample[1:]


def test_what_workers_hand_over_is_one_tensor_and_comes_out_the_same(latents: Latents) -> None:
    same = tuple(i for i, shape in enumerate(latents.shapes) if shape == latents.shapes[0])
    moments = latents.moments(Rows(same, 1))
    halved = Moments(moments.mean[::2], moments.logvar[::2], moments.keys[::2], moments.paths[::2], moments.labels[::2])
    apart = Moments(moments.mean.clone(), moments.logvar.clone(), *moments[2:])
    swapped = Moments(moments.logvar, moments.mean, *moments[2:])
    for given in (moments, halved, apart, swapped, latents[Rows(same, 1)]):
        assert sum(isinstance(part, torch.Tensor) for part in given.__reduce__()[1]) == 1
        copy = pickle.loads(pickle.dumps(given))
        assert type(copy) is type(given)
        for one, other in zip(given, copy, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    both = moments.__reduce__()[1][0]
    assert both.data_ptr() == moments.mean.data_ptr()  # not copied


def test_a_damaged_row_is_named_in_a_batch(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path, codec, PATHS, "float16")
    latents = Latents(tmp_path)
    entry = latents.entries[2]
    span = latents._spans(entry.shard, latents.shapes[2], False)[1]
    shard = tmp_path / entry.shard
    data = bytearray(shard.read_bytes())
    size = 2 * 4 * latents.shapes[2][0] * latents.shapes[2][1]
    data[span.start + entry.row * size : span.start + entry.row * size + 2] = b"\x00\xfc"  # minus infinity
    shard.write_bytes(data)
    same = tuple(i for i, shape in enumerate(latents.shapes) if shape == latents.shapes[2])
    with pytest.raises(
        UserError, match=rf"^b/c/d\.png: row {entry.row} of shard .* is damaged; encode the image again"
    ):
        latents.moments(Rows(same, 0))
