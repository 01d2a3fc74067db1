"""Test what the command line prints where, and its exit codes: 0, 1 some images failed, 2 a mistake, 130 Ctrl-C."""

import errno
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from PIL import Image

from latent_codec import cli
from latent_codec.bitstream import container
from latent_codec.bitstream.stream_codec import dither_seed
from latent_codec.commands.decode import Decode
from latent_codec.commands.encode import Encode
from latent_codec.folders import encode_lc
from latent_codec.folders.resume.units import units
from latent_codec.images.read import DEFAULT_MAX_PIXELS
from latent_codec.images.sources import Source
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from latent_codec.version import __version__
from tests.conftest import Draw, files_of
from tests.support.data import ROOT
from tests.support.folder import images

LATENTS = ("--format", "safetensors")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return run("encode", src, ...), which gives a command's exit code and what it printed."""

    def call(*args: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in args])
        assert isinstance(caught.value.code, int)
        printed = capsys.readouterr()
        return Result(caught.value.code, str(printed.out), str(printed.err))

    return call


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for name, size in (("a.jpg", (24, 16)), ("a.png", (9, 7)), ("sub/b.png", (17, 33))):
        draw(tmp_path / "photos" / name, *size)
    return tmp_path / "photos"


@pytest.fixture
def latents(run: Run, photos: Path, model_file: Path, tmp_path: Path) -> Path:
    assert run("encode", photos, tmp_path / "latents", "--model", model_file, *LATENTS).code == 0
    return tmp_path / "latents"


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False)


COMMANDS = ("encode", "decode", "info", "evaluate", "export", "import", "sample", "convert")


def test_help_answers_without_importing_torch() -> None:
    program = (
        "import sys; from latent_codec.cli import main\n"
        f"for args in ([], *([name] for name in {COMMANDS})):\n"
        "    try: main([*args, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0, args\n"
        "    else: raise AssertionError(args)\n"
        "heavy = {'torch', 'numpy', 'PIL', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout
    assert "--step FLOAT" in done.stdout and "{None}" not in done.stdout


def test_the_version_is_the_packages_and_a_closed_pipe_ends_without_a_traceback() -> None:
    command = [sys.executable, "-m", "latent_codec.cli", "--version"]
    done = python(*command[1:])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"latent-codec {__version__}\n", "")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("args", [[], ["bogus"], ["encode"], ["encode", "a"], ["encode", "a", "b", "--bogus"]])
def test_wrong_usage_is_2_and_says_so_on_stderr(run: Run, args: list[str]) -> None:
    result = run(*args)
    assert (result.code, result.out) == (2, "")
    assert "help" in result.err


def test_the_pixel_limit_is_the_readers() -> None:
    assert Encode(src="a", dst=Path("b")).max_pixels == DEFAULT_MAX_PIXELS
    assert Decode(src=Path("a"), dst=Path("b")).max_pixels == DEFAULT_MAX_PIXELS


@pytest.fixture
def streams(run: Run, photos: Path, model_file: Path, tmp_path: Path) -> Path:
    assert run("encode", photos, tmp_path / "streams", "--model", model_file).code == 0
    return tmp_path / "streams"


