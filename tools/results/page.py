"""Render the page of results from its templates."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latent_codec.evaluation.rate_distortion.plot import svg
from latent_codec.model.codec import Codec
from tools.results import costs, tables
from tools.results.curves import against_published, all_points, best, curve_points, published
from tools.results.measured import Measured
from tools.results.published import CURVES

PAGE, PLOT, SHEET = "results.md", "results.svg", "results.jpg"


def plot(measured: Measured) -> str:
    """Return the SVG of the measured and published curves."""
    rd = measured.rd
    return svg(all_points(rd), rd["about"], "photo", {curve.name: curve.points for curve in published(rd)})


def page(measured: Measured, codec: Codec) -> str:
    """Return the Markdown; figures come from the JSON files and, of costs, from the networks' shapes."""
    fields = {
        "set": measured.rd["about"]["set"],
        "images": measured.rd["about"]["images"],
        "model_id": codec.model_id[:12],
        "plot": PLOT,
        "sheet": SHEET,
        "rates": tables.rates(measured.rd),
        "priors": tables.priors(measured.rd),
        "measured_deltas": tables.measured_deltas(measured.rd),
        "refined_deltas": tables.measured_deltas(measured.rd, "refined_against"),
        "published_deltas": tables.published_deltas(measured.rd),
        "settings": "; ".join(f"{k}: {v}" for k, v in measured.rd["settings"].items() if "(ours)" not in k),
        "rd_source": _source(measured.rd["about"]),
        "stages": tables.stages(measured.quality, codec),
        "stage_rates": tables.stage_rates(measured.quality, codec),
        "quality_source": _source(measured.quality["about"]),
        "crops": tables.crops(measured.crops),
        "crops_source": _source(measured.crops["about"] | {"command": "python -m tools.results"}),
        "side": measured.crops["about"]["side"],
    }
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=False)
    return environment.get_template("page.md.jinja").render(fields | figures(measured, codec)).rstrip() + "\n"


def _source(about: dict[str, Any]) -> str:
    """Return command, commit and machine as Markdown."""
    machine = about["device"]
    if (kind := about.get("versions", {}).get("machine")) and kind not in machine:
        machine = f"{machine} ({kind})"
    count = about.get("threads")
    threads = "" if count is None else f", {count} thread{'' if count == 1 else 's'}"
    torch = about.get("torch") or about["versions"]["torch"]
    commit = f"commit {about['commit']}" if about.get("commit") else "commit not recorded"
    return f"    {about['command']}\n\n{commit}; {machine}{threads}, torch {torch}."


def figures(measured: Measured, codec: Codec) -> dict[str, str]:
    """Return the figures in the text of falls_short.md.jinja, by name."""
    rd, stages = measured.rd, measured.quality["results"]
    ours = curve_points(rd, best(rd))
    finest, one = ours[0], min(ours, key=lambda point: abs(point.setting.value - 1))
    photo = next(iter(stages.values()))
    finest_psnr = finest.distortion["psnr"] or 0
    found = _training(codec) | {
        "ceiling": f"{photo['psnr']:.2f}",
        "ceiling_room": f"{photo['psnr'] - finest_psnr:.2f}",
        "finest_step": f"{finest.setting.value:g}",
        "finest_psnr": f"{finest_psnr:.2f}",
        "finest_bpp": f"{finest.bpp:.2f}",
        "one_bpp": f"{one.bpp:.3f}",
        "kl_bpp": f"{rd['summary']['kl_bpp']:.3f}",
        "dithered_bpp": next((f"{p.bpp:.3f}" for p in all_points(rd) if p.setting.dithered), "-"),
        "prior_gap": f"{one.bpp - (one.ideal_bpp or 0):.4f}",
        "prior_saves": next(
            (
                f"{1 - one.bpp / p.bpp:.0%}"
                for p in curve_points(rd, "factorized")
                if p.setting.value == one.setting.value
            ),
            "nothing",
        ),
        "lpips": tables.value("lpips", photo.get("lpips")),
        "lpips_taef2": tables.value("lpips", stages.get("TAEF2", {}).get("lpips")),
        "lpips_pca": tables.value("lpips", stages.get("pca32", {}).get("lpips")),
        "channels": str(codec.config.latent_channels),
        "factor": str(codec.factor),
        "encoder_gflop": f"{costs.of_config(codec.config).encoder / 1e9:.1f}",
        "sd_gflop": f"{costs.of_sd_shape(4).encoder / 1e9:.1f}",
    }
    deltas = {name: c["delta_rates"].get("psnr", {}).get("percent") for name, c in rd["against"].items()}
    deltas |= {other.name: delta.percent for other, delta in against_published(rd, best(rd))}
    for name in ("JPEG", "WebP", "AVIF", *(curve.name for curve in CURVES)):
        percent = deltas.get(name)
        found[name.replace("-", "_").lower()] = "not compared" if percent is None else f"{percent:+.0f}%"
    return found


def _training(codec: Codec) -> dict[str, str]:
    """Return facts of the last training stage from the model's provenance, if it has any."""
    training = codec.provenance.get("training", {})
    config = training.get("config", {})
    objective = config.get("objective", {})
    steps = objective.get("mode_steps") or objective.get("noise_steps")
    return {
        "data_images": f"{training['data_images']:,}" if "data_images" in training else "an unknown number of",
        "crop": str(config.get("crop", "?")),
        "lpips_weight": f"{objective.get('lpips_weight', 0):g}" if objective else "unknown",
        "finest_mode_step": f"{steps[0]:g}" if steps else "1",
    }
