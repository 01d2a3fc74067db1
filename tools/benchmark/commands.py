"""Time whole commands beside their networks alone, and measure how much memory they take."""

import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.errors import UserError
from latent_codec.images.geometry import pad
from latent_codec.images.sources import find_images
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.prior.quantizer import STEP_ONE
from tools.benchmark.other_models import sd_codec
from tools.benchmark.record import OnImages, now

_SMALLEST = 0.05
"""Seconds that a command may report as 0.0."""


class CommandRun(NamedTuple):
    """Hold what a command took that ended well."""

    seconds: float
    """Seconds of the whole process, from its start."""
    peak_bytes: int
    """Peak resident memory."""
    text: str

    @property
    def own_seconds(self) -> float:
        """Return the seconds that the command reports: without the process' start and end."""
        found = re.search(r" in ([\d.]+) s", self.text)
        assert found is not None
        return float(found[1])

    @property
    def stages(self) -> dict[str, float]:
        """Return the seconds of each stage that the command reports."""
        last = self.text.splitlines()[-1]
        return {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) s(?=,|$)", last)}


def run(*argv: str | Path) -> CommandRun:
    """Run `python -m ARGV`; raises `UserError` if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *map(str, argv)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read().strip()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(map(str, argv))}: ended with exit code {process.returncode}")
    return CommandRun(time.perf_counter() - started, usage.ru_maxrss * 1024, text)


def gather(where: str, folder: Path, count: int) -> Path:
    """Copy the first `count` images into a folder; if there are fewer, repeat them under other names."""
    sources = find_images(where)
    folder.mkdir(parents=True)
    for i in range(count):
        source = sources[i % len(sources)]
        (folder / f"{i:06d}{Path(source.name).suffix}").write_bytes(source.read_bytes())
    return folder


Contender = Callable[[int], Any]
"""Called with the number of the round; a command returns its `CommandRun`."""


def time_in_turn(contenders: Mapping[str, Contender], rounds: int) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Time each contender once a round, in turn; return their median seconds, and what they returned."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, list[Any]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name, call in contenders.items():
            started = now()
            found[name].append(call(i))
            seconds[name].append(now() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}, found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Folder(OnImages):
    model: str = "photo"
    count: int = 1000
    """Number of photographs; those in DIR are repeated if they are fewer."""
    rounds: int = 3
    """Rounds, in each of which everything is timed once."""
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False

    def run(self) -> None:
        """Time everything once a round and report images per second, also as shares of the network's alone."""
        options = {name: getattr(self, name) for name in ("device", "dtype", "batch_size", "compile")}
        runner = load(self.model, ComputeOptions(workers=1, **options))
        with tempfile.TemporaryDirectory() as temporary:
            src = gather(self.dir, Path(temporary, "photos"), self.count)
            images = [pad(source.read().pixels, runner.codec.factor) for source in find_images(src)]
            if len({image.shape for image in images}) > 1:
                raise UserError(f"{self.dir}: has images of several sizes; give images of one size")
            seconds, found = time_in_turn(self.contenders(runner, src, images), self.rounds)
        base = next(iter(seconds))
        share, results = f"share_of_{base.replace(' ', '_')}", {}
        for name, taken in seconds.items():
            results[name] = {"images_per_second": self.count / taken, share: seconds[base] / taken}
            if found[name][0] is not None:
                own = max(statistics.median(ran.own_seconds for ran in found[name]), _SMALLEST)
                results[name] |= {f"{share}_after_start": seconds[base] / own}
                results[name] |= {"seconds_in_stages": found[name][-1].stages}
        names = ("rounds", "batch_size", "model", "dtype", "compile")
        self.report(results, images=self.count, **{name: getattr(self, name) for name in names})

    def contenders(self, runner: Runner, src: Path, images: Sequence[torch.Tensor]) -> dict[str, Contender]:
        """Return what is timed, the network alone first; `images` are those in `src`, padded."""
        raise NotImplementedError

    def _command(self, *argv: str | Path) -> CommandRun:
        flags = ["--model", self.model, "--device", self.device, "--dtype", self.dtype]
        return run(*argv, *flags, "--batch-size", f"{self.batch_size}", *(["--compile"] if self.compile else []))

    def _batches(self, images: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
        return (images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode(_Folder):
    """Time `encode` of a folder, from the start of the process to its end, beside the encoder alone."""

    def contenders(self, runner: Runner, src: Path, images: Sequence[torch.Tensor]) -> dict[str, Contender]:
        """Return the encoder, with the entropy coder, and the commands for latents and for .lc files."""
        coder = StreamCodec(runner.codec, self.device)
        geometries = [source.read().geometry for source in find_images(src)]

        def network(_: int) -> None:
            for batch in self._batches(images):
                runner.encode(batch)

        def network_and_coding(_: int) -> None:
            for start, batch in enumerate(self._batches(images)):
                scaled = [coder.scale(mean, STEP_ONE, None) for mean in runner.encode(batch).mean]
                coder.compress(list(zip(scaled, geometries[start * self.batch_size :], strict=False)))

        def command(name: str, *flags: str) -> Contender:
            return lambda i: self._command("tools.encode", src, src.parent / f"{name} {i}", *flags)

        return {
            "encoder alone": network,
            "encoder and entropy coding alone": network_and_coding,
            "encode --format safetensors": command("latents", "--format", "safetensors"),
            "encode (.lc files)": command("streams"),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(_Folder):
    """Time `decode` of a folder, from the start of the process to its end, beside the decoder alone."""

    def contenders(self, runner: Runner, src: Path, images: Sequence[torch.Tensor]) -> dict[str, Contender]:
        """Return the decoder, and the commands for latents and for .lc files."""
        latents = [mean for batch in self._batches(images) for mean in runner.encode(batch).mean]
        self._command("tools.encode", src, src.parent / "latents", "--format", "safetensors")
        self._command("tools.encode", src, src.parent / "streams")

        def network(_: int) -> None:
            for batch in self._batches(latents):
                runner.decode_uint8(batch)

        def command(kind: str, *flags: str) -> Contender:
            return lambda i: self._command(
                "tools.decode", src.parent / kind, src.parent / f"{kind} {i} {flags}", *flags
            )

        return {
            "decoder alone": network,
            "decode of latents to PNG": command("latents"),
            "decode of latents to JPEG": command("latents", "--image-format", "jpg"),
            "decode of .lc files to PNG": command("streams"),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(OnImages):
    """Time `encode` beside a plain loop (`diffusers_loop.py`), both with the SD shape and equal weights."""

    count: int = 24
    rounds: int = 3
    batch_size: int = 4

    def run(self) -> None:
        """Time both and report images per second."""
        with tempfile.TemporaryDirectory() as temporary:
            src, model = gather(self.dir, Path(temporary, "photos"), self.count), Path(temporary, "sd.safetensors")
            sd_codec().save(model)
            flags = ["--batch-size", f"{self.batch_size}", "--device", self.device]

            def ours(i: int) -> CommandRun:
                latents = ["--model", f"{model}", "--format", "safetensors"]
                return run("tools.encode", src, Path(temporary, f"ours {i}"), *latents, *flags)

            def theirs(i: int) -> CommandRun:
                dst = Path(temporary, f"theirs {i}")
                return run("tools.benchmark.diffusers_loop", src, dst, "--weights", model, *flags)

            base = "loop over diffusers' AutoencoderKL"
            seconds, _ = time_in_turn({"encode --format safetensors": ours, base: theirs}, self.rounds)
        results = {
            name: {"images_per_second": self.count / s, "times_as_fast": seconds[base] / s}
            for name, s in seconds.items()
        }
        self.report(results, images=self.count, rounds=self.rounds, batch_size=self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(OnImages):
    """Measure the peak memory of `encode` and `decode` by the number of images."""

    counts: tuple[int, ...] = (1000, 5000)
    model: str = "photo"

    def run(self) -> None:
        """Run the commands and report their peaks."""
        results: dict[str, dict[str, Any]] = {"info": {"peak_mb": run("tools.info", self.model).peak_bytes / 1e6}}
        flags = ["--model", self.model, "--device", self.device]
        with tempfile.TemporaryDirectory() as temporary:
            for count in self.counts:
                src = gather(self.dir, Path(temporary, f"{count}"), count)
                for form in ("safetensors", "lc"):
                    there, back = (Path(temporary, f"{form} {count} {way}") for way in ("there", "back"))
                    ways = {
                        "encode": run("tools.encode", src, there, "--format", form, *flags),
                        "decode": run("tools.decode", there, back, "--image-format", "jpg", *flags),
                    }
                    for way, ran in ways.items():
                        results.setdefault(f"{way} {form}", {})[f"peak_mb of {count}"] = ran.peak_bytes / 1e6
        self.report(results, model=self.model)
