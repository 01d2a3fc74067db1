"""Represent the approximate posterior q(z|x): its samples, its mode and its KL divergence from the prior.

The KL of the ELBO is here: `DiagonalGaussian.kl_map` for Gaussian latents, `Codes.kl_map` (model/codebooks.py) for
discrete ones. Floats are float32, under autocast too; those of a model with float16 or bfloat16 weights have its type,
and the KL is float32.
"""

import abc
import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

from latent_codec.precision import at_least_float32, float32_island


@dataclasses.dataclass(init=False, eq=False, repr=False)
class Posterior(abc.ABC):
    """Represents the distribution of latents (b, z, h, w) given an image; this base is a point mass at `mean`.

    It is a dataclass and a pytree, so that a compiled, exported or parallel module may return it.
    """

    mean: torch.Tensor
    clamped: torch.Tensor

    def __init_subclass__(cls, **options: Any) -> None:
        """Register the class as a pytree of its attributes."""
        super().__init_subclass__(**options)
        name = f"{cls.__module__}.{cls.__qualname__}"
        pytree.register_pytree_node(
            cls, _flatten, lambda found, names: _restore(cls, found, names), serialized_type_name=name
        )

    def __init__(self, mean: torch.Tensor, clamped: torch.Tensor | None = None) -> None:
        """`mean` is (b, z, h, w); `clamped` is the share of the log-variances that a clamp changed, a scalar."""
        self.mean = mean
        self.clamped = torch.zeros((), device=mean.device) if clamped is None else clamped

    @property
    def coded(self) -> torch.Tensor:
        """Return what a bitstream stores: the mean (b, z, h, w), or a codebook's indices (b, 1, h, w) int64."""
        return at_least_float32(self.mean)

    def sample(self, noise: torch.Generator | torch.Tensor | None = None) -> torch.Tensor:
        """Draw latents (b, z, h, w); a point mass returns its mode."""
        return self.mean

    def mode(self) -> torch.Tensor:
        """Return the most likely latents, (b, z, h, w)."""
        return self.mean

    @abc.abstractmethod
    def kl_map(self) -> torch.Tensor:
        """Return the KL divergence from the prior of each latent element in nats, (b, channels, h, w)."""

    def kl(self) -> torch.Tensor:
        """Return the KL divergence of each image in nats, (b,)."""
        return self.kl_map().flatten(1).sum(1)

    def cpu(self) -> Self:
        """Return a copy in the CPU's memory."""
        return self._each(torch.Tensor.cpu)

    def to(self, dtype: torch.dtype) -> Self:
        """Return a copy whose maps of floating point have another number type."""
        return self._each(lambda t: t.to(dtype) if t.is_floating_point() and t.ndim == 4 else t)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        other = copy.copy(self)
        vars(other).update({n: change(value) for n, value in vars(self).items() if isinstance(value, torch.Tensor)})
        return other


def _flatten(posterior: Posterior) -> tuple[list[Any], list[str]]:
    return list(vars(posterior).values()), list(vars(posterior))


def _restore(cls: type[Posterior], values: Iterable[Any], names: list[str]) -> Posterior:
    posterior = object.__new__(cls)
    vars(posterior).update(zip(names, values, strict=True))
    return posterior


@dataclasses.dataclass(init=False, eq=False, repr=False)
class DiagonalGaussian(Posterior):
    """Represents the posterior N(mean, exp(logvar)) with independent elements.

    mean, logvar: (b, z, h, w); logvar has been clamped already. clamped: see `Posterior`.
    """

    logvar: torch.Tensor

    def __init__(self, mean: torch.Tensor, logvar: torch.Tensor, clamped: torch.Tensor | None = None) -> None:
        super().__init__(mean, clamped)
        self.logvar = logvar

    @property
    def std(self) -> torch.Tensor:
        """Return the standard deviation, (b, z, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: torch.Generator | torch.Tensor | None = None) -> torch.Tensor:
        """Return mean + std * noise, (b, z, h, w) of the mean's type (Kingma & Welling 2014, eq. 4).

        `noise` is a generator on the posterior's device, or standard normal noise of the posterior's shape; another
        shape raises `ValueError`. Without it, torch's own generator is drawn from, which `torch.manual_seed` sets.
        """
        if not isinstance(noise, torch.Tensor):
            noise = torch.randn(self.mean.shape, generator=noise, device=self.mean.device)
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the posterior {tuple(self.mean.shape)}")
        mean, std = at_least_float32(self.mean), torch.exp(0.5 * at_least_float32(self.logvar))
        return (mean + std * noise.to(mean.dtype)).to(self.mean.dtype)

    def prefix(self, channels: int) -> "DiagonalGaussian":
        """Return the posterior of the first channels."""
        return DiagonalGaussian(self.mean[:, :channels], self.logvar[:, :channels], self.clamped)

    def log_ratio(self, z: torch.Tensor) -> torch.Tensor:
        """Return log N(z; 0, I) - log q(z|x) in nats per image, (..., b), of latents (..., b, z, h, w).
        Its expectation under q is minus the KL divergence."""
        with float32_island(z):
            logvar = at_least_float32(self.logvar)
            deviation = (z.float() - self.mean) / torch.exp(0.5 * logvar)
            return 0.5 * (deviation.square() + logvar - z.float().square()).flatten(-3).sum(-1)

    def kl_map(self) -> torch.Tensor:
        """Return KL(q || N(0, I)) of each element in nats, (b, z, h, w): Kingma & Welling (2014), appendix B."""
        with float32_island(self.mean):
            # expm1(v) - v loses far less than exp(v) - 1 - v where the posterior is close to the prior.
            mean, logvar = at_least_float32(self.mean), at_least_float32(self.logvar)
            return 0.5 * (mean.square() + torch.expm1(logvar) - logvar)


class Identity(Posterior):
    """Represents the point mass of a deterministic autoencoder, which pays no KL."""

    def kl_map(self) -> torch.Tensor:
        """Return zeros: a point mass has no finite KL from a density, and an autoencoder charges none."""
        return torch.zeros_like(at_least_float32(self.mean))
