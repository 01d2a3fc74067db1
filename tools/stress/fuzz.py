"""Damage streams and decode them: each must be refused, or be exactly what an encoder writes.

    python -m tools.stress.fuzz --count 1000000 --seed 0

A mutant is a pure function of (seed, number). The process has limited memory, and is killed if it hangs.
"""

import dataclasses
import multiprocessing
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from latent_codec.bitstream.container import Stream, unpack
from latent_codec.bitstream.stream_codec import StreamReader
from latent_codec.errors import UserError
from latent_codec.images.geometry import crop
from latent_codec.model.codec import Codec
from latent_codec.prior.priors import PriorKind
from latent_codec.prior.quantizer import Quantized
from latent_codec.program import say
from tools.program import main
from tools.stress.mutants import Kind, Mutant, mutate

GOLDEN = Path(__file__).parents[2] / "tests" / "bitstream" / "golden" / "2"


class Verdict(NamedTuple):
    """Say what became of a mutant, and why."""

    outcome: Literal["refused", "decoded", "WRONG"]
    reason: str


class Judge:
    """Decode mutants and judge the result."""

    def __init__(self, codec: Codec, streams: Sequence[bytes]) -> None:
        self._codec, self._streams, self._reader = codec, set(streams), StreamReader(codec, "cpu")

    def judge(self, mutants: Sequence[Mutant]) -> list[Verdict]:
        """Return a verdict for each mutant."""
        verdicts: dict[int, Verdict] = {}
        groups: defaultdict[Any, list[tuple[int, Stream]]] = defaultdict(list)
        for i, mutant in enumerate(mutants):
            try:
                stream = unpack(mutant.data)
                groups[self._reader.check(stream)].append((i, stream))
            except UserError as error:
                verdicts[i] = Verdict("refused", str(error))
            except Exception as error:  # any other exception is a finding
                verdicts[i] = _crashed(error)
        for (kind, _), members in groups.items():
            found = self._decode(kind, [stream for _, stream in members])
            for (i, stream), result in zip(members, found, strict=True):
                verdicts[i] = self._verdict(mutants[i], stream, result)
        return [verdicts[i] for i in range(len(mutants))]

    def _decode(self, kind: PriorKind, streams: list[Stream]) -> Sequence[Quantized | Exception]:
        try:
            return self._reader.coders[kind].read(streams)
        except Exception as error:
            if len(streams) == 1:
                return [error]
            return [one for stream in streams for one in self._decode(kind, [stream])]  # find the one that fails

    def _verdict(self, mutant: Mutant, stream: Stream, result: Quantized | Exception) -> Verdict:
        """Allow what decodes only if it is one of the streams or, with new checksums, if it encodes back to itself."""
        if isinstance(result, UserError):
            return Verdict("refused", str(result))
        if isinstance(result, Exception):
            return _crashed(result)
        if mutant.data in self._streams:
            return Verdict("decoded", "nothing was changed")
        if mutant.kind == "bytes":
            return Verdict("WRONG", "decoded, although its checksums are those of something else")
        streams, geometry = self._reader.coders[stream.prior], stream.geometry
        try:
            again = streams.compress([(result.scaled(), geometry)], stream.groups)[0].data
            pixels = crop(self._codec.decode_uint8(streams.dequantize(result)[None])[0], geometry)
        except Exception as error:
            return _crashed(error)
        if again != mutant.data:
            return Verdict("WRONG", "decoded, but no encoder writes it")
        if pixels.shape != (3, geometry.height, geometry.width):
            return Verdict("WRONG", f"decoded to {tuple(pixels.shape)}")
        return Verdict("decoded", "a sound stream of something else")


def _crashed(error: Exception) -> Verdict:
    return Verdict("WRONG", f"{type(error).__name__}: {error}")


_NUMBERS = re.compile(r"(stream id|this one) \w+|\d+(x\d+)?")


class FuzzReport(NamedTuple):
    """Count outcomes and reasons."""

    outcomes: Counter[tuple[Kind, str]]
    reasons: Counter[str]
    """Messages, with # in place of numbers."""
    wrong: list[tuple[int, Kind, str]]
    """Number, kind and message of each finding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuzzOptions:
    """Choose the mutants and their limits."""

    count: int = 1_000_000
    """Number of mutants."""
    seed: int = 0
    """Seed of the mutants."""
    model: Path = GOLDEN / "tiny.safetensors"
    streams: tuple[Path, ...] = tuple(sorted(GOLDEN.glob("*.lc")))
    """Streams of the model to damage; short ones are fast."""
    megabytes: int = 1024
    """Memory that may be taken beyond that at the start."""
    patience: float = 120.0
    """Seconds that a thousand mutants may take."""

    def run(self) -> int:
        """Print outcomes, reasons and findings, and return 1 if there is a finding."""
        report = run(self)
        for (kind, outcome), n in sorted(report.outcomes.items()):
            say(f"{kind:8} {outcome:8} {n:9}")
        say("")
        for reason, n in report.reasons.most_common():
            say(f"{n:9} {reason}")
        for number, kind, reason in report.wrong:
            say(f"WRONG: mutant {number} of seed {self.seed} ({kind}): {reason}")
        return 1 if report.wrong else 0


def run(options: FuzzOptions) -> FuzzReport:
    """Judge mutants in a separate process; if it dies, or exceeds a limit of the options, that is reported as wrong."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(sender, options), daemon=True)
    child.start()
    sender.close()
    report = FuzzReport(Counter(), Counter(), [])
    for numbers in tqdm(_chunks(options.count), "fuzz", disable=None):
        try:
            chunk = receiver.recv() if receiver.poll(options.patience) else None
        except EOFError:
            chunk = None
        if chunk is None:
            child.join(60 if receiver.poll(0) else 0)  # the pipe of a dead process reads as ended
            ending = "stands still" if child.exitcode is None else f"died with code {child.exitcode}"
            report.wrong.append((numbers.start, "bytes", f"the process {ending} within 1000 mutants from here on"))
            break
        report.outcomes.update(chunk.outcomes)
        report.reasons.update(chunk.reasons)
        report.wrong.extend(chunk.wrong)
    child.kill()
    child.join()
    return report


def _chunks(count: int) -> list[range]:
    return [range(start, min(start + 1000, count)) for start in range(0, count, 1000)]


def _work(sender: Any, options: FuzzOptions) -> None:
    torch.set_num_threads(1)
    streams = [path.read_bytes() for path in options.streams]
    judge = Judge(Codec.load(options.model), streams)
    judge.judge([Mutant("bytes", data) for data in streams])  # loads whatever is loaded on first use
    _limit_memory(options.megabytes)
    with torch.inference_mode():
        for numbers in _chunks(options.count):
            mutants = [mutate(streams, options.seed, n) for n in numbers]
            report = FuzzReport(Counter(), Counter(), [])
            for number, mutant, verdict in zip(numbers, mutants, judge.judge(mutants), strict=True):
                report.outcomes[mutant.kind, verdict.outcome] += 1
                report.reasons[_NUMBERS.sub("#", verdict.reason)] += 1
                if verdict.outcome == "WRONG":
                    report.wrong.append((number, mutant.kind, verdict.reason))
            sender.send(report)


def _limit_memory(megabytes: int) -> None:
    """Limit the address space where the system supports it (Linux)."""
    status = Path("/proc/self/statm")
    if status.is_file():
        import resource

        size = int(status.read_text().split()[0]) * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    main("tools.stress.fuzz", FuzzOptions, __doc__)
