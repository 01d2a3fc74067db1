"""What the page's figures are read from: JSON files of the model, each measured where there is none of it yet."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from latent_codec.bitstream.refinement import USUAL_ROUNDS
from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.errors import UserError
from latent_codec.evaluation.rate_distortion.measure import rate_distortion
from latent_codec.inference.runner import Runner
from latent_codec.storage.files import write_text
from tools.benchmark.quality import Quality
from tools.benchmark.record import machine
from tools.results.crops import Sheet, make_sheet
from train.loop.provenance import git_commit

STEPS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
"""Those of `latent-codec evaluate --rd`."""


class Measuring(NamedTuple):
    """What to measure on and with; needed only where a file is missing or another model's."""

    model: str
    data: str | None
    others: tuple[str, ...]
    """Models to set beside this one as a first stage."""
    taef2: Path | None
    lpips_net: Literal["alex", "squeeze", "vgg"] | None
    lpips_backbone: Path | None
    steps: tuple[float, ...] = STEPS
    refine: int = USUAL_ROUNDS

    def where(self, missing: Path) -> str:
        if self.data is None:
            raise UserError(f"{missing}: holds nothing of this model; give --data DIR, the images to measure it on")
        return self.data


class Measured(NamedTuple):
    """Each the content of one JSON file."""

    rd: dict[str, Any]
    quality: dict[str, Any]
    crops: dict[str, Any]


def gather(
    runner: Runner, measuring: Measuring, sheet: Sheet, *, rd: Path, quality: Path, crops: Path, anew: bool
) -> Measured:
    """Read the three files, and first measure and write those that are missing, of another model, or all if `anew`.

    Raises `UserError` if something must be measured and it is not said on what, or if a file is none of these.
    """

    def of(path: Path, found: Callable[[dict[str, Any]], str], own: str, measure: Callable[[], None]) -> dict[str, Any]:
        if anew or not _is_of(path, own, found):
            print(f"measuring {path}", file=sys.stderr)
            measure()
        return json.loads(path.read_text(encoding="utf-8"))

    stream = StreamCodec(runner.codec, runner.options.device)  # files are of a model and its prior
    own, kind = stream.stream_id.hex(), stream.prior.kind
    return Measured(
        rd=of(
            rd, lambda d: d["about"].get("stream_ids", {}).get(kind), own, lambda: _measure_rd(runner, measuring, rd)
        ),
        quality=of(quality, _first_model, runner.codec.model_id, lambda: _measure_quality(measuring, quality)),
        crops=of(
            crops,
            lambda d: d["about"].get("stream_id"),
            own,
            lambda: make_sheet(runner, sheet, crops),
        ),
    )


def _first_model(found: dict[str, Any]) -> str:
    return next(iter(found["results"].values()))["model_id"]


def _is_of(path: Path, own: str, found: Callable[[dict[str, Any]], str]) -> bool:
    if not path.exists():
        return False
    try:
        return found(json.loads(path.read_text(encoding="utf-8"))) == own
    except (ValueError, KeyError, StopIteration, AttributeError, TypeError) as error:
        raise UserError(f"{path}: no results of this kind ({error!r}); give another file or remove it") from error


def _measure_rd(runner: Runner, measuring: Measuring, path: Path) -> None:
    where = measuring.where(path)
    command = ["latent-codec", "evaluate", measuring.model, where, "--rd", "--steps"]
    command += [f"{step:g}" for step in measuring.steps]
    command += ["--refine", str(measuring.refine), "--sample", "0", "--lpips-net", measuring.lpips_net or "none"]
    command += [] if measuring.lpips_backbone is None else ["--lpips-backbone", str(measuring.lpips_backbone)]
    report = rate_distortion(
        runner,
        where,
        steps=measuring.steps,
        refine=measuring.refine,
        sample=0,
        out=None,
        lpips_net=measuring.lpips_net,
        lpips_backbone=measuring.lpips_backbone,
        command=shlex.join(command),
    )
    if report.failures:
        raise UserError(f"{where}: {len(report.failures)} images could not be used; a page needs all of them")
    found = report.json()
    found["about"] |= {"commit": git_commit()} | machine(runner.options.device)
    write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _measure_quality(measuring: Measuring, path: Path) -> None:
    Quality(
        dir=measuring.where(path),
        models=(measuring.model, *measuring.others),
        taef2=measuring.taef2,
        lpips_net=measuring.lpips_net,
        lpips_backbone=measuring.lpips_backbone,
        out=path,
    ).run()
