"""Whole commands against their networks alone: what reading, coding and writing cost, and how much memory."""

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
import tyro

from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.errors import UserError
from latent_codec.images.geometry import pad
from latent_codec.images.sources import find_images
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.prior.quantizer import STEP_ONE
from tools.benchmark.other_models import sd_codec
from tools.benchmark.record import machine, report

_SMALLEST = 0.05
"""Seconds that a command may say are 0.0."""


class Ran(NamedTuple):
    """A command that has ended well."""

    seconds: float
    """Of the whole process, from its start."""
    peak_bytes: int
    """Of memory, resident."""
    text: str

    @property
    def own_seconds(self) -> float:
        """What the command says: those of the process but for its start and its end."""
        found = re.search(r" in ([\d.]+) s", self.text)
        assert found is not None
        return float(found[1])

    @property
    def stages(self) -> dict[str, float]:
        return {
            name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) s(?=,|$)", self.text.splitlines()[-1])
        }


def run(*argv: str | Path) -> Ran:
    """`python -m ARGV`; raises `UserError` if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *map(str, argv)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read().strip()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(map(str, argv))}: ended with exit code {process.returncode}")
    return Ran(time.perf_counter() - started, usage.ru_maxrss * 1024, text)


def gather(where: str, folder: Path, count: int) -> Path:
    """The first `count` images found, as files of a folder; if there are fewer, they come again by other names."""
    sources = find_images(where)
    folder.mkdir(parents=True)
    for i in range(count):
        source = sources[i % len(sources)]
        (folder / f"{i:06d}{Path(source.name).suffix}").write_bytes(source.read_bytes())
    return folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Folder:
    dir: tyro.conf.Positional[str]
    """Photographs of one size."""
    model: str = "photo"
    count: int = 1000
    rounds: int = 3
    """Everything is timed once per round, in turn."""
    batch_size: int = 8
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    out: Path | None = None
    """JSON file for the results."""

    @property
    def flags(self) -> list[str]:
        flags = ["--model", self.model, "--device", self.device, "--dtype", self.dtype]
        return [*flags, "--batch-size", f"{self.batch_size}", *(["--compile"] if self.compile else [])]

    def runner(self) -> Runner:
        codec = Codec.load(self.model, self.device).to(memory_format=torch.channels_last)
        return Runner(
            codec,
            ComputeOptions(
                device=self.device, dtype=self.dtype, batch_size=self.batch_size, workers=1, compile=self.compile
            ),
        )

    def batches(self, images: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
        return (images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size))

    def read(self, folder: Path, factor: int) -> list[torch.Tensor]:
        images = [pad(source.read().pixels, factor) for source in find_images(folder)]
        if len({image.shape for image in images}) > 1:
            raise UserError(f"{self.dir}: images of several sizes; the networks alone are timed on those of one")
        return images

    def finish(self, taken: "Taken", base: str) -> None:
        """Report images per second, medians over the rounds, as shares of those of `base`."""
        rates = {name: self.count / statistics.median(seconds) for name, seconds in taken.seconds.items()}
        share = f"share_of_{base.replace(' ', '_')}"
        results: dict[str, dict[str, Any]] = {
            name: {"images_per_second": rate, share: rate / rates[base]} for name, rate in rates.items()
        }
        for name, commands in taken.commands.items():
            own = self.count / max(statistics.median(ran.own_seconds for ran in commands), _SMALLEST)
            results[name] |= {f"{share}_after_start": own / rates[base], "seconds_in_stages": commands[-1].stages}
        about = {"set": Path(self.dir).name, "images": self.count, "rounds": self.rounds, "batch_size": self.batch_size}
        about |= {"model": self.model, "dtype": self.dtype, "compile": self.compile}
        report(results, about | machine(self.device), self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode(_Folder):
    """Time `encode` of a folder, from the start of the process to its end, beside the encoder alone."""

    def run(self) -> None:
        runner = self.runner()
        coder = StreamCodec(runner.codec, self.device)
        with tempfile.TemporaryDirectory() as temporary:
            src = gather(self.dir, Path(temporary, "photos"), self.count)
            images = self.read(src, runner.codec.factor)
            geometries = [source.read().geometry for source in find_images(src)]

            def network(_: int) -> None:
                for batch in self.batches(images):
                    runner.encode(batch)

            def network_and_coding(_: int) -> None:
                for start, batch in enumerate(self.batches(images)):
                    means = runner.encode(batch).mean
                    scaled = [coder.scale(mean, STEP_ONE, None) for mean in means]
                    coder.compress(list(zip(scaled, geometries[start * self.batch_size :], strict=False)))

            def command(name: str, *flags: str) -> Contender:
                return lambda i: run("tools.encode", src, Path(temporary, f"{name} {i}"), *self.flags, *flags)

            taken = measure(
                {
                    "encoder alone": network,
                    "encoder and entropy coding alone": network_and_coding,
                    "encode --format safetensors": command("latents", "--format", "safetensors"),
                    "encode (.lc files)": command("streams"),
                },
                self.rounds,
            )
        self.finish(taken, "encoder alone")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(_Folder):
    """Time `decode` of a folder, from the start of the process to its end, beside the decoder alone."""

    def run(self) -> None:
        runner = self.runner()
        with tempfile.TemporaryDirectory() as temporary:
            src = gather(self.dir, Path(temporary, "photos"), self.count)
            images = self.read(src, runner.codec.factor)
            latents = [mean for batch in self.batches(images) for mean in runner.encode(batch).mean]
            run("tools.encode", src, Path(temporary, "latents"), *self.flags, "--format", "safetensors")
            run("tools.encode", src, Path(temporary, "streams"), *self.flags)

            def network(_: int) -> None:
                for batch in self.batches(latents):
                    runner.decode_uint8(batch)

            def command(kind: str, *flags: str) -> Contender:
                return lambda i: run(
                    "tools.decode", Path(temporary, kind), Path(temporary, f"{kind} {i} {flags}"), *self.flags, *flags
                )

            taken = measure(
                {
                    "decoder alone": network,
                    "decode of latents to PNG": command("latents"),
                    "decode of latents to JPEG": command("latents", "--image-format", "jpg"),
                    "decode of .lc files to PNG": command("streams"),
                },
                self.rounds,
            )
        self.finish(taken, "decoder alone")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Time `encode` beside the obvious script (`diffusers_loop.py`), both with the SD shape and equal weights."""

    dir: tyro.conf.Positional[str]
    count: int = 24
    rounds: int = 3
    batch_size: int = 4
    device: str = "cpu"
    out: Path | None = None

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            src, model = gather(self.dir, Path(temporary, "photos"), self.count), Path(temporary, "sd.safetensors")
            sd_codec().save(model)
            flags = ["--batch-size", f"{self.batch_size}", "--device", self.device]

            def ours(i: int) -> Ran:
                latents = ["--model", f"{model}", "--format", "safetensors"]
                return run("tools.encode", src, Path(temporary, f"ours {i}"), *latents, *flags)

            def theirs(i: int) -> Ran:
                return run(
                    "tools.benchmark.diffusers_loop", src, Path(temporary, f"theirs {i}"), "--weights", model, *flags
                )

            names = {"encode --format safetensors": ours, "loop over diffusers' AutoencoderKL": theirs}
            taken = measure(names, self.rounds)
        rates = {name: self.count / statistics.median(seconds) for name, seconds in taken.seconds.items()}
        base = rates["loop over diffusers' AutoencoderKL"]
        results = {name: {"images_per_second": r, "times_as_fast": r / base} for name, r in rates.items()}
        about = {"set": Path(self.dir).name, "images": self.count, "rounds": self.rounds, "batch_size": self.batch_size}
        report(results, about | machine(self.device), self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory of `encode` and `decode` by the number of images."""

    dir: tyro.conf.Positional[str]
    counts: tuple[int, ...] = (1000, 5000)
    model: str = "photo"
    device: str = "cpu"
    out: Path | None = None

    def run(self) -> None:
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
        about = {"set": Path(self.dir).name, "model": self.model}
        report(results, about | machine(self.device), self.out)


Contender = Callable[[int], Ran | None]
"""Given the number of the round; what ran of a command."""


class Taken(NamedTuple):
    """By contender, one for each round."""

    seconds: dict[str, list[float]]
    commands: dict[str, list[Ran]]
    """Of those that are."""


def measure(contenders: Mapping[str, Contender], rounds: int) -> Taken:
    """Each once a round, in turn."""
    taken = Taken({name: [] for name in contenders}, {})
    for i in range(rounds):
        for name, call in contenders.items():
            started = time.perf_counter()
            ran = call(i)
            taken.seconds[name].append(time.perf_counter() - started)
            if ran is not None:
                taken.commands.setdefault(name, []).append(ran)
    return taken
