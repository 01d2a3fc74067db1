"""What rate-distortion measurements say: means over images, curves compared, in JSON and for people."""

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_codec.evaluation.evaluate import PROTOCOL, describe, mean_defined
from latent_codec.evaluation.rate_distortion.anchors import PEERS, Peer
from latent_codec.inference.runner import Runner
from latent_codec.metrics.bjontegaard import LEAST_OVERLAP, METHOD, SCALES, Curve, Delta, delta_rate
from latent_codec.metrics.lpips import LPIPS
from latent_codec.storage.files import write_text

RESULTS, PLOT = "rd.json", "rd.png"

REFINED = "refined"
"""Names the rows of our best prior's files that were refined."""

RATES = tuple(i / 100 for i in range(25, 85, 5))
"""Bits per pixel at which quality is compared."""

RD_PROTOCOL = {
    "bpp": "all bytes of the file in bits over the image's own pixels; mean over images of each image's value",
    "ideal_bpp": "code length of the quantised latents under the prior, in bits over the image's own pixels; no file "
    "has this size: header, checksums and what the coder loses are missing",
    "kl_bpp": "KL of the image's posterior against N(0, I) in bits over its own pixels; depends on no step and no "
    "prior, and no file has this size",
    "decoded": "each file decoded again from its bytes, rounded and clipped to uint8, grey where the image is, against "
    "the image as read (upright sRGB)",
    "psnr": PROTOCOL["psnr"],
    "ms_ssim": PROTOCOL["ms_ssim"],
    "step": "quantiser step in units in which an error uniform over a step has the posterior's variance; the mean is "
    "rounded, or where a row says so quantised with subtractive dither",
    "delta_rate": f"Bjontegaard's delta rate in percent by bjontegaard's bd_rate, method {METHOD}, over the qualities "
    "that both curves of means reach: how much less (below 0) or more our best prior's rounded rows need at equal "
    f"quality; points that a cheaper one equals or beats are left out; no value below {LEAST_OVERLAP:.0%} overlap",
    "psnr_gain": f"difference of PSNR in dB at equal rate, {METHOD} over the rate's logarithm through the means",
}


class Setting(NamedTuple):
    """Of a codec: a step of one of our priors, or a peer's quality."""

    codec: str
    unit: str
    value: float
    dithered: bool

    def __str__(self) -> str:
        return f"{self.unit} {self.value:g}{', dithered' if self.dithered else ''}"


class Row(NamedTuple):
    """One file of one image."""

    setting: Setting
    bytes: int
    bpp: float
    ideal_bpp: float | None
    distortion: dict[str, float | None]
    """By the name of the metric; None where it is not defined."""

    def json(self) -> dict[str, Any]:
        about = self.setting._asdict() | {"bytes": self.bytes, "bpp": self.bpp, "ideal_bpp": self.ideal_bpp}
        return about | self.distortion


class Record(NamedTuple):
    """One image."""

    path: str
    pixels: int
    kl_bpp: float
    rows: list[Row]

    def json(self) -> dict[str, Any]:
        return self._asdict() | {"rows": [row.json() for row in self.rows]}


class Point(NamedTuple):
    """Means over images of the rows of one setting."""

    setting: Setting
    bpp: float
    ideal_bpp: float | None
    distortion: dict[str, float | None]

    def json(self) -> dict[str, Any]:
        return self.setting._asdict() | {"bpp": self.bpp, "ideal_bpp": self.ideal_bpp} | self.distortion


class Against(NamedTuple):
    """Our curve and a peer's."""

    peer: str
    delta_rates: dict[str, Delta]
    """By metric."""
    psnr_gains: list[tuple[float, float | None]]
    """(bits per pixel, dB) at `RATES`; None where one of the curves does not reach."""

    def json(self) -> dict[str, Any]:
        rates = {metric: delta._asdict() for metric, delta in self.delta_rates.items()}
        gains = [{"bpp": rate, "db": gain} for rate, gain in self.psnr_gains]
        return {"delta_rates": rates, "psnr_gains": gains}


