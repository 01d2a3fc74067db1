"""Test that shards are removed only where this command makes their images anew, and that no good image is lost."""

import shutil
from pathlib import Path

import pytest

from latent_codec.folders.jobs import OVERWRITE
from latent_codec.folders.read_lc import find_lc
from latent_codec.folders.resume.ledger import Ledger
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of
from tests.support.errors import refused
from tests.support.folder import Kind, make

SHARDS: list[Kind] = ["tars of streams", "latents"]
ALL: list[Kind] = [*SHARDS, "tars of images"]


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


def test_shards_of_other_images_stay(codec: Codec, sources: Path) -> None:
    """Two sets share a folder of tar shards as they share one of files; an index of latents is of one set only."""
    places: list[tuple[Kind, str]] = [("tars of streams", "out"), ("streams", "lc")]
    for kind, here in places:
        for name in "AB":
            make(kind, codec, sources / name, sources / here)
    assert stored("tars of streams", sources / "out") == stored("streams", sources / "lc")
    for name in "AB":
        make("streams", codec, sources / name, sources / f"lc {name}")
        make("tars of images", codec, sources / f"lc {name}", sources / "images")
    assert len(list((sources / "images").glob("images-*.tar"))) == 2
    make("latents", codec, sources / "A", sources / "latents")
    before = files_of(sources / "latents")
    refused("of other images, such as a.png", make, "latents", codec, sources / "B", sources / "latents")
    assert files_of(sources / "latents") == before
    make("latents", codec, sources / "B", sources / "latents", resume=OVERWRITE)
    assert stored("latents", sources / "latents").keys() == {"d.png", "e.png"}


@pytest.mark.parametrize("kind", ALL)
def test_sets_that_share_some_names_are_not_mixed_in_a_file(kind: Kind, codec: Codec, sources: Path) -> None:
    """Refused is only what would lose an image; a set that was moved, and one that lost images, are made again."""
    (sources / "B" / "d.png").rename(sources / "B" / "b.png")
    if kind == "tars of images":
        for name in "AB":
            make("streams", codec, sources / name, sources / f"lc {name}")
    before, out = "lc " if kind == "tars of images" else "", sources / "out"
    make(kind, codec, sources / f"{before}A", out)
    files = files_of(out)
    name = "a.png.lc" if before else "a.png"
    refused(f"holds {name} of another set of images together with b", make, kind, codec, sources / f"{before}B", out)
    assert files_of(out) == files
    (sources / f"{before}A").rename(sources / "moved")
    (sources / "moved" / name).unlink()
    assert make(kind, codec, sources / "moved", out).done == 2
    assert len([path for path in out.iterdir() if path.suffix in (".tar", ".safetensors")]) == 1
    make(kind, codec, sources / f"{before}B", sources / "more")
    make(kind, codec, sources / f"{before}B", out, resume=OVERWRITE)
    assert all(item in files_of(out).items() for item in files_of(sources / "more").items())


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
