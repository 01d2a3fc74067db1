"""Format the page's tables as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from latent_codec.evaluation.rate_distortion.report import REFINED
from latent_codec.metrics.bjontegaard import Delta
from latent_codec.model.codec import Codec
from tools.results import costs
from tools.results.costs import Costs
from tools.results.curves import against_published, best, curve_points, metrics_of
from tools.results.published import STAGES

NAMES = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS"}
_FORMATS = {"psnr": ".2f", "ssim": ".4f", "ms_ssim": ".4f", "lpips": ".4f"}

_PCA = {
    "ppca32": ("probabilistic PCA at photo's first sigma", 32),
    "pca32": ("PCA of 8x8 patches", 32),
    "pca16": ("PCA of 8x8 patches", 16),
}
"""Words and channels of the models of the quality file that are not networks."""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def value(metric: str, number: float | None) -> str:
    """Format a metric's value; None as a dash."""
    return "-" if number is None else f"{number:{_FORMATS[metric]}}"


def rates(rd: dict[str, Any]) -> str:
    """Return the table of our files by step, with the refined files beside them."""
    names = metrics_of(rd)
    refined = {point.setting.value: point for point in curve_points(rd, REFINED)}
    header = ["bpp", *(NAMES[name] for name in names)]
    header = ["step", *header, *([f"refined: {header[0]}", *header[1:]] if refined else [])]
    rows = []
    for own in curve_points(rd, best(rd)):
        row = [f"{own.setting.value:g}"]
        for point in [own, refined[own.setting.value]] if refined else [own]:
            row += [f"{point.bpp:.3f}", *(value(name, point.distortion[name]) for name in names)]
        rows.append(row)
    return markdown(header, rows)


def priors(rd: dict[str, Any]) -> str:
    """Return the table of files under each prior by step, dithered files last."""
    points = {(p["dithered"], p["value"], p["codec"]): p for p in rd["summary"]["points"]}
    kinds = [kind for kind in ("context", "factorized") if any(key[2] == kind for key in points)]
    header = ["step", *(cell for kind in kinds for cell in (f"{kind} prior: bpp", NAMES["psnr"]))]
    rows = []
    for dithered, step in sorted({key[:2] for key in points if key[2] == kinds[0]}):
        found = [points[dithered, step, kind] for kind in kinds]
        cells = [cell for p in found for cell in (f"{p['bpp']:.3f}", value("psnr", p["psnr"]))]
        rows.append([f"{step:g}{', dither' if dithered else ''}", *cells])
    return markdown(header, rows)


def measured_deltas(rd: dict[str, Any], found_by: str = "against") -> str:
    """Return delta rates against the anchors in every metric; "refined_against" gives those of refined files."""
    names = [name for name in metrics_of(rd) if name in next(iter(rd["against"].values()))["delta_rates"]]
    rows = []
    for anchor, found in rd[found_by].items():
        deltas = [Delta(**found["delta_rates"][name]) for name in names]
        rows.append([anchor, *(delta_cell(d) for d in deltas), overlap(deltas[names.index("psnr")])])
    who = "photo" if found_by == "against" else "photo, refined,"
    header = [f"{who} against", *(NAMES[name].removesuffix(", dB") for name in names), "PSNR compared over"]
    return markdown(header, rows)


def published_deltas(rd: dict[str, Any]) -> str:
    """Return delta rates against the published curves in PSNR."""
    plain, refined = against_published(rd, best(rd)), against_published(rd, REFINED)
    if not plain:
        return "No published curve is of this set."
    rows = [
        [c.name, delta_cell(d), *([delta_cell(refined[i][1])] if refined else []), overlap(d), c.source]
        for i, (c, d) in enumerate(plain)
    ]
    header = ["photo against (published)", "PSNR", *(["refined"] if refined else []), "compared over", "source"]
    return markdown(header, rows)


def delta_cell(delta: Delta) -> str:
    """Format a delta rate, or the reason why there is none."""
    return f"- ({delta.reason})" if delta.percent is None else f"{delta.percent:+.1f}%"


def overlap(delta: Delta) -> str:
    """Format the qualities that a delta rate was taken over."""
    if delta.low is None or delta.high is None or delta.share is None:
        return "-"
    return f"{delta.low:.1f} to {delta.high:.1f} dB, {delta.share:.0%} of photo's range"


def stages(quality: dict[str, Any], codec: Codec) -> str:
    """Return the table of first stages of latent diffusion: measured, then published, each with its set."""
    header = ["first stage", "set", "latent of 256x256", "PSNR, dB", "SSIM", "LPIPS"]
    header += ["encoder, GFLOP", "decoder, GFLOP", "parameters, M"]
    rows = []
    for name, found in quality["results"].items():
        words, cost = _measured_stage(name, found, codec)
        quantities = [found["psnr"], found["ssim"], found.get("lpips")]
        latent = _latent(found["factor"], found["latent_channels"])
        rows.append([words, quality["about"]["set"], latent, *_cells(quantities, cost)])
    for s in STAGES:
        cost = costs.of_sd_shape(s.channels) if s.sd_shape else None
        latent = _latent(s.factor, s.channels)
        rows.append([f"{s.name} (published)", s.set, latent, *_cells([s.psnr, s.ssim, s.lpips], cost)])
    return markdown(header, rows)


def stage_rates(quality: dict[str, Any], codec: Codec) -> str:
    """Return the table of the measured first stages' KL and bytes on disk."""
    rows = []
    for name, found in quality["results"].items():
        rate = ["-" if found.get(key) is None else f"{found[key]:.2f}" for key in ("kl_bpp", "disk_bpp")]
        latent = _latent(found["factor"], found["latent_channels"])
        rows.append([_measured_stage(name, found, codec)[0], latent, value("ms_ssim", found.get("ms_ssim")), *rate])
    return markdown(["first stage", "latent of 256x256", "MS-SSIM", "KL, bpp", "on disk, bpp"], rows)


def _latent(factor: int, channels: int) -> str:
    return f"{costs.SIDE // factor}x{costs.SIDE // factor}x{channels}"


def _cells(quantities: Sequence[float | None], cost: Costs | None) -> list[str]:
    shown = ["-" if q is None else f"{q:.{digits}f}" for q, digits in zip(quantities, (2, 3, 3), strict=True)]
    if cost is None:
        return [*shown, "-", "-", "-"]
    gflop = [f"{flops / 1e9:,.{1 if flops > 1e9 else 2}f}" for flops in (cost.encoder, cost.decoder)]
    millions = cost.parameters / 1e6
    return [*shown, *gflop, f"{millions:,.{2 if millions > 0.1 else 3}f}"]


def _measured_stage(name: str, found: dict[str, Any], codec: Codec) -> tuple[str, Costs | None]:
    """Return a measured model's name on the page, and its costs."""
    if found.get("model_id") == codec.model_id:
        return f"**{name}**", costs.of_config(codec.config)
    if name in _PCA:
        words, channels = _PCA[name]
        return words, costs.of_pca(channels)
    return ("TAEF2 (another project's, not a VAE)", costs.of_taef2()) if name == "TAEF2" else (name, None)


def crops(found: dict[str, Any]) -> str:
    """Return the table of the picture's rows with the bytes of every file."""
    codecs = [file["codec"] for file in found["rows"][0]["files"]]
    rows = []
    for row in found["rows"]:
        cells = [f"{f['bytes']:,} B, {f['setting']}, {f['psnr']:.2f} dB" for f in row["files"]]
        rows.append([f"`{row['image']}`", *cells])
    return markdown(["image", *codecs], rows)
