"""Test that training crops are a pure function of the seed and the samples consumed, however they are fetched."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latent_codec.images.buckets import ResizeOptions
from latent_codec.images.read import ReadOptions
from latent_codec.images.sources import Source, find_images
from latent_codec.noise import fold, permutation
from tests.support.errors import refused
from train.data.crops import (
    Batch,
    Batches,
    ImageSet,
    MemoryImages,
    SamplePlan,
    StreamedImages,
    centre_crops,
    draw,
    fingerprint,
)

CPU = torch.device("cpu")
SIZES = [(40, 48), (33, 35), (20, 50), (36, 16), (32, 32), (9, 7)]  # height, width; several below the crop
PLAN = SamplePlan(seed=3, crop=32, flip=True, batch_size=4, micro_batches=1, rank=0, world=1)
BROKEN = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write noise images: a crop fits at one place of one of them only."""
    path = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def sources(folder: Path) -> list[Source]:
    return find_images(folder)


@pytest.fixture
def with_broken(sources: list[Source], tmp_path: Path) -> list[Source]:
    """Return the same sources, one of them cut off in the middle of its pixels."""
    cut = tmp_path / "cut.png"
    cut.write_bytes(sources[BROKEN].read_bytes()[:-200])
    return [s if i != BROKEN else Source(s.name, cut, 0, cut.stat().st_size) for i, s in enumerate(sources)]


def image_set(sources: list[Source], **options: Any) -> ImageSet:
    return ImageSet(sources=sources, labels=torch.arange(len(sources)), channels=3, **options)


def memory(sources: list[Source], ahead: int = 64) -> Batches:
    return MemoryImages(image_set(sources), PLAN.crop, CPU, quiet=True, ahead=ahead)


def stream(sources: list[Source], workers: int = 0) -> Batches:
    return StreamedImages(image_set(sources), workers, CPU)


def collect(images: Batches, plan: SamplePlan = PLAN, first: int = 0, last: int = 4) -> list[Batch]:
    return list(images.batches(plan, first, last))


def pixels(images: Batches, plan: SamplePlan = PLAN, last: int = 4) -> torch.Tensor:
    return torch.cat([batch.pixels for batch in collect(images, plan, last=last)])


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.keys, b.keys) and torch.equal(a.labels, b.labels)


