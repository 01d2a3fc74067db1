"""Test what the command line prints where, and its exit codes: 0, 1 some images failed, 2 a mistake, 130 Ctrl-C."""

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


@pytest.mark.parametrize("args", [["--help"], ["--version"]])
def test_a_closed_pipe_ends_without_a_traceback(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "latent_codec.cli", *args]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_version_is_the_packages() -> None:
    done = python("-m", "latent_codec.cli", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"latent-codec {__version__}\n", "")


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


def test_images_become_small_files_and_images_again(
    run: Run, photos: Path, streams: Path, model_file: Path, tmp_path: Path
) -> None:
    assert set(files_of(streams)) == {"a.jpg.lc", "a.png.lc", "sub/b.png.lc"}
    result = run("decode", streams, tmp_path / "out", "--model", model_file, "--image-format", "webp")
    assert (result.code, result.err) == (0, "")
    sizes = {f.relative_to(tmp_path / "out").as_posix(): Image.open(f).size for f in (tmp_path / "out").rglob("*.webp")}
    assert sizes == {"a.jpg.webp": (24, 16), "a.png.webp": (9, 7), "sub/b.png.webp": (17, 33)}
    assert run("decode", streams / "a.png.lc", tmp_path / "one", "--model", model_file).code == 0
    assert set(files_of(tmp_path / "one")) == {"a.png.png"}


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
    assert run("encode", photos, z, *model, "--psnr", 99).code == 1
    assert run("decode", z, out, *model, "--max-pixels", 100).code == 1
    assert set(files_of(out)) == {"a.png.png", "clear.png.png", "failures.jsonl"}
    assert run("decode", z, out, *model).out.startswith("decoded 4 of 4 images in ")
    assert run("decode", z, out, *model).out.startswith("decoded 0 of 4 images, 4 skipped in ")
    assert run("decode", z, out, *model, "--overwrite").out.startswith("decoded 4 of 4 images in ")


def test_the_same_command_again_does_what_is_left(
    run: Run, photos: Path, streams: Path, latents: Path, model_file: Path, tmp_path: Path
) -> None:
    model = ("--model", model_file)
    before = files_of(streams), files_of(latents)
    (streams / "a.png.lc").unlink()
    assert run("encode", photos, streams, *model).out.startswith("encoded 3 of 3 images in ")
    assert run("encode", photos, latents, *model, *LATENTS).out.startswith("encoded 0 of 3 images, 3 skipped in ")
    assert (files_of(streams), files_of(latents)) == before
    touched = photos / "a.png"
    os.utime(touched, ns=(0, 0))
    assert run("encode", photos, streams, *model, "--check", "hash").out.startswith("encoded 0 of 3 images, 3 skipped")
    os.utime(touched, ns=(1, 1))
    assert run("encode", photos, streams, *model, "--check", "mtime").out.startswith("encoded 3 of 3 images in ")
    assert run("encode", photos, streams, *model, "--overwrite").out.startswith("encoded 3 of 3 images in ")
    assert (files_of(streams), files_of(latents)) == before
    shutil.rmtree(streams / ".latent_codec")
    refuse(run("encode", photos, streams, *model), "exists already")


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


