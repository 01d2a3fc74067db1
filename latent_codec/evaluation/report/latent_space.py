"""Show active units, the KL by channel, and the aggregate posterior beside the prior."""

import math

import torch

from latent_codec.evaluation.evaluate import PROTOCOL
from latent_codec.evaluation.report.charts import bars, histogram, spread
from latent_codec.evaluation.report.page import NOT_GAUSSIAN, Number, Section, is_gaussian, left_out, written
from latent_codec.evaluation.report.survey import EDGES, Survey
from latent_codec.model.codebooks import perplexity
from latent_codec.model.codec import Codec

ACTIVE = 0.01
"""Variance of the posterior mean over the data above which a unit is active (Burda et al. 2016, section 5.2)."""

_QUANTITIES = {
    "kl": "kl",
    "mean": "mean",
    "std": "std",
    "variance_of_mean": "variance",
    "mean_variance": "posterior_variance",
}
"""Attribute of `Survey` by its key in the JSON, in the order of the table's columns."""


def active_units(found: Survey) -> Section:
    """Count the channels that vary with the image or, of a codebook, the codes in use."""
    if found.codes is not None:
        return _codes_in_use(found, found.codes)
    active = (found.variance > ACTIVE).tolist()
    count, channels = sum(active), len(active)
    positions = f" and their positions, {found.elements:,} elements a channel" if found.elements > found.images else ""
    how = (
        f"channels whose posterior mean has a variance above {ACTIVE:g} (Burda et al. 2016, section 5.2), over "
        f"{found.images} images{positions}"
    )
    alt = f"Variance of the posterior mean by channel, largest first; {count} of {channels} above {ACTIVE:g}."
    chart = bars(found.variance.tolist(), active, "variance of the mean", alt, threshold=ACTIVE)
    number = Number("active_units", "active units", count, f"of {channels}", how)
    return Section("active_units", "Active units", {"codes": False, "chart": chart}, [number])


def _codes_in_use(found: Survey, codes: torch.Tensor) -> Section:
    share, bits = (codes / codes.sum()).tolist(), perplexity(codes)
    used, count = int((codes > 0).sum()), len(codes)
    over = f"over {found.images} images and their positions, {found.elements:,} in all"
    how = f"exp of the entropy of the codes' shares, {over}: so many codes, evenly used, would be as hard to guess"
    numbers = [
        Number("perplexity", "perplexity", bits, f"of {count:,}", how),
        Number("codes_used", "codes in use", used, f"of {count:,}", f"taken at least once, {over}"),
    ]
    alt = f"Share of each code, largest first; {used} of {count} were taken, the perplexity is {bits:.1f}."
    chart = bars(share, [s > 0 for s in share], "share", alt, axis="code")
    view = {"codes": True, "chart": chart}
    return Section("active_units", "Codes in use", view, numbers, {"codes": codes.tolist()})


def kl_by_channel(codec: Codec, found: Survey, bpp: float | None) -> Section:
    """Show the KL of each channel; `bpp` is the KL that `evaluate` measured."""
    name, title = "kl", "KL by channel"
    if not is_gaussian(codec):
        return left_out(name, title, NOT_GAUSSIAN)
    kl, total = found.kl.tolist(), float(found.kl.sum())
    over = f"mean over {found.images} images and their positions"
    how = f"KL(q(z given x) || N(0, I)) in closed form (Kingma & Welling 2014, appendix B), all channels, {over}"
    numbers = [
        Number("kl", "KL of all channels", total, "nats per position", how),
        Number("kl_bpp", "the same as a rate", bpp, "bits per pixel", PROTOCOL["kl_bpp"]),
        Number("kl_largest", "largest channel", max(kl), "nats per element", f"channel {kl.index(max(kl))}, {over}"),
    ]
    alt = f"KL by channel, largest first: {written(max(kl))} to {written(min(kl))} nats per element."
    channels = [
        {key: float(getattr(found, attribute)[i]) for key, attribute in _QUANTITIES.items()} for i in range(len(kl))
    ]
    view = {
        "chart": bars(kl, (found.variance > ACTIVE).tolist(), "nats per latent element", alt),
        "channels": [(i, *(f"{value:.4g}" for value in values.values())) for i, values in enumerate(channels)],
    }
    return Section(name, title, view, numbers, {"channels": channels})


def aggregate_posterior(codec: Codec, found: Survey, seed: int) -> Section:
    """Compare one draw of every latent element with the prior."""
    name, title = "aggregate_posterior", "Aggregate posterior against N(0, I)"
    if not is_gaussian(codec):
        return left_out(name, title, NOT_GAUSSIAN)
    draws, normalized = found.draws, found.normalized
    how = f"one draw of every latent element of {found.images} images (seed {seed}), all channels pooled"
    outside = float((draws.counts[0] + draws.counts[-1]) / draws.counts.sum())
    numbers = [
        Number("mean", "mean", draws.mean, "", f"{how}; 0 of the prior"),
        Number("std", "standard deviation", math.sqrt(max(draws.variance, 0)), "", "the same draws; 1 of the prior"),
        Number("skewness", "skewness", draws.skewness, "", "the same draws; 0 of the prior"),
        Number("excess_kurtosis", "excess kurtosis", draws.excess_kurtosis, "", "the same draws; 0 of the prior"),
        Number("outside", "beyond 6 either way", outside, "", "share of the same draws; 2e-9 of the prior"),
    ]
    if normalized is not None:
        how = "the same draws less the mean and over the std that the model's statistics give each channel"
        label = "excess kurtosis, normalised"
        numbers.append(Number("normalized_excess_kurtosis", label, normalized.excess_kurtosis, "", how))
    low, high = written(float(found.mean.min())), written(float(found.mean.max()))
    alt_spread = f"Mean and standard deviation by channel; means from {low} to {high}, against N(0, 1)."
    alt = f"Histogram of pooled draws from {EDGES[0]:g} to {EDGES[-1]:g} against the density of N(0, 1)."
    return Section(name, title, {"charts": [spread(found, alt_spread), histogram(draws, normalized, alt)]}, numbers)