def places(crop: torch.Tensor, sources: list[Source]) -> Iterator[tuple[int, int, int, bool]]:
    """Yield (image, top, left, flipped) where a crop is found, by looking everywhere."""
    for i, source in enumerate(sources):
        image = source.read().pixels.numpy()
        short = [(0, max(0, PLAN.crop - side)) for side in image.shape[1:]]
        extended = np.pad(image, [(0, 0), *short], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(extended, (PLAN.crop, PLAN.crop), axis=(1, 2))
        for flipped, wanted in ((False, crop), (True, crop.flip(-1))):
            hits = (windows == wanted.numpy()[:, None, None]).all((0, 3, 4))
            yield from ((i, int(top), int(left), flipped) for top, left in np.argwhere(hits))


def test_sample_i_is_a_crop_of_image_i_of_the_epochs_order(sources: list[Source]) -> None:
    crops = pixels(memory(sources), last=12)
    assert crops.shape == (48, 3, 32, 32) and crops.dtype == torch.uint8
    found = [next(places(crop, sources)) for crop in crops]
    assert [image for image, *_ in found] == draw(range(48), len(sources), PLAN.seed).image.tolist()


def test_crops_reach_every_place_and_half_are_flipped(sources: list[Source]) -> None:
    one = [sources[1]]  # 33 x 35: 2 x 4 places
    found = [next(places(crop, one)) for crop in pixels(memory(one), last=50)]
    assert {(top, left) for _, top, left, _ in found} == {(t, left) for t in range(2) for left in range(4)}
    assert 70 < sum(flipped for *_, flipped in found) < 130  # of 200: four standard deviations


def test_without_flip_nothing_is_mirrored_and_all_else_is_the_same(sources: list[Source]) -> None:
    plain = pixels(memory(sources), PLAN._replace(flip=False))
    for a, b in zip(plain, pixels(memory(sources)), strict=True):
        assert not next(places(a, sources))[3]
        assert torch.equal(a, b) or torch.equal(a, b.flip(-1))


def test_crops_depend_on_the_seed_and_not_on_the_global_random_state(sources: list[Source]) -> None:
    torch.manual_seed(1)
    one = collect(memory(sources))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert_same(collect(memory(sources)), one)
    assert torch.equal(torch.get_rng_state(), state)
    other = collect(memory(sources), PLAN._replace(seed=4))
    assert not any(torch.equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("last", [False, True])
def test_streamed_crops_are_those_in_memory_and_the_next_image_replaces_a_broken_one(
    with_broken: list[Source], sources: list[Source], caplog: pytest.LogCaptureFixture, workers: int, last: bool
) -> None:
    caplog.set_level(logging.WARNING)
    start = BROKEN + 1 if last else 0  # the first image takes the turn of a broken last one
    broken, whole = with_broken[start:] + with_broken[:start], sources[start:] + sources[:start]
    number = len(sources) - 1 if last else BROKEN
    batches = collect(memory(broken))
    assert sum(sources[BROKEN].name in r.getMessage() for r in caplog.records) == 1
    order = draw(range(16), len(sources), PLAN.seed).image.tolist()
    assert number in order
    found = [next(places(crop, whole))[0] for b in batches for crop in b.pixels]
    assert found == [(number + 1) % len(sources) if image == number else image for image in order]
    caplog.clear()
    assert_same(collect(stream(broken, workers)), batches)
    if workers == 0:  # a worker's report goes to its own standard error
        assert sum(sources[BROKEN].name in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("fetch", [memory, lambda broken: collect(stream(broken))])
def test_nothing_but_broken_images_is_an_error(with_broken: list[Source], fetch: Callable[..., object]) -> None:
    refused("none of the 2 images could be read", fetch, [with_broken[BROKEN]] * 2)


@pytest.mark.parametrize("fetch", [memory, partial(memory, ahead=1), partial(memory, ahead=3), stream])
def test_a_run_resumed_at_a_later_step_sees_the_same_batches_however_many_are_drawn_ahead(
    sources: list[Source], fetch: Callable[[list[Source]], Batches]
) -> None:
    plan, images = PLAN._replace(micro_batches=2), fetch(sources)
    whole = collect(memory(sources), plan, last=6)
    assert_same(collect(images, plan, 0, 2) + collect(images, plan, 2, 6), whole)


@given(
    world=st.sampled_from([1, 2, 4]),
    micro_batches=st.sampled_from([1, 2]),
    size=st.integers(1, 3),
    first=st.integers(0, 5),
)
def test_ranks_and_micro_batches_share_a_steps_samples(world: int, micro_batches: int, size: int, first: int) -> None:
    batch_size = world * micro_batches * size
    plan = PLAN._replace(batch_size=batch_size, micro_batches=micro_batches, world=world)
    ranks = [list(plan._replace(rank=rank).schedule(first, first + 2)) for rank in range(world)]
    for step in range(2):
        of_step = slice(step * micro_batches, (step + 1) * micro_batches)
        samples = [i for rank in ranks for part in rank[of_step] for i in part]
        assert samples == list(range((first + step) * batch_size, (first + step + 1) * batch_size))


@given(
    start=st.integers(0, 50),
    count=st.integers(1, 40),
    n=st.integers(1, 20),
    seed=st.integers(-(2**63), 2**63 - 1),
    stride=st.integers(1, 3),
)
def test_a_samples_image_and_key_follow_their_definition(
    start: int, count: int, n: int, seed: int, stride: int
) -> None:
    """Sample i is image permutation(seed, i // n)[i % n] with the key fold(seed, i), however samples are batched."""
    samples = range(start, start + count * stride, stride)
    drawn = draw(samples, n, seed)
    for i, image, key in zip(samples, drawn.image.tolist(), drawn.key.tolist(), strict=True):
        assert image == int(permutation(n, fold(seed, 0, i // n))[i % n]) and key == int(fold(seed, i))


def test_centre_crops_are_the_middle_of_readable_images(
    with_broken: list[Source], sources: list[Source], caplog: pytest.LogCaptureFixture
) -> None:
    crops = centre_crops(image_set(with_broken), 16)
    assert crops.names == [s.name for i, s in enumerate(sources) if i != BROKEN]
    assert sources[BROKEN].name in caplog.text
    assert torch.equal(crops.pixels[0], sources[0].read().pixels[:, 12:28, 16:32])
    small = sources[5].read().pixels  # 9 x 7
    assert torch.equal(crops.pixels[-1][:, :9, :7], small)
    assert torch.equal(crops.pixels[-1][:, 9:, 7:], small[:, -1:, -1:].expand(3, 7, 9))
    refused("none of the 1 validation images could be read", centre_crops, image_set([with_broken[BROKEN]]), 16)


def test_images_are_resized_when_they_are_read(sources: list[Source]) -> None:
    images = image_set(sources, read=ReadOptions(resize=ResizeOptions(size=(48, 48))))
    whole = [source.read(images.read).pixels for source in sources]
    assert [min(pixels.shape[1:]) for pixels in whole] == [48] * len(SIZES)
    middle = [p[:, (p.shape[1] - 48) // 2 :, (p.shape[2] - 48) // 2 :][:, :48, :48] for p in whole]
    assert torch.equal(centre_crops(images, 48).pixels, torch.stack(middle))
    in_memory = MemoryImages(images, PLAN.crop, CPU, quiet=True)
    assert_same(collect(in_memory), collect(StreamedImages(images, 0, CPU)))
    assert not torch.equal(pixels(in_memory), pixels(memory(sources)))


def test_the_fingerprint_tells_names_sizes_and_order_but_not_places(sources: list[Source]) -> None:
    renamed = [sources[0]._replace(name="other.png"), *sources[1:]]
    resized = [sources[0]._replace(size=1), *sources[1:]]
    moved = [sources[0]._replace(path=Path("elsewhere")), *sources[1:]]
    assert len({fingerprint(s) for s in (sources, renamed, resized, sources[::-1], sources[:-1])}) == 5
    assert fingerprint(moved) == fingerprint(sources)
