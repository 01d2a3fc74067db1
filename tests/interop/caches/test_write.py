"""Check that equal latents make equal files whatever interrupts it, that no image is lost silently, what is refused."""

import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest

from latent_codec.errors import UserError
from latent_codec.interop.caches import write as write_module
from latent_codec.interop.caches.cache import CacheEntry, read_entry
from latent_codec.interop.caches.registry import CacheName
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from tests.conftest import files_of
from tests.support.caches import EVERY, PATHS, draws, made, samples, store
from tests.support.errors import refused
from tests.support.latents import damage
from tests.test_cli import Run, run  # noqa: F401 (a fixture)


@pytest.mark.parametrize("to", EVERY)
def test_equal_latents_make_equal_files_and_what_differs_is_left(
    latents: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: CacheName
) -> None:
    made(latents, to, tmp_path / "one", **EVERY[to])
    now = iter(range(10**9, 2 * 10**9, 10**7))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    made(latents, to, tmp_path / "out", **EVERY[to])
    expected = files_of(tmp_path / "out")
    assert files_of(tmp_path / "one") == expected != {}
    assert not [path for path in (tmp_path / "one").rglob("*") if path.name.startswith(".")]  # no class to MAR
    before = {name: (tmp_path / "out" / name).stat().st_ino for name in expected}
    assert made(latents, to, tmp_path / "out", **EVERY[to]).summary.skipped == len(latents)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in expected} == before
    other = min(expected)
    (tmp_path / "out" / other).write_bytes(b"another program's")
    if len(expected) == len(latents):
        (reason,) = made(latents, to, tmp_path / "out", **EVERY[to]).summary.failures.values()
        assert "is there already and is another one; give --overwrite" in reason
    else:
        with pytest.raises(UserError, match="is there already and is another one; give --overwrite"):
            made(latents, to, tmp_path / "out", **EVERY[to])
    assert (tmp_path / "out" / other).read_bytes() == b"another program's"
    made(latents, to, tmp_path / "out", overwrite=True, **EVERY[to])
    assert files_of(tmp_path / "out") == expected


@pytest.mark.parametrize("to", EVERY)
def test_few_images_are_in_memory(
    shared_codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: CacheName
) -> None:
    """LightningDiT keeps as many as a shard has."""
    latents = store(tmp_path / "z", shared_codec, tuple(f"{i % 2}/{i:02d}.png" for i in range(40)))
    items, alive = list[weakref.ref[CacheEntry]](), list[int]()

    def count(*args: Any) -> CacheEntry:
        items.append(weakref.ref(item := read_entry(*args)))
        alive.append(sum(one() is not None for one in items))
        return item

    monkeypatch.setattr(write_module, "read_entry", count)
    made(latents, to, tmp_path / "out", shard_images=3 if to == "lightningdit" else None, **EVERY[to])
    assert len(items) == 40 and max(alive) < 10


@pytest.mark.parametrize("to", EVERY)
def test_a_damaged_image_fails_alone_unless_files_are_one(shared_codec: Codec, tmp_path: Path, to: CacheName) -> None:
    latents = store(tmp_path / "z", shared_codec)
    made(latents, to, tmp_path / "whole", **EVERY[to])
    bad = damage(latents, 2)
    if to in ("lightningdit", "edm2"):
        refused(rf"^{bad}: row \d .* cannot lack an image", made, latents, to, tmp_path / "out", **EVERY[to])
        assert files_of(tmp_path / "out") == {}
        return
    assert set(made(latents, to, tmp_path / "out", **EVERY[to]).summary.failures) == {bad}
    whole, found = files_of(tmp_path / "whole"), files_of(tmp_path / "out")
    if to == "webdataset":
        keys = [sample["__key__"] for sample in samples(tmp_path / "out" / "latents-000000.tar")]
        assert keys == ["cat/a", "cat/b_c", "dog/ü/e"]
    else:
        assert len(found) == 3 and found.items() <= whole.items()


