"""The comparison page: tables, the picture of the curves, and what falls short."""

from pathlib import Path
from typing import Any

from latent_codec.model.codec import Codec
from tools.results import costs, tables
from tools.results.curves import against_published, best, points
from tools.results.measured import Measured
from tools.results.plot import svg
from tools.results.published import CURVES

TEMPLATES = Path(__file__).parent
PAGE, PLOT, SHEET = "results.md", "results.svg", "results.jpg"


def plot(measured: Measured) -> str:
    return svg(measured.rd)


def page(measured: Measured, codec: Codec) -> str:
    """The Markdown of `PAGE`; figures come from the JSON files and, of costs, from the networks' shapes alone."""
    fields = {
        "set": measured.rd["about"]["set"],
        "images": measured.rd["about"]["images"],
        "model_id": codec.model_id[:12],
        "plot": PLOT,
        "sheet": SHEET,
        "rates": tables.rates(measured.rd),
        "measured_deltas": tables.measured_deltas(measured.rd),
        "refined_deltas": tables.measured_deltas(measured.rd, "refined_against"),
        "published_deltas": tables.published_deltas(measured.rd),
        "settings": "; ".join(f"{k}: {v}" for k, v in measured.rd["settings"].items() if "(ours)" not in k),
        "rd_source": _source(measured.rd["about"]),
        "stages": tables.stages(measured.quality, codec),
        "quality_source": _source(measured.quality["about"]),
        "crops": tables.crops(measured.crops),
        "crops_source": _source(measured.crops["about"] | {"command": "python -m tools.results"}),
        "side": measured.crops["about"]["side"],
        "falls_short": _template("falls_short.md").format(**figures(measured, codec)).strip(),
    }
    return _template("page.md").format(**fields)


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _source(about: dict[str, Any]) -> str:
    """Command, commit and machine, as the file says them."""
    machine = about["device"]
    if (kind := about.get("versions", {}).get("machine")) and kind not in machine:
        machine = f"{machine} ({kind})"
    count = about.get("threads")
    threads = "" if count is None else f", {count} thread{'' if count == 1 else 's'}"
    torch = about.get("torch") or about["versions"]["torch"]
    commit = f"commit {about['commit']}" if about.get("commit") else "commit not recorded"
    return f"    {about['command']}\n\n{commit}; {machine}{threads}, torch {torch}."


def figures(measured: Measured, codec: Codec) -> dict[str, str]:
    """What the text of `falls_short.md` says, by name."""
    rd, stages = measured.rd, measured.quality["results"]
    ours = points(rd, best(rd))
    finest, one = ours[0], min(ours, key=lambda p: abs(p["value"] - 1))
    photo = next(iter(stages.values()))
    found = _training(codec) | {
        "ceiling": f"{photo['psnr']:.2f}",
        "ceiling_room": f"{photo['psnr'] - finest['psnr']:.2f}",
        "finest_step": f"{finest['value']:g}",
        "finest_psnr": f"{finest['psnr']:.2f}",
        "finest_bpp": f"{finest['bpp']:.2f}",
        "one_bpp": f"{one['bpp']:.3f}",
        "one_psnr": f"{one['psnr']:.2f}",
        "kl_bpp": f"{rd['summary']['kl_bpp']:.3f}",
        "dithered_bpp": _dithered(rd),
        "prior_gap": f"{one['bpp'] - one['ideal_bpp']:.4f}",
        "prior_saves": _saving(rd, one),
        "lpips": tables.value("lpips", photo.get("lpips")),
        "lpips_taef2": tables.value("lpips", stages.get("TAEF2", {}).get("lpips")),
        "lpips_pca": tables.value("lpips", stages.get("pca32", {}).get("lpips")),
        "channels": str(codec.config.latent_channels),
        "factor": str(codec.factor),
        "encoder_gflop": f"{costs.of_config(codec.config).encoder / 1e9:.1f}",
        "sd_gflop": f"{costs.of_sd_shape(4).encoder / 1e9:.1f}",
    }
    for peer in ("JPEG", "WebP", "AVIF"):
        delta = rd["against"].get(peer, {}).get("delta_rates", {}).get("psnr", {}).get("percent")
        found[peer.lower()] = "not compared" if delta is None else f"{delta:+.0f}%"
    found |= {_field(other.name): "not compared" for other in CURVES}
    for other, delta in against_published(rd, best(rd)):
        found[_field(other.name)] = "not compared" if delta.percent is None else f"{delta.percent:+.0f}%"
    return found


def _field(name: str) -> str:
    """A published codec's name, as the text's braces have it."""
    return name.replace("-", "_").lower()


def _training(codec: Codec) -> dict[str, str]:
    """Of the last stage, as the model's file says it; models made elsewhere do not."""
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


def _dithered(rd: dict[str, Any]) -> str:
    own = [p for p in rd["summary"]["points"] if p["codec"] == best(rd) and p["dithered"]]
    return f"{own[0]['bpp']:.3f}" if own else "-"


def _saving(rd: dict[str, Any], one: dict[str, Any]) -> str:
    """Of the best prior against the factorised one, at the same step."""
    plain = [p for p in points(rd, "factorized") if p["value"] == one["value"]]
    return f"{1 - one['bpp'] / plain[0]['bpp']:.0%}" if plain and plain[0] is not one else "nothing"