def test_processes_that_a_launcher_starts_take_a_gpu_each(
    run: Run, photos: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(torch, "zeros", lambda *_, device: (_ for _ in ()).throw(RuntimeError(device)))
        refuse(run("encode", photos, tmp_path / "z", "--model", model_file), f"--device {device} is not usable")


def test_flags_without_sense_are_refused_in_one_sentence(
    run: Run, photos: Path, streams: Path, latents: Path, model_file: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", ("--model", model_file)
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
    refuse(run("encode", photos, out, *model, "--step", 99), "outside")
    refuse(run("encode", photos, out, *model, "--bpp", 0), "--bpp 0 must be")
    refuse(run("encode", photos, out, *model, "--max-bytes", 0), "--max-bytes 0 leaves no room")
    refuse(run("encode", photos, out, *model, "--sample", 2**64), "no seed of 64 bits")
    refuse(run("encode", photos, latents, *model, "--overwrite"), "holds latents for training on")
    refuse(run("decode", streams, out, *model, "--sample", 1), "give --sample to encode, not to decode")
    refuse(run("decode", streams, out, *model, "--max-pixels", 0), "refuses every image")
    refuse(run("decode", tmp_path / "none.lc", out, *model), "no .lc files there")
    refuse(run("info", latents, "--model", model_file), "only .lc files are compared")
    shutil.copytree(latents, streams, dirs_exist_ok=True)
    refuse(run("decode", streams, out, *model), "holds both latents")
    assert not out.exists()


def test_options_reach_the_work(run: Run, photos: Path, model_file: Path, tmp_path: Path) -> None:
    model = ("--model", model_file)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(photos / "clear.png")
    options = ("--store", "float32", "--background", "#102030", "--batch-size", 1, "--workers", 1, "--device", "cpu")
    assert run("encode", photos, tmp_path / "z", *model, *LATENTS, *options).code == 0
    found = Latents(tmp_path / "z")
    assert found.header.dtype == "float32"
    assert {e.path: e.geometry.background for e in found.entries}["clear.png"] == "#102030"
    assert run("encode", photos, tmp_path / "z", *model, *LATENTS).code == 0
    assert Latents(tmp_path / "z").header.dtype == "float16"
    assert run("decode", tmp_path / "z", tmp_path / "out", *model, "--image-format", "webp").code == 0
    assert {Path(name).suffix for name in files_of(tmp_path / "out")} == {".webp"}


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
    run: Run, photos: Path, latents: Path, model_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    out, model = tmp_path / "out", ("--model", model_file)
    refuse(run("encode", tmp_path / "none", out, *model), "no such image, folder or tar file")
    refuse(run("encode", f"{photos}/*.tif", out, *model), "no images there")
    refuse(run("encode", photos, out, "--model", "no-such-model"), "neither a file nor a shipped model")
    refuse(run("encode", photos, out, "--model", tmp_path / "file"), "not a safetensors file")
    refuse(run("encode", photos, tmp_path / "file", *model), "cannot be written into as a folder")
    refuse(run("encode", photos, out, *model, "--background", "white"), "'white' is not a colour")
    refuse(run("encode", photos, out, *model, "--max-pixels", 0), "refuses every image")
    refuse(run("encode", photos, out, *model, "--batch-size", 0), "--batch-size 0")
    refuse(run("encode", photos, out, *model, "--workers", 0), "--workers 0")
    refuse(run("encode", photos, out, *model, "--tile", 90), "give 88 or 96")
    refuse(run("decode", photos, out, *model), "no latents there")
    refuse(run("decode", tmp_path / "none", out, *model), "no latents there")
    refuse(run("decode", latents, tmp_path / "file", *model), "cannot be written into as a folder")
    refuse(run("info", tmp_path / "file"), "not a safetensors file")
    refuse(run("info", "no-such-model"), "neither a file nor a shipped model")
    refuse(run("evaluate", model_file, tmp_path / "none", "--lpips-net", "none"), "no such image")
    refuse(run("evaluate", model_file, photos, "--lpips-backbone", tmp_path / "none"), "no such file")
    refuse(run("export", tmp_path / "none", out), "neither a file nor a shipped model")
    refuse(run("export", model_file, photos), "is a folder")
    refuse(run("export", model_file, out, "--images", 0), "at least 1")
    assert not out.exists() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("device", ["abacus", "meta", "cpu:x", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_cannot_be_used_is_a_users_mistake(
    run: Run, photos: Path, model_file: Path, tmp_path: Path, device: str
) -> None:
    result = run("encode", photos, tmp_path / "out", "--model", model_file, "--device", device)
    refuse(result, f"--device {device} is not usable")


def test_trouble_with_the_disk_is_2_and_one_line(
    run: Run, photos: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latent_codec.storage.tensors.save_file", full)
    refuse(run("encode", photos, tmp_path / "out", "--model", model_file, *LATENTS), "No space left on device")
    refuse(run("export", model_file, tmp_path / "m.safetensors"), "No space left on device")


def test_a_bug_is_not_hidden_as_a_users_mistake(
    photos: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(encode_lc, "find_images", broken)
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


def test_info_says_what_a_model_and_latents_are(run: Run, latents: Path, model_file: Path, codec: Codec) -> None:
    model, folder = run("info", model_file), run("info", latents)
    assert (model.code, folder.code) == (0, 0)
    assert codec.model_id in model.out and codec.model_id in folder.out
    assert "3 images" in folder.out


def test_evaluate_prints_its_table_and_keeps_its_results(
    run: Run, photos: Path, model_file: Path, tmp_path: Path
) -> None:
    result = run("evaluate", model_file, photos, "--out", tmp_path / "out", "--lpips-net", "none")
    assert result.code == 0
    assert "psnr" in result.out and "disk_bpp" in result.out
    assert (tmp_path / "out" / "results.json").is_file()


def test_export_writes_a_model_and_says_which(run: Run, photos: Path, model_file: Path, tmp_path: Path) -> None:
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