@pytest.mark.parametrize("to", EVERY)
def test_an_interruption_leaves_no_half_file_and_the_same_command_goes_on(
    latents: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: CacheName
) -> None:
    """It happens before the first file gets its name, then before the last one does."""
    made(latents, to, tmp_path / "whole", **EVERY[to])
    expected = files_of(tmp_path / "whole")
    replace = os.replace
    for place in {1, len(expected)}:
        calls, out = iter(range(1, 99)), tmp_path / f"{place}"

        def stop(*args: Any, calls: Any = calls, place: int = place) -> None:
            if next(calls) >= place:
                raise KeyboardInterrupt
            replace(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", stop)
            made(latents, to, out, **EVERY[to])
        found = files_of(out)
        assert len(found) == place - 1 and found.items() <= expected.items()
        made(latents, to, out, **EVERY[to])
        assert files_of(out) == expected


@pytest.mark.parametrize("to", ["lightningdit", "webdataset"])
def test_shards_of_something_else_are_not_mixed_with_these(latents: Latents, tmp_path: Path, to: CacheName) -> None:
    made(latents, to, tmp_path / "out", shard_images=2, **EVERY[to])
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match=r"0+1\.(tar|safetensors) would be taken for a part of this"):
        made(latents, to, tmp_path / "out", overwrite=True, **EVERY[to])
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("programs", "paths", "side", "flips", "reason"),
    [
        ("kohya musubi webdataset npy", ("a/x.jpg", "a/x.png"), 16, True, r"a/x\.jpg and a/x\.png .*rename one of"),
        ("musubi", ("a/x.png", "b/x.png"), 16, True, r"would both become x_0016x0016_qi\.safetensors"),
        ("lightningdit mar", PATHS, 16, False, "needs latents of mirrored images too; encode with --flips"),
        ("lightningdit mar", ("a/a.png", "b.png"), 16, True, r"b\.png is in no folder \(1 such images\); put the"),
        ("lightningdit edm2", PATHS, None, True, r"takes latents of one size, and .* has 2x\d, .* \(2 sizes in all\)"),
    ],
)
def test_latents_that_a_program_cannot_take_are_refused(
    shared_codec: Codec, tmp_path: Path, programs: Any, paths: Any, side: int | None, flips: bool, reason: str
) -> None:
    latents = store(tmp_path / "z", shared_codec, paths, side, flips)
    for to in programs.split():
        refused(reason, made, latents, to, tmp_path / "out", **EVERY[to])
        assert files_of(tmp_path / "out") == {}


REFUSED: list[tuple[CacheName, dict[str, Any], str]] = [
    ("kohya", {}, "give --arch sd, sdxl, sd3, flux"),
    ("kohya", {"arch": "sd9"}, "give --arch sd, sdxl, sd3, flux"),
    ("kohya", {"arch": "sd", "scaling_factor": 0.18215}, "kohya's sd files hold raw latents"),
    ("kohya", {"arch": "sd", "scale": "raw"}, "--scale is not for --to kohya"),
    ("musubi", {}, "give --arch hv, hv15, wan"),
    ("musubi", {"arch": "zi", "scaling_factor": 1.0}, "hold raw latents"),
    ("npy", {}, "--scale raw or --scale normalized"),
    ("webdataset", {}, "--scale raw or --scale normalized"),
    ("npy", {"scale": "raw", "scaling_factor": 0.5}, "raw latents are not scaled"),
    ("mar", {"seed": 1, "epoch": 2}, "--epoch and --seed are not for --to mar"),
    ("edm2", {"arch": "x"}, "--arch is not for --to edm2"),
    ("npy", {"scale": "normalized", "scaling_factor": 0.0}, "must be positive"),
    ("npy", {"scale": "normalized", "shift_factor": 1.0}, "goes with --scaling-factor"),
    ("comfyui", {"epoch": -1}, "epochs count from 0"),
]


