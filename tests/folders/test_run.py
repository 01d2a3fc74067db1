"""Test that batches lose nothing, and that few images wait in memory."""

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.folders.batching import batches
from latent_codec.folders.decode_images import DecodeOptions
from latent_codec.folders.decode_latents import decode_latents
from latent_codec.folders.decode_lc import decode_lc
from latent_codec.folders.encode_latents import encode_latents
from latent_codec.folders.encode_lc import EncodeOptions, encode_lc
from latent_codec.folders.resume.units import units
from latent_codec.images.sources import find_images
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from tests.conftest import Draw


@given(st.lists(st.integers(0, 6)), st.integers(1, 4))
def test_batches_are_of_one_shape_and_hold_every_item_once_in_its_shapes_order(shapes: list[int], size: int) -> None:
    items = list(enumerate(shapes))
    found = list(batches(items, size, lambda item: item[1], alone=lambda item: item[1] == 6))
    assert sorted(item for batch in found for item in batch) == items
    assert all(len({shape for _, shape in batch}) == 1 and len(batch) <= size for batch in found)
    assert all(len(batch) == 1 for batch in found if batch[0][1] == 6)
    for shape in set(shapes):
        own = [item for batch in found for item in batch if item[1] == shape]
        assert own == sorted(own)


def test_images_of_a_unit_do_not_stay_in_memory_until_it_is_whole(
    codec: Codec, tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def watch(owner: Any, name: str, tensors: Callable[[Any, Any], Iterable[torch.Tensor]]) -> None:
        real = getattr(owner, name)

        def watched(self: Any, images: Any, labels: Any = None) -> Any:
            nonlocal most
            result = real(self, images, labels)
            for tensor in tensors(images, result):
                alive.add(tensor)
            most = max(most, len(alive))
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(Runner, "encode", lambda images, _: images)
    watch(Runner, "decode_uint8", lambda _, result: [result])
    for i in range(40):
        draw(tmp_path / "photos" / f"{i:02d}.png", 24, 16, seed=i)
    assert len(units(find_images(tmp_path / "photos"))) == 1
    runner = Runner(codec, ComputeOptions(batch_size=1, workers=1))
    encode_latents(runner, tmp_path / "photos", tmp_path / "latents", quiet=True)
    for tar in (False, True):
        encode_lc(runner, tmp_path / "photos", tmp_path / f"{tar}", EncodeOptions(tar=tar), quiet=True)
        decode_lc(runner, tmp_path / f"{tar}", tmp_path / f"back {tar}", DecodeOptions(tar=tar), quiet=True)
    decode_latents(runner, tmp_path / "latents", tmp_path / "back", DecodeOptions(tar=True), quiet=True)
    assert 1 <= most <= 8
