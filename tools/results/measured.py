"""Read the JSON files of a model's measurements, and measure what they lack."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
class Measurements:
    """Say where a model's measurements lie, and what to measure that is missing."""

    model: str = "photo"
    """Name of a shipped model or a file."""
    data: str | None = None
    """Images to measure on; not needed where the JSON files are the model's."""
    others: tuple[str, ...] = ()
    """Models to measure as first stages beside this one, such as PCA of the same latent size."""
    taef2: Path | None = None
    """Folder with TAEF2's encoder.safetensors and decoder.safetensors, to measure it as well."""
    rd_json: Path = Path("checkpoints/photo-rd.json")
    """Results of `latent-codec evaluate --rd`."""
    quality_json: Path = Path("checkpoints/photo.json")
    """Results of `tools.benchmark quality`."""
    crops_json: Path = Path("checkpoints/photo-crops.json")
    """Bytes and qualities of the files in the picture."""
    anew: bool = False
    """Measure everything again."""
    lpips_net: Literal["alex", "squeeze", "vgg", "none"] = "alex"
    """Network of LPIPS; none leaves LPIPS out."""
    lpips_backbone: Path | None = None
    """Local safetensors file with the LPIPS network's ImageNet features; otherwise it is downloaded."""

    def where(self, missing: Path) -> str:
        """Return the images to measure on; raises `UserError` if none were given."""
        if self.data is None:
            raise UserError(f"{missing}: holds nothing of this model; give --data DIR, the images to measure it on")
        return self.data


class Measured(NamedTuple):
    """Hold the contents of the JSON files."""

    rd: dict[str, Any]
    quality: dict[str, Any]
    crops: dict[str, Any]


def gather(wanted: Measurements, runner: Runner, rates: RateDistortionOptions, sheet: Sheet) -> Measured:
    """Read the three files; first measure and write those that are missing or another model's, or all if `anew`.

    Raises `UserError` if something must be measured but no images are given, or if a file is none of these.
    """

    def read(path: Path, own: str, id_of: Callable[[Any], str | None], measure: Callable[[], None]) -> dict[str, Any]:
        if wanted.anew or not _is_of(path, own, id_of):
            print(f"measuring {path}", file=sys.stderr)
            measure()
        return json.loads(path.read_text(encoding="utf-8"))

    stream = StreamCodec(runner.codec, runner.options.device)
    own, kind, model = stream.stream_id.hex(), stream.prior.kind, runner.model_id
    rd, quality, crops = wanted.rd_json, wanted.quality_json, wanted.crops_json
    return Measured(
        read(
            rd,
            own,
            lambda found: found["about"].get("stream_ids", {}).get(kind),
            lambda: _measure_rates(runner, wanted.where(rd), rates, rd),
        ),
        read(
            quality,
            model,
            lambda found: next(iter(found["results"].values()))["model_id"],
            lambda: _measure_quality(wanted),
        ),
        read(crops, own, lambda found: found["about"].get("stream_id"), lambda: make_sheet(runner, sheet, crops)),
    )


def _is_of(path: Path, own: str, id_of: Callable[[Any], str | None]) -> bool:
    if not path.exists():
        return False
    try:
        return id_of(json.loads(path.read_text(encoding="utf-8"))) == own
    except (ValueError, KeyError, StopIteration, AttributeError, TypeError) as error:
        raise UserError(f"{path}: no results of this kind ({error!r}); give another file or remove it") from error


def _measure_rates(runner: Runner, where: str, rates: RateDistortionOptions, path: Path) -> None:
    report = rate_distortion(runner, where, dataclasses.replace(rates, command=command_line()))
    if report.failures:
        raise UserError(f"{where}: {len(report.failures)} images could not be used; a page needs all of them")
    found = report.json()
    found["about"] |= {"commit": git_commit()} | machine(runner.options.device)
    write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _measure_quality(wanted: Measurements) -> None:
    Quality(
        dir=wanted.where(wanted.quality_json),
        models=(wanted.model, *wanted.others),
        taef2=wanted.taef2,
        lpips_net=None if wanted.lpips_net == "none" else wanted.lpips_net,
        lpips_backbone=wanted.lpips_backbone,
        out=wanted.quality_json,
    ).run()