@pytest.mark.parametrize(("to", "given", "reason"), REFUSED)
def test_useless_options_are_refused(latents: Latents, tmp_path: Path, to: CacheName, given: Any, reason: str) -> None:
    refused(reason, made, latents, to, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_without_statistics_scaled_latents_need_a_factor(codec: Codec, tmp_path: Path) -> None:
    codec.statistics = None
    latents = store(tmp_path / "z", codec)
    refused("no latent statistics; give --scaling-factor", made, latents, "npy", tmp_path / "out", scale="normalized")
    made(latents, "npy", tmp_path / "out", scale="normalized", scaling_factor=2.0)


def change(latents: Latents, **fields: Any) -> Latents:
    index = latents.folder / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | fields))
    return Latents(latents.folder)


def test_kohya_needs_its_trainers_factor_and_edm2_squares(shared_codec: Codec, tmp_path: Path) -> None:
    latents = store(tmp_path / "z", shared_codec, ("b/ü.png",), side=None)
    refused("square images, and latents are 2x3", made, latents, "edm2", tmp_path / "out")
    with pytest.raises(UserError, match="at 1/8 of each side, these are at 1/16"):
        made(change(latents, factor=16), "kohya", tmp_path / "out", arch="sd")


def test_a_different_pixel_range_gives_a_note(shared_codec: Codec, tmp_path: Path) -> None:
    latents = change(store(tmp_path / "z", shared_codec), pixel_range=[0.0, 1.0])
    assert any("the encoder saw pixels in [0.0, 1.0]" in n for n in made(latents, "comfyui", tmp_path / "a").notes)
    assert not any("the encoder saw" in note for note in made(latents, "edm2", tmp_path / "b").notes)


def test_the_command_goes_there_and_back(run: Run, latents: Latents, model_file: Path, tmp_path: Path) -> None:  # noqa: F811
    cache = tmp_path / "cache"
    there = run("convert", latents.folder, cache, "--to", "npy", "--scale", "raw", "--seed", 2, "--epoch", 1)
    assert (there.code, there.err) == (0, "")
    note, summary, _ = there.out.splitlines()
    assert "are left out" in note and summary.startswith("converted 4 of 4 images in ")
    assert run("convert", latents.folder, cache, "--to", "npy", "--scale", "raw").code == 1  # others are there
    assert run("convert", latents.folder, cache, "--to", "npy", "--scale", "raw", "--overwrite").code == 0
    back = ("convert", cache, tmp_path / "out", "--from", "npy", "--scale", "raw", "--store", "float32")
    assert "give --model" in run(*back).err
    result = run(*back, "--model", model_file)
    assert result.code == 0 and "single draws" in result.out
    found, expected = Latents(tmp_path / "out"), draws(latents)
    assert all(found.posterior(i).mean[0].equal(expected[entry.path]) for i, entry in enumerate(latents.entries))


@pytest.mark.parametrize("args", ["", "--to npy --from npy", "--to mar --model photo", "--to mar --store float32"])
def test_the_command_refuses_contradicting_options(run: Run, latents: Latents, tmp_path: Path, args: str) -> None:  # noqa: F811
    result = run("convert", latents.folder, tmp_path / "out", *args.split())
    assert result.code == 2 and result.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_command_ends_with_1_if_an_image_is_damaged(run: Run, shared_codec: Codec, tmp_path: Path) -> None:  # noqa: F811
    latents = store(tmp_path / "z", shared_codec)
    bad = damage(latents, 1)
    result = run("convert", latents.folder, tmp_path / "out", "--to", "mar")
    assert result.code == 1 and bad in result.err and "converted 3 of 4 images, 1 failed" in result.out
    result = run("convert", latents.folder, tmp_path / "shards", "--to", "edm2")
    assert result.code == 2 and bad in result.err and result.out == ""