def test_options_of_streams_reach_the_work(run: Run, photos: Path, model_file: Path, tmp_path: Path) -> None:
    model, out, z = ("--model", model_file), tmp_path / "out", tmp_path / "z"
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(photos / "clear.png")
    options = ("--step", 0.5, "--sample", 7, "--prior", "factorized", "--background", "#102030", "--batch-size", 1)
    result = run("encode", photos, z, *model, *options)
    assert result.code == 0 and "bits per pixel" in result.out
    header = container.read(z / "clear.png.lc").header
    assert (header.step, header.prior, header.seed) == (512, "factorized", dither_seed(7, "clear.png"))
    assert header.geometry.background == "#102030"
    assert run("encode", photos, z, *model).code == 0
    assert container.read(z / "clear.png.lc").header.prior == "context"
    assert run("encode", photos, z, *model, "--max-bytes", 200, "--step", 0.02).code == 0
    assert max(f.stat().st_size for f in z.rglob("*.lc")) <= 200
    assert run("encode", photos, z, *model, "--bpp", 20).code == 0
    assert run("encode", photos / "a.png", tmp_path / "psnr", *model, "--psnr", 99).code == 1
    assert run("encode", photos, tmp_path / "tars", *model, "--tar").code == 0
    assert all(name.endswith(".tar") for name in files_of(tmp_path / "tars"))
    result = run("decode", z, out, *model, "--image-format", "webp")
    assert (result.code, result.err) == (0, "") and result.out.startswith("decoded 4 of 4 images in ")
    assert {name: image.size for name, image in images(out).items()} == {
        "a.jpg.webp": (24, 16),
        "a.png.webp": (9, 7),
        "clear.png.webp": (8, 8),
        "sub/b.png.webp": (17, 33),
    }
    assert run("decode", z / "a.png.lc", tmp_path / "one", *model).code == 0
    assert files_of(tmp_path / "one").keys() == {"a.png.png"}
    assert run("decode", z, tmp_path / "few", *model, "--max-pixels", 100).code == 1
    assert files_of(tmp_path / "few").keys() == {"a.png.png", "clear.png.png", "failures.jsonl"}


def test_options_of_latents_reach_the_work(run: Run, photos: Path, model_file: Path, tmp_path: Path) -> None:
    model, z = ("--model", model_file), tmp_path / "z"
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(photos / "clear.png")
    options = ("--store", "float32", "--background", "#102030", "--workers", 1, "--device", "cpu", "--flips")
    assert run("encode", photos, z, *model, *LATENTS, *options).code == 0
    found = Latents(z)
    assert found.header.dtype == "float32" and found.header.flips
    assert {e.path: e.geometry.background for e in found.entries}["clear.png"] == "#102030"
    assert run("encode", photos, z, *model, *LATENTS).code == 0
    assert Latents(z).header.dtype == "float16"
    for name, options in (("mode", ()), ("draw", ("--sample", 3))):
        assert run("decode", z, tmp_path / name, *model, "--image-format", "webp", *options).code == 0
    assert files_of(tmp_path / "mode").keys() == files_of(tmp_path / "draw").keys()
    assert files_of(tmp_path / "mode") != files_of(tmp_path / "draw")


def test_the_same_command_again_does_what_is_left(run: Run, photos: Path, streams: Path, model_file: Path) -> None:
    before = files_of(streams)
    command = ("encode", photos, streams, "--model", model_file)
    (streams / "a.png.lc").unlink()
    assert run(*command).out.startswith("encoded 3 of 3 images in ")
    os.utime(photos / "a.png", ns=(0, 0))
    assert run(*command, "--check", "hash").out.startswith("encoded 0 of 3 images, 3 skipped in ")
    os.utime(photos / "a.png", ns=(1, 1))
    assert run(*command, "--check", "mtime").out.startswith("encoded 3 of 3 images in ")
    assert run(*command, "--overwrite").out.startswith("encoded 3 of 3 images in ")
    assert files_of(streams) == before


@pytest.fixture
def three_units(tmp_path: Path, draw: Draw) -> Path:
    """Return a folder of three images whose names begin a unit each."""

    def begins(name: str) -> bool:
        return len(units([Source("", Path(), 0, 1), Source(name, Path(), 0, 1)])) == 2

    names = [name for name in (f"{i:03d}.png" for i in range(999)) if begins(name)]
    for i, name in enumerate(names[:3]):
        draw(tmp_path / "units" / name, 9, 7, seed=i)
    return tmp_path / "units"


