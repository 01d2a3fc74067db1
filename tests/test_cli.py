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
from latent_codec.folders.resume.units import units
from latent_codec.images.read import DEFAULT_MAX_PIXELS
from latent_codec.images.sources import Source
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from latent_codec.version import __version__
from tests.conftest import Draw, files_of
from tests.support.data import ROOT
from tests.support.folder import images

LATENTS = "--format safetensors"


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


Do = Callable[[str], Result]


@pytest.fixture
def do(run: Run, tmp_path: Path, draw: Draw, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> Do:
    """do("encode photos out"): run a command line in a folder of photos, for the tiny codec unless it names a model."""
    for name, size in (("a.jpg", (24, 16)), ("a.png", (9, 7)), ("sub/b.png", (17, 33))):
        draw(tmp_path / "photos" / name, *size)
    (tmp_path / "tiny").symlink_to(model_file)
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> Result:
        unnamed = line.startswith(("encode", "decode")) and "--model" not in line
        return run(*line.split(), *(["--model", "tiny"] if unnamed else []))

    return call


def python(*args: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


TOOLS = ("encode", "decode", "info", "evaluate", "export", "sample")
COMMANDS = (*TOOLS, "import", "convert", "trim")


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
    assert all(command in done.stdout for command in COMMANDS)
    assert "--step FLOAT" in done.stdout and "{None}" not in done.stdout


def test_the_version_is_the_packages_and_a_closed_pipe_ends_without_a_traceback() -> None:
    command = ("-m", "latent_codec.cli", "--version")
    done = python(*command)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"latent-codec {__version__}\n", "")
    read, write = os.pipe()
    os.close(read)
    done = python(*command, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("line", ["", "bogus", "encode", "encode a", "encode a b --bogus"])
def test_wrong_usage_is_2_and_says_so_on_stderr(run: Run, line: str) -> None:
    result = run(*line.split())
    assert (result.code, result.out) == (2, "") and "help" in result.err


def test_the_pixel_limit_is_the_readers() -> None:
    encode, decode = Encode(src="a", dst=Path("b")), Decode(src=Path("a"), dst=Path("b"))
    assert encode.max_pixels == decode.max_pixels == DEFAULT_MAX_PIXELS


@pytest.mark.slow
def test_options_of_streams_reach_the_work(do: Do) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save("photos/clear.png")
    result = do("encode photos z --step 0.5 --sample 7 --prior factorized --background #102030 --batch-size 1")
    assert result.code == 0 and "bits per pixel" in result.out
    header = container.read(Path("z/clear.png.lc"))
    assert (header.step, header.prior, header.seed) == (512, "factorized", dither_seed(7, "clear.png"))
    assert header.geometry.background == "#102030"
    assert do("encode photos z").code == 0 and container.read(Path("z/clear.png.lc")).prior == "context"
    assert do("encode photos z --max-bytes 200 --step 0.02").code == 0
    assert max(map(len, files_of(Path("z")).values())) <= 200
    assert do("encode photos z --bpp 20").code == do("encode photos tars --tar").code == 0
    assert do("encode photos/a.png psnr --psnr 99").code == 1
    assert all(name.endswith(".tar") for name in files_of(Path("tars")))
    result = do("decode z out --image-format webp")
    assert (result.code, result.err) == (0, "") and result.out.startswith("decoded 4 of 4 images in ")
    sizes = {"a.jpg.webp": (24, 16), "a.png.webp": (9, 7), "clear.png.webp": (8, 8), "sub/b.png.webp": (17, 33)}
    assert {name: image.size for name, image in images(Path("out")).items()} == sizes
    assert do("decode z/a.png.lc one").code == 0 and files_of(Path("one")).keys() == {"a.png.png"}
    assert do("decode z few --max-pixels 100").code == 1
    assert files_of(Path("few")).keys() == {"a.png.png", "clear.png.png", "failures.jsonl"}


def test_options_of_latents_reach_the_work(do: Do) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save("photos/clear.png")
    flags = "--store float32 --background #102030 --workers 1 --device cpu --flips"
    assert do(f"encode photos z {LATENTS} {flags}").code == 0
    found = Latents(Path("z"))
    assert found.header.dtype == "float32" and found.header.flips
    assert {e.path: e.geometry.background for e in found.entries}["clear.png"] == "#102030"
    assert do(f"encode photos z {LATENTS}").code == 0 and Latents(Path("z")).header.dtype == "float16"
    assert do("decode z mode --image-format webp").code == do("decode z draw --image-format webp --sample 3").code == 0
    mode, drawn = files_of(Path("mode")), files_of(Path("draw"))
    assert mode.keys() == drawn.keys() and mode != drawn


def test_the_same_command_again_does_what_is_left(do: Do) -> None:
    assert do("encode photos z").code == 0
    before, everything = files_of(Path("z")), "encoded 3 of 3 images in "
    Path("z/a.png.lc").unlink()
    for i, (flags, said) in enumerate(
        {"": everything, "--check hash": "encoded 0 of 3 images, 3 skipped in ", "--check mtime": everything}.items()
    ):
        assert do(f"encode photos z {flags}").out.startswith(said)
        os.utime("photos/a.png", ns=(i, i))
    assert do("encode photos z --overwrite").out.startswith(everything) and files_of(Path("z")) == before


@pytest.fixture
def three_units(tmp_path: Path, draw: Draw) -> Path:
    """Return a folder of three images whose names begin a unit each."""
    names = [f"{i:03d}.png" for i in range(999)]
    first = [name for name in names if len(units([Source(n, Path(), 0, 1) for n in ("", name)])) == 2]
    for i, name in enumerate(first[:3]):
        draw(tmp_path / "units" / name, 9, 7, seed=i)
    return tmp_path / "units"


def test_shares_together_are_the_whole(do: Do, three_units: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2):
        result = do(f"encode {three_units} z --shard {i}/2")
        assert result.out.startswith(f"encoded {2 - i} of {2 - i} images in ")
    assert do(f"encode {three_units} z").out.startswith("encoded 0 of 3")
    refuse(do(f"encode {three_units} z --shard 2/2"), "--shard 2/2: give i/n")
    monkeypatch.setenv("RANK", "3")
    refuse(do(f"encode {three_units} z"), "RANK 3 of WORLD_SIZE 1")


def test_unusable_devices_are_named_and_a_launchers_processes_take_a_gpu_each(
    do: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in ("abacus", "meta", "cpu:x", *([] if torch.cuda.is_available() else ["cuda"])):
        refuse(do(f"encode photos z --device {device}"), f"--device {device} is not usable")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(torch, "zeros", lambda *_, device: (_ for _ in ()).throw(RuntimeError(device)))
        refuse(do("encode photos z"), f"--device {device} is not usable")


def test_images_that_fail_are_1_whether_some_or_all(do: Do) -> None:
    Path("photos/bad.png").write_text("no picture")
    result = do(f"encode photos z {LATENTS}")
    assert result.code == 1 and result.out.startswith("encoded 3 of 4 images, 1 failed in ")
    assert result.err.startswith("bad.png: not a readable image") and len(result.err.splitlines()) == 1
    assert do(f"encode photos limit {LATENTS} --max-pixels 100").code == 1
    assert [e.path for e in Latents(Path("limit")).entries] == ["a.png"]
    result = do("encode photos/bad.png none")
    assert result.code == 1 and result.out.startswith("encoded 0 of 1 images, 1 failed in ")
    assert do("evaluate tiny photos --lpips-net none").code == 1
    assert do("evaluate tiny photos/bad.png --lpips-net none").code == 2
    next(Path("z").glob("*.safetensors")).unlink()
    assert do("decode z out").code == 1


def refuse(result: Result, reason: str) -> None:
    """Assert exit code 2, one line on stderr with the reason, and nothing on stdout."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("latent-codec: ") and len(result.err.splitlines()) == 1
    assert reason in result.err


MISTAKES = {
    "encode none out": "no such image, folder or tar file",
    "encode photos out --model no-such-model": "neither a file nor a shipped model",
    "encode photos out --model file": "not a safetensors file",
    "encode photos file": "cannot be written into as a folder",
    **{f"encode photos out {flag} 0": f"{flag} 0" for flag in ("--batch-size", "--workers")},
    "encode photos out --tile 90": "give 88 or 96",
    "encode photos out --quality 101": "--quality 101 is outside 1 to 100",
    "encode photos out --quality 60 --bpp 1 --step 2": "--quality 60 and --step and --bpp each decide",
    **{
        f"encode photos out --{flag}": "is for --format safetensors"
        for flag in ("flips", "store float32", "crop", "resize 8", "buckets musubi")
    },
    f"encode photos out {LATENTS} --buckets sd": "--buckets sd is none of kohya-sdxl, kohya-sd, flux, musubi",
    "encode photos out --refine -1": "--refine -1 must not be negative",
    "encode photos out --refine 2 --sample 1": "leave out one of them",
    f"encode photos out --sample {2**64}": "no seed of 64 bits",
    "encode photos latents --overwrite": "holds latents for training on",
    "decode photos out": "no latents there",
    "decode none.lc out": "no .lc files there",
    "decode streams out --sample 1": "give --sample to encode, not to decode",
    "decode both out": "holds both latents",
    "info latents --model tiny": "only .lc files are compared",
    "evaluate tiny photos --refine 2": "give --rd as well",
    "evaluate tiny photos --lpips-backbone none": "no such file",
    f"encode photos out {LATENTS} --tar": "--tar is for --format lc",
    f"encode photos out {LATENTS} --prior context --max-bytes 9": "--max-bytes and --prior are for --format lc",
} | {
    f"encode photos out {LATENTS} {flag} 1": f"{flag} is for --format lc"
    for flag in ("--step", "--bpp", "--psnr", "--max-bytes", "--sample", "--refine")
}


@pytest.mark.slow
def test_a_users_mistake_is_2_and_one_line_without_a_traceback(do: Do) -> None:
    Path("file").write_text("mine")
    assert do("encode photos streams").code == do(f"encode photos latents {LATENTS}").code == 0
    shutil.copytree("streams", "both")
    shutil.copytree("latents", "both", dirs_exist_ok=True)
    for line, reason in MISTAKES.items():
        refuse(do(line), reason)
    assert not Path("out").exists() and Path("file").read_text() == "mine"


def test_trouble_with_the_disk_is_2_and_one_line(do: Do, monkeypatch: pytest.MonkeyPatch) -> None:
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("latent_codec.storage.tensors.save_file", full)
    refuse(do(f"encode photos out {LATENTS}"), "No space left on device")
    refuse(do("export tiny m.safetensors"), "No space left on device")


def test_a_bug_is_not_hidden_as_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Codec, "load", mock.Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        cli.main(["encode", "photos", "out"])


def test_ctrl_c_is_130_and_what_was_made_before_stays(do: Do, three_units: Path) -> None:
    read, last = Source.read_bytes, max(path.name for path in three_units.iterdir())

    def interrupt(source: Source) -> bytes:
        if source.name == last:
            raise KeyboardInterrupt
        return read(source)

    line = f"encode {three_units} z {LATENTS} --batch-size 1 --workers 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "read_bytes", interrupt)
        assert do(line) == (130, "", "latent-codec: interrupted\n")
    done = len(Latents(Path("z")).entries)
    assert 1 <= done < 3 and do(line).out.startswith(f"encoded {3 - done} of 3 images, ")


def test_models_are_described_measured_and_exported(do: Do, codec: Codec) -> None:
    assert do(f"encode photos latents {LATENTS}").code == 0
    model, folder = do("info tiny"), do("info latents")
    assert (model.code, folder.code) == (0, 0)
    assert codec.model_id in model.out and codec.model_id in folder.out and "3 images" in folder.out
    result = do("evaluate tiny photos --out out --lpips-net none")
    assert result.code == 0 and "psnr" in result.out and "disk_bpp" in result.out
    assert Path("out/results.json").is_file()
    result = do("export tiny m.safetensors --data photos --images 2 --half")
    exported = Codec.load(Path("m.safetensors"))
    assert result.code == 0 and exported.model_id in result.out
    assert exported.statistics is not None and exported.statistics.images == 2


@pytest.mark.parametrize("command", TOOLS)
def test_each_tool_is_its_own_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(cli, "main", called.append)
    monkeypatch.setattr(sys, "argv", [f"tools.{command}", "--help"])
    runpy.run_module(f"tools.{command}", run_name="__main__")
    assert called == [[command, "--help"]]
