"""Read the JSON files of a model's measurements, and measure what they lack."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.errors import UserError
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion
from latent_codec.inference.runner import Runner
from latent_codec.storage.files import write_text
from tools.benchmark.quality import Quality
from tools.benchmark.record import command_line, machine
from tools.results.crops import Sheet, make_sheet
from train.loop.provenance import git_commit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measuring:
    """Say what to measure, on what and how; used only where a file is missing or another model's."""

    runner: Runner
    model: str
    data: str | None
    others: tuple[str, ...]
    """Models to set beside this one as a first stage."""
    taef2: Path | None
    rates: RateDistortionOptions
    sheet: Sheet

    def where(self, missing: Path) -> str:
        """Return the images to measure on; raises `UserError` if none were given."""
        if self.data is None:
            raise UserError(f"{missing}: holds nothing of this model; give --data DIR, the images to measure it on")
        return self.data


class ResultFiles(NamedTuple):
    """Name the JSON files of a model's measurements."""

    rd: Path
    quality: Path
    crops: Path


class Measured(NamedTuple):
    """Hold the contents of the JSON files."""

    rd: dict[str, Any]
    quality: dict[str, Any]
    crops: dict[str, Any]


def gather(measuring: Measuring, files: ResultFiles, *, anew: bool) -> Measured:
    """Read the three files; first measure and write those that are missing or another model's, or all if `anew`.

    Raises `UserError` if something must be measured but no images are given, or if a file is none of these.
    """

    def read(path: Path, own: str, id_of: Callable[[Any], str | None], measure: Callable[..., None]) -> dict[str, Any]:
        if anew or not _is_of(path, own, id_of):
            print(f"measuring {path}", file=sys.stderr)
            measure(measuring, path)
        return json.loads(path.read_text(encoding="utf-8"))

    stream = StreamCodec(measuring.runner.codec, measuring.runner.options.device)
    own, kind, model = stream.stream_id.hex(), stream.prior.kind, measuring.runner.codec.model_id
    return Measured(
        rd=read(files.rd, own, lambda found: found["about"].get("stream_ids", {}).get(kind), _measure_rates),
        quality=read(files.quality, model, lambda found: _first(found["results"])["model_id"], _measure_quality),
        crops=read(files.crops, own, lambda found: found["about"].get("stream_id"), _measure_crops),
    )


def _first(results: dict[str, Any]) -> Any:
    return next(iter(results.values()))


def _is_of(path: Path, own: str, id_of: Callable[[Any], str | None]) -> bool:
    if not path.exists():
        return False
    try:
        return id_of(json.loads(path.read_text(encoding="utf-8"))) == own
    except (ValueError, KeyError, StopIteration, AttributeError, TypeError) as error:
        raise UserError(f"{path}: no results of this kind ({error!r}); give another file or remove it") from error


def _measure_rates(measuring: Measuring, path: Path) -> None:
    where = measuring.where(path)
    report = rate_distortion(measuring.runner, where, dataclasses.replace(measuring.rates, command=command_line()))
    if report.failures:
        raise UserError(f"{where}: {len(report.failures)} images could not be used; a page needs all of them")
    found = report.json()
    found["about"] |= {"commit": git_commit()} | machine(measuring.runner.options.device)
    write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _measure_quality(measuring: Measuring, path: Path) -> None:
    lpips = measuring.rates.lpips
    Quality(
        dir=measuring.where(path),
        models=(measuring.model, *measuring.others),
        taef2=measuring.taef2,
        lpips_net=None if lpips is None else lpips.net,
        lpips_backbone=None if lpips is None else lpips.backbone,
        out=path,
    ).run()


def _measure_crops(measuring: Measuring, path: Path) -> None:
    make_sheet(measuring.runner, measuring.sheet, path)