class Report(NamedTuple):
    about: dict[str, Any]
    protocol: dict[str, str]
    settings: dict[str, str]
    """By codec, in words."""
    kl_bpp: float
    points: list[Point]
    against: list[Against]
    refined_against: list[Against]
    """Of the refined files, if there are any."""
    notes: list[str]
    records: list[Record]
    failures: dict[str, str]

    @property
    def codecs(self) -> list[str]:
        """Ours first, the best prior at their head."""
        return list(dict.fromkeys(point.setting.codec for point in self.points))

    def curve_points(self, codec: str) -> list[Point]:
        """Those of one codec without dither."""
        return [p for p in self.points if p.setting.codec == codec and not p.setting.dithered]

    def json(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "protocol": self.protocol,
            "settings": self.settings,
            "notes": self.notes,
            "summary": {"kl_bpp": self.kl_bpp, "points": [point.json() for point in self.points]},
            "against": {a.peer: a.json() for a in self.against},
            "refined_against": {a.peer: a.json() for a in self.refined_against},
            "images": [record.json() for record in self.records],
            "failures": self.failures,
        }

    def write(self, folder: Path) -> None:
        """rd.json and rd.png."""
        from latent_codec.evaluation.rate_distortion.plot import draw  # here, because matplotlib is optional

        write_text(folder / RESULTS, json.dumps(self.json(), indent=1, allow_nan=False) + "\n")
        draw(self, folder / PLOT)

    def table(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.about['set']}: {self.about['images']} images, model {self.about['model_id'][:12]}"
        yield "means over images, of each image's bits per pixel and decibels; bpp counts all bytes of a file"
        yield f"{'codec':11} {'setting':17} {'bpp':>7} {'ideal bpp':>9} {'PSNR':>6} {'MS-SSIM':>7} {'LPIPS':>6}"
        for point in self.points:
            values = (point.ideal_bpp, *(point.distortion.get(name) for name in ("psnr", "ms_ssim", "lpips")))
            columns = zip(values, ("9.4f", "6.2f", "7.4f", "6.4f"), strict=True)
            shown = " ".join("-".rjust(int(f[0])) if v is None else f"{v:{f}}" for v, f in columns)
            yield f"{point.setting.codec:11} {point.setting!s:17} {point.bpp:7.4f} {shown}"
        yield from self._posterior()
        named = [(self.codecs[0], a) for a in self.against] + [(REFINED, a) for a in self.refined_against]
        for best, a in named:
            deltas = "; ".join(f"{name} {_percent(delta)}" for name, delta in a.delta_rates.items())
            yield f"delta rate of {best} against {a.peer}: {deltas}"
            yield f"PSNR of {best} over {a.peer}, dB at bpp: " + _gains(a.psnr_gains)
            yield f"  ahead at {_list([r for r, g in a.psnr_gains if g is not None and g > 0])}"
        yield from (f"{name}: {words}" for name, words in self.settings.items())
        yield from self.notes
        yield from (f"{name}: {words}" for name, words in self.protocol.items())

    def _posterior(self) -> Iterator[str]:
        """The three numbers that are easily taken for each other, side by side."""
        yield f"KL of the posterior {self.kl_bpp:.4f} bpp: the rate of an ideal stochastic code, not a file"
        for dithered in (p for p in self.points if p.setting.dithered):
            for rounded in self.curve_points(dithered.setting.codec):
                if rounded.setting.value == dithered.setting.value:
                    yield (
                        f"{dithered.setting.codec}, step {dithered.setting.value:g}: a file with dither takes "
                        f"{dithered.bpp:.4f} bpp: {dithered.bpp - rounded.bpp:+.4f} against a file with rounding, "
                        f"{dithered.bpp - self.kl_bpp:+.4f} against the KL"
                    )


def report(
    runner: Runner,
    where: str | Path,
    records: list[Record],
    stream_ids: dict[str, str],
    refine: int,
    peers: Sequence[Peer],
    lpips: LPIPS | None,
    command: str,
    failures: dict[str, str],
) -> Report:
    """Means, comparisons and words for the records of all images, which hold the same settings in the same order."""
    points = [_mean([record.rows[i] for record in records]) for i in range(len(records[0].rows))]
    about = describe(runner, where, len(records)) | {"stream_ids": stream_ids, "command": command}
    about["versions"] |= {name: importlib.metadata.version(name) for name in ("bjontegaard", "constriction", "pillow")}
    missing = sorted({peer.name for peer in PEERS} - {peer.name for peer in peers})
    best = next(iter(stream_ids))
    return Report(
        about=about,
        protocol=RD_PROTOCOL | ({"lpips": lpips.protocol} if lpips else {}),
        settings={f"{kind} (ours)": f"stream id {name}" for kind, name in stream_ids.items()}
        | ({REFINED: f"files of the {best} prior after {refine} rounds of `encode --refine`"} if refine else {})
        | {peer.name: peer.settings() for peer in peers},
        kl_bpp=float(np.mean([record.kl_bpp for record in records])),
        points=points,
        against=[_against(points, best, peer.name) for peer in peers],
        refined_against=[_against(points, REFINED, peer.name) for peer in peers] if refine else [],
        notes=[f"{name} left out: this Pillow was built without it" for name in missing],
        records=records,
        failures=failures,
    )


def _mean(rows: list[Row]) -> Point:
    """Of one setting, over images; images for which a metric is not defined do not count for it."""
    ideal = [row.ideal_bpp for row in rows]
    distortion = {name: mean_defined([row.distortion[name] for row in rows]) for name in rows[0].distortion}
    return Point(rows[0].setting, float(np.mean([row.bpp for row in rows])), mean_defined(ideal), distortion)


def _against(points: list[Point], ours: str, peer: str) -> Against:
    names = [name for name in SCALES if name in points[0].distortion]
    tested, anchor = ({name: _curve(points, codec, name) for name in names} for codec in (ours, peer))
    gains: list[tuple[float, float | None]] = []
    for rate in RATES:
        mine, theirs = tested["psnr"].at(rate), anchor["psnr"].at(rate)
        gains.append((rate, None if mine is None or theirs is None else mine - theirs))
    return Against(peer, {name: delta_rate(anchor[name], tested[name]) for name in names}, gains)


def _curve(points: list[Point], codec: str, metric: str) -> Curve:
    own = [p for p in points if p.setting.codec == codec and not p.setting.dithered]
    return Curve.of([p.bpp for p in own], [p.distortion[metric] for p in own], SCALES[metric])


def _percent(delta: Delta) -> str:
    if delta.percent is None:
        return f"none ({delta.reason})"
    return f"{delta.percent:+.1f}% over {delta.low:.2f} .. {delta.high:.2f} dB"


def _gains(gains: list[tuple[float, float | None]]) -> str:
    return "  ".join(f"{rate:.2f} {'-' if gain is None else f'{gain:+.2f}'}" for rate, gain in gains)


def _list(rates: list[float]) -> str:
    return " ".join(f"{rate:.2f}" for rate in rates) + " bpp" if rates else "none of these rates"
