"""Test that shards are removed only where this command makes their images anew, and that no good image is lost."""

import shutil
from pathlib import Path

import pytest

from latent_codec.folders.decode_lc import find_lc
from latent_codec.folders.jobs import OVERWRITE
from latent_codec.folders.resume.ledger import Ledger
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of
from tests.support.errors import refused
from tests.support.folder import Kind, make

SHARDS: list[Kind] = ["tars of streams", "latents"]


def stored(kind: Kind, folder: Path) -> dict[str, bytes]:
    """Return what shards hold of each image."""
    if kind == "latents":
        latents = Latents(folder)
        return {e.path: latents.posterior(i).mean.numpy().tobytes() for i, e in enumerate(latents.entries)}
    return {source.name: source.read_bytes() for source in find_lc(folder)}


@pytest.fixture
def sources(tmp_path: Path, draw: Draw) -> Path:
    for i, name in enumerate(("A/a.png", "A/b.png", "A/c.png", "B/d.png", "B/e.png")):
        draw(tmp_path / name, 16 + 8 * i, 8)
    return tmp_path


@pytest.mark.parametrize("kind", SHARDS)
def test_shards_of_other_images_are_kept_and_the_command_is_refused(kind: Kind, codec: Codec, sources: Path) -> None:
    out = sources / "out"
    make(kind, codec, sources / "A", out)
    before = files_of(out)
    refused(
        "of other images, such as a.png; give another folder, or --overwrite", make, kind, codec, sources / "B", out
    )
    assert files_of(out) == before
    make(kind, codec, sources / "B", out, resume=OVERWRITE)
    assert {"d.png", "e.png"} <= {name.removesuffix(".lc") for name in stored(kind, out)}


def test_images_of_streams_in_tar_shards_are_kept_likewise(codec: Codec, sources: Path) -> None:
    for name in "AB":
        make("streams", codec, sources / name, sources / f"lc {name}")
    make("tars of images", codec, sources / "lc A", sources / "out")
    before = files_of(sources / "out")
    refused("holds images of other images", make, "tars of images", codec, sources / "lc B", sources / "out")
    assert files_of(sources / "out") == before


@pytest.mark.parametrize("kind", SHARDS)
def test_an_image_that_is_damaged_later_keeps_what_was_made_of_it(kind: Kind, codec: Codec, sources: Path) -> None:
    out, path = sources / "out", sources / "A" / "b.png"
    make(kind, codec, sources / "A", out)
    before, good = stored(kind, out), path.read_bytes()
    for _ in range(2):  # whether it is found damaged or was so before
        path.write_bytes(good[: len(good) // 2])
        assert make(kind, codec, sources / "A", out).failures.keys() == {"b.png"}
        assert stored(kind, out).items() >= before.items()
        shutil.copy(sources / "B" / "d.png", sources / "A" / "new.png")  # the unit is made anew once more
    assert stored(kind, out).keys() - before.keys() == {f"new.png{'.lc' if kind != 'latents' else ''}"}
    path.write_bytes(good)
    assert not make(kind, codec, sources / "A", out).failures and len(stored(kind, out)) == 4


@pytest.mark.parametrize("kind", SHARDS)
def test_files_that_only_look_like_shards_stay(kind: Kind, codec: Codec, sources: Path) -> None:
    out = sources / "out"
    make(kind, codec, sources / "A", out)
    (shard,) = (path for path in out.iterdir() if path.suffix in (".tar", ".safetensors"))
    strangers = [
        f"{shard.stem}.bak{shard.suffix}",
        shard.name.replace(shard.stem[-25:-9], "0" * 16),
        f"{shard.name}.old",
    ]
    for name in strangers:
        (out / name).write_bytes(b"mine")
    shutil.copy(sources / "B" / "d.png", sources / "A" / "b.png")
    make(kind, codec, sources / "A", out)
    assert all((out / name).read_bytes() == b"mine" for name in strangers) and not shard.exists()
    assert Ledger.exists(out)