def test_shares_together_are_the_whole(
    run: Run, three_units: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        result = run("encode", three_units, tmp_path / "z", "--model", model_file, "--shard", f"{i}/2")
        assert result.out.startswith(f"encoded {2 - i} of {2 - i} images in ")
    assert run("encode", three_units, tmp_path / "z", "--model", model_file).out.startswith("encoded 0 of 3")
    refuse(run("encode", three_units, tmp_path / "z", "--model", model_file, "--shard", "2/2"), "--shard 2/2: give i/n")
    monkeypatch.setenv("RANK", "3")
    refuse(run("encode", three_units, tmp_path / "z", "--model", model_file), "RANK 3 of WORLD_SIZE 1")


def test_devices_that_cannot_be_used_are_named_and_processes_of_a_launcher_take_a_gpu_each(
    run: Run, photos: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("encode", photos, tmp_path / "z", "--model", model_file)
    for device in ("abacus", "meta", "cpu:x", *([] if torch.cuda.is_available() else ["cuda"])):
        refuse(run(*command, "--device", device), f"--device {device} is not usable")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(torch, "zeros", lambda *_, device: (_ for _ in ()).throw(RuntimeError(device)))
        refuse(run(*command), f"--device {device} is not usable")


def test_images_that_fail_are_1_whether_some_or_all(run: Run, photos: Path, model_file: Path, tmp_path: Path) -> None:
    model = ("--model", model_file)
    (photos / "bad.png").write_text("no picture")
    result = run("encode", photos, tmp_path / "z", *model, *LATENTS)
    assert result.code == 1
    assert result.out.startswith("encoded 3 of 4 images, 1 failed in ")
    assert result.err.startswith("bad.png: not a readable image") and len(result.err.splitlines()) == 1
    assert run("encode", photos, tmp_path / "limit", *model, *LATENTS, "--max-pixels", 100).code == 1
    assert [e.path for e in Latents(tmp_path / "limit").entries] == ["a.png"]
    result = run("encode", photos / "bad.png", tmp_path / "none", *model)
    assert result.code == 1 and result.out.startswith("encoded 0 of 1 images, 1 failed in ")
    assert run("evaluate", model_file, photos, "--lpips-net", "none").code == 1
    assert run("evaluate", model_file, photos / "bad.png", "--lpips-net", "none").code == 2
    next((tmp_path / "z").glob("*.safetensors")).unlink()
    assert run("decode", tmp_path / "z", tmp_path / "out", *model).code == 1


def refuse(result: Result, reason: str) -> None:
    """Assert exit code 2, one line on stderr with the reason, and nothing on stdout."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("latent-codec: ") and len(result.err.splitlines()) == 1
    assert reason in result.err


def test_a_users_mistake_is_2_and_one_line_without_a_traceback(
    run: Run, photos: Path, streams: Path, latents: Path, model_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    out, model = tmp_path / "out", ("--model", model_file)
    refuse(run("encode", tmp_path / "none", out, *model), "no such image, folder or tar file")
    refuse(run("encode", f"{photos}/*.tif", out, *model), "no images there")
    refuse(run("encode", photos, out, "--model", "no-such-model"), "neither a file nor a shipped model")
    refuse(run("encode", photos, out, "--model", tmp_path / "file"), "not a safetensors file")
    refuse(run("encode", photos, tmp_path / "file", *model), "cannot be written into as a folder")
    refuse(run("encode", photos, out, *model, "--background", "white"), "'white' is not a colour")
    refuse(run("encode", photos, out, *model, "--batch-size", 0), "--batch-size 0")
    refuse(run("encode", photos, out, *model, "--workers", 0), "--workers 0")
    refuse(run("encode", photos, out, *model, "--tile", 90), "give 88 or 96")
    refuse(run("decode", photos, out, *model), "no latents there")
    refuse(run("info", tmp_path / "file"), "not a safetensors file")
    refuse(run("evaluate", model_file, tmp_path / "none", "--lpips-net", "none"), "no such image")
    refuse(run("evaluate", model_file, photos, "--lpips-backbone", tmp_path / "none"), "no such file")
    refuse(run("export", tmp_path / "none", out), "neither a file nor a shipped model")
    refuse(run("export", model_file, photos), "is a folder")
    refuse(run("export", model_file, out, "--images", 0), "at least 1")
    refuse(run("encode", photos, out, *model, "--store", "float32"), "--store is for --format safetensors")
    refuse(run("encode", photos, out, *model, "--flips"), "--flips is for --format safetensors")
    for flag in ("--step", "--bpp", "--psnr", "--max-bytes", "--sample"):
        refuse(run("encode", photos, out, *model, *LATENTS, flag, 1), f"{flag} is for --format lc")
    refuse(run("encode", photos, out, *model, *LATENTS, "--refine", 2), "--refine is for --format lc")
    refuse(run("encode", photos, out, *model, "--refine", -1), "--refine -1 must not be negative")
    refuse(run("encode", photos, out, *model, "--refine", 2, "--sample", 1), "leave out one of them")
    refuse(run("evaluate", model_file, photos, "--refine", 2), "give --rd as well")
    flags = ("--prior", "context", "--max-bytes", 9)
    refuse(run("encode", photos, out, *model, *LATENTS, *flags), "--max-bytes and --prior are for --format lc")
    refuse(run("encode", photos, out, *model, "--step", 1, "--bpp", 1), "--step 1 and --bpp 1 each decide")
    refuse(run("encode", photos, out, *model, "--sample", 2**64), "no seed of 64 bits")
    refuse(run("encode", photos, latents, *model, "--overwrite"), "holds latents for training on")
    refuse(run("decode", streams, out, *model, "--sample", 1), "give --sample to encode, not to decode")
    refuse(run("decode", streams, out, *model, "--max-pixels", 0), "refuses every image")
    refuse(run("decode", tmp_path / "none.lc", out, *model), "no .lc files there")
    refuse(run("info", latents, "--model", model_file), "only .lc files are compared")
    shutil.copytree(latents, streams, dirs_exist_ok=True)
    refuse(run("decode", streams, out, *model), "holds both latents")
    assert not out.exists() and (tmp_path / "file").read_text() == "mine"


def test_trouble_with_the_disk_is_2_and_one_line(
    run: Run, photos: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("latent_codec.storage.tensors.save_file", full)
    refuse(run("encode", photos, tmp_path / "out", "--model", model_file, *LATENTS), "No space left on device")
    refuse(run("export", model_file, tmp_path / "m.safetensors"), "No space left on device")


def test_a_bug_is_not_hidden_as_a_users_mistake(
    photos: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_lc, "find_images", mock.Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        cli.main(["encode", str(photos), str(tmp_path / "out"), "--model", str(model_file)])


def test_ctrl_c_is_130_and_what_was_made_before_stays(
    run: Run, three_units: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, last = Source.read_bytes, max(path.name for path in three_units.iterdir())

    def interrupt(source: Source) -> bytes:
        if source.name == last:
            raise KeyboardInterrupt
        return read(source)

    monkeypatch.setattr(Source, "read_bytes", interrupt)
    options = ("--model", model_file, *LATENTS, "--batch-size", 1, "--workers", 1)
    assert run("encode", three_units, tmp_path / "z", *options) == (130, "", "latent-codec: interrupted\n")
    assert {Path(name).suffix for name in files_of(tmp_path / "z")} == {".json", ".safetensors"}
    done = len(Latents(tmp_path / "z").entries)
    assert 1 <= done < 3
    monkeypatch.undo()
    assert run("encode", three_units, tmp_path / "z", *options).out.startswith(f"encoded {3 - done} of 3 images, ")


def test_models_are_described_measured_and_exported(
    run: Run, photos: Path, latents: Path, model_file: Path, codec: Codec, tmp_path: Path
) -> None:
    model, folder = run("info", model_file), run("info", latents)
    assert (model.code, folder.code) == (0, 0)
    assert codec.model_id in model.out and codec.model_id in folder.out and "3 images" in folder.out
    result = run("evaluate", model_file, photos, "--out", tmp_path / "out", "--lpips-net", "none")
    assert result.code == 0 and "psnr" in result.out and "disk_bpp" in result.out
    assert (tmp_path / "out" / "results.json").is_file()
    result = run("export", model_file, tmp_path / "m.safetensors", "--data", photos, "--images", 2, "--half")
    exported = Codec.load(tmp_path / "m.safetensors")
    assert result.code == 0 and exported.model_id in result.out
    assert exported.statistics is not None and exported.statistics.images == 2


@pytest.mark.parametrize("command", ["encode", "decode", "evaluate", "export", "info", "sample"])
def test_each_tool_is_its_own_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(cli, "main", called.append)
    monkeypatch.setattr(sys, "argv", [f"tools.{command}", "--help"])
    runpy.run_module(f"tools.{command}", run_name="__main__")
    assert called == [[command, "--help"]]
