"""Test that networks run in batches that fit into memory, and compiled."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.exc import BackendCompilerFailed

from latent_codec.errors import FatalError, UserError
from latent_codec.inference.out_of_memory import OutOfMemoryBackoff
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.model.config import LinearConfig
from tests.conftest import Draw, files_of
from tests.support.folder import CPU, Kind, make
from tests.support.networks import config_of, make_codec

OUT_OF_MEMORY: list[type[Exception] | Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    MemoryError(),
]


@given(st.lists(st.integers(), max_size=40), st.integers(1, 50), st.sampled_from(OUT_OF_MEMORY))
def test_lists_are_halved_until_they_fit_results_in_order(items: list[int], most: int, error: Exception) -> None:
    calls: list[int] = []

    def call(batch: list[int]) -> list[int]:
        calls.append(len(batch))
        if len(batch) > most:
            raise error
        return [2 * item for item in batch]

    backoff = OutOfMemoryBackoff()
    assert list(backoff.map(call, items, 3)) == [(item, 2 * item) for item in items]
    calls.clear()
    assert list(backoff.map(call, items, 3)) == [(item, 2 * item) for item in items]
    assert max(calls, default=0) <= most  # it knows by now


@pytest.mark.parametrize("error", [MemoryError(), UserError("3 is not finite")], ids=str)
def test_what_does_not_fit_or_is_refused_fails_alone_and_other_errors_are_no_reason_to_halve(error: Exception) -> None:
    def call(batch: list[int]) -> list[int]:
        if 3 in batch:
            raise error
        return batch

    found = dict(OutOfMemoryBackoff().map(call, [1, 2, 3, 4], 1))
    failed = found.pop(3)
    assert isinstance(failed, UserError) and found == {1: 1, 2: 2, 4: 4}
    assert str(failed) == str(error) or str(failed).startswith("memory ran out")
    for other in (RuntimeError("another"), FatalError("another")):
        with pytest.raises(type(other), match="another"):
            list(OutOfMemoryBackoff().map(mock.Mock(side_effect=other), [1, 2], 1))


@pytest.mark.parametrize(("kind", "decoded"), [("streams", "images of streams"), ("latents", "images of latents")])
def test_a_folder_goes_on_where_memory_runs_out(
    codec: Codec, tmp_path: Path, draw: Draw, capsys: pytest.CaptureFixture[str], kind: Kind, decoded: Kind
) -> None:
    def limited(method: Callable[..., Any], scale: int) -> Callable[..., Any]:
        """Let networks take two images at once, and none of 40x40 pixels or more."""

        def call(self: Runner, images: Any, labels: Any = None) -> Any:
            if len(images) > 2 or images[0][0].numel() * scale >= 1600:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return method(self, images, labels)

        return call

    for i in range(5):
        draw(tmp_path / "photos" / f"{i}.png", 24, 16, seed=i)
    draw(tmp_path / "photos" / "large.png", 48, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "encode", limited(Runner.encode, 1))
        patch.setattr(Runner, "decode_uint8", limited(Runner.decode_uint8, 64))
        summary = make(kind, codec, tmp_path / "photos", tmp_path / "z")
        assert (summary.done, summary.failures.keys()) == (5, {"large.png"})
        assert "--tile" in summary.failures["large.png"]
        assert capsys.readouterr().err.count("memory ran out for 4 images at once; going on with 2") == 1
        assert make(decoded, codec, tmp_path / "z", tmp_path / "y").done == 5
        assert "going on with 2" in capsys.readouterr().err
    make(decoded, codec, tmp_path / "z", tmp_path / "whole")
    assert files_of(tmp_path / "y") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_compiled_networks_give_the_same_but_for_rounding() -> None:
    codec = make_codec(config_of(LinearConfig(patch=4), z=2))
    images = [torch.randint(256, (3, 16, 24), dtype=torch.uint8) for _ in range(3)]
    plain, compiled = (Runner(codec, dataclasses.replace(CPU, compile=compiled)) for compiled in (False, True))
    expected, found = plain.encode(images), compiled.encode(images)
    for name in ("mean", "logvar"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    z = expected.mean.unbind()
    assert (compiled.decode_uint8(z).int() - plain.decode_uint8(z).int()).abs().max() <= 1


def test_a_bad_compiler_is_one_error(codec: Codec, tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = BackendCompilerFailed(draw, RuntimeError("no C++ compiler"), None)  # pyright: ignore
    draw(tmp_path / "a.png", 24, 16)
    monkeypatch.setattr(codec, "encode", mock.Mock(side_effect=failed))
    with pytest.raises(FatalError, match=r"torch\.compile does not work here .*--compile"):
        make("latents", codec, tmp_path / "a.png", tmp_path / "z", dataclasses.replace(CPU, compile=True))
