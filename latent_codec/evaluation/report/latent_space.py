"""What the latents are like: active units, the KL by channel, and the aggregate posterior beside the prior."""

import math

import torch

from latent_codec.evaluation.evaluate import PROTOCOL
from latent_codec.evaluation.report.charts import bars, charts, histogram, spread
from latent_codec.evaluation.report.html import join, paragraphs, table, tag
from latent_codec.evaluation.report.page import NOT_GAUSSIAN, Number, Section, is_gaussian, left_out, written
from latent_codec.evaluation.report.survey import EDGES, Survey
from latent_codec.model.codebooks import perplexity
from latent_codec.model.codec import Codec

ACTIVE = 0.01
"""Variance of the posterior mean over the data above which a unit is active (Burda et al. 2016, section 5.2)."""


def active_units(codec: Codec, found: Survey) -> Section:
    name, title = "active_units", "Active units"
    if found.codes is not None:
        return _codes_in_use(name, found, found.codes)
    active = (found.variance > ACTIVE).tolist()
    count, channels = sum(active), len(active)
    number = Number(
        "active_units",
        "active units",
        count,
        f"of {channels}",
        f"channels whose posterior mean has a variance above {ACTIVE:g} (Burda et al. 2016, section 5.2), over "
        f"{found.images} images"
        + ("" if found.elements == found.images else f" and their positions, {found.elements:,} elements a channel"),
    )
    alt = f"Variance of the posterior mean by channel, largest first; {count} of {channels} above {ACTIVE:g}."
    chart = bars(found.variance.tolist(), active, "variance of the mean", alt, threshold=ACTIVE)
    words = paragraphs(
        "A channel whose posterior is the same for all images tells the decoder nothing. Pale: inactive."
    )
    return Section(name, title, join(words, charts(chart)), [number], {})


def _codes_in_use(name: str, found: Survey, codes: torch.Tensor) -> Section:
    """In place of active units, of a codebook."""
    share = (codes / codes.sum()).tolist()
    used, count = int((codes > 0).sum()), len(codes)
    over = f"over {found.images} images and their positions, {found.elements:,} in all"
    numbers = [
        Number(
            "perplexity",
            "perplexity",
            perplexity(codes),
            f"of {count:,}",
            f"exp of the entropy of the codes' shares, {over}: so many codes, evenly used, would be as hard to guess",
        ),
        Number("codes_used", "codes in use", used, f"of {count:,}", f"taken at least once, {over}"),
    ]
    alt = f"Share of each code, largest first; {used} of {count} were taken, the perplexity is {perplexity(codes):.1f}."
    chart = bars(share, [s > 0 for s in share], "share", alt, threshold=None, axis="code")
    words = paragraphs("A code that is never taken is a wasted one; of few codes in use many positions look alike.")
    return Section(name, "Codes in use", join(words, charts(chart)), numbers, {"codes": codes.tolist()})


def kl_by_channel(codec: Codec, found: Survey, bpp: float | None) -> Section:
    """`bpp` is the KL as `evaluate` reports it."""
    name, title = "kl", "KL by channel"
    if not is_gaussian(codec):
        return left_out(name, title, NOT_GAUSSIAN)
    kl, total = found.kl.tolist(), float(found.kl.sum())
    over = f"mean over {found.images} images and their positions"
    numbers = [
        Number(
            "kl",
            "KL of all channels",
            total,
            "nats per position",
            f"KL(q(z given x) || N(0, I)) in closed form (Kingma & Welling 2014, appendix B), all channels, {over}",
        ),
        Number("kl_bpp", "the same as a rate", bpp, "bits per pixel", PROTOCOL["kl_bpp"]),
        Number("kl_largest", "largest channel", max(kl), "nats per element", f"channel {kl.index(max(kl))}, {over}"),
    ]
    alt = f"KL by channel, largest first: {written(max(kl))} to {written(min(kl))} nats per element."
    active = (found.variance > ACTIVE).tolist()
    rows: list[tuple[object, ...]] = [
        (
            i,
            *(
                f"{float(v[i]):.4g}"
                for v in (found.kl, found.mean, found.std, found.variance, found.posterior_variance)
            ),
        )
        for i in range(len(kl))
    ]
    head = ("channel", "KL, nats", "mean", "std of a draw", "variance of the mean", "mean variance")
    every = tag("details", tag("summary", "Every channel"), table(head, rows))
    body = join(charts(bars(kl, active, "nats per latent element", alt, threshold=None)), every)
    records = {
        "channels": [
            {
                "kl": kl[i],
                "mean": float(found.mean[i]),
                "std": float(found.std[i]),
                "variance_of_mean": float(found.variance[i]),
                "mean_variance": float(found.posterior_variance[i]),
            }
            for i in range(len(kl))
        ]
    }
    return Section(name, title, body, numbers, records)


def aggregate_posterior(codec: Codec, found: Survey, seed: int) -> Section:
    name, title = "aggregate_posterior", "Aggregate posterior against N(0, I)"
    if not is_gaussian(codec):
        return left_out(name, title, NOT_GAUSSIAN)
    draws, normalized = found.draws, found.normalized
    how = f"one draw of every latent element of {found.images} images (seed {seed}), all channels pooled"
    numbers = [
        Number("mean", "mean", draws.mean, "", f"{how}; 0 of the prior"),
        Number("std", "standard deviation", math.sqrt(max(draws.variance, 0)), "", "the same draws; 1 of the prior"),
        Number("skewness", "skewness", draws.skewness, "", "the same draws; 0 of the prior"),
        Number("excess_kurtosis", "excess kurtosis", draws.excess_kurtosis, "", "the same draws; 0 of the prior"),
        Number("outside", "beyond 6 either way", _outside(found), "", "share of the same draws; 2e-9 of the prior"),
    ]
    if normalized is not None:
        numbers.append(
            Number(
                "normalized_excess_kurtosis",
                "excess kurtosis, normalised",
                normalized.excess_kurtosis,
                "",
                "the same draws less the mean and over the std that the model's statistics give each channel",
            )
        )
    low, high = float(found.mean.min()), float(found.mean.max())
    words = paragraphs(
        "All posteriors of the set together, which samples of the prior should resemble. Where a model is to be the "
        "first stage of another one, its latents are normalised by channel, and only the shape matters."
    )
    alt_spread = (
        f"Mean and standard deviation by channel; means from {written(low)} to {written(high)}, against N(0, 1)."
    )
    alt = f"Histogram of pooled draws from {EDGES[0]:g} to {EDGES[-1]:g} against the density of N(0, 1)."
    body = join(words, charts(spread(found, alt_spread), histogram(draws, normalized, alt)))
    return Section(name, title, body, numbers, {})


def _outside(found: Survey) -> float:
    counts = found.draws.counts
    return float((counts[0] + counts[-1]) / counts.sum())
