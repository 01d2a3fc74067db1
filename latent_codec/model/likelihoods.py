"""Define the likelihoods p(x|z) of pixels given the decoder's output, and register them by the `kind` of their config.

To add one: (1) write its config dataclass in `model/config.py` and name it in `LikelihoodConfig`; (2) derive a class
from `Likelihood` that takes the config; (3) add a line to `LIKELIHOODS`.
"""

import abc
import math
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import log_softmax, logsigmoid, softplus

from latent_codec.model.config import DiscretizedLogisticConfig, GaussianConfig
from latent_codec.model.finite import check_finite
from latent_codec.noise import uniforms
from latent_codec.precision import float32_island

_REMEDY = "scale uint8 pixels with from_uint8"


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def from_signed(x: torch.Tensor) -> torch.Tensor:
    """Map [-1, 1] to uint8, rounded to nearest and clipped."""
    return _levels(x).round().clamp(0, 255).to(torch.uint8)


def _levels(x: torch.Tensor) -> torch.Tensor:
    """Map [-1, 1] to grey levels, float32 in [0, 255]."""
    return (x.float() + 1.0) * 127.5


class Likelihood(nn.Module, abc.ABC):
    """Gives the probability of pixels in `data_range` given the decoder's output.

    That output has `params_per_channel` p values per pixel and channel, laid out (parameter, channel) on dim 1. Results
    are float32, under autocast too. This base maps uint8 pixels to [-1, 1].
    """

    params_per_channel: int
    data_range: tuple[float, float] = (-1.0, 1.0)

    def __init__(self, config: Any) -> None:
        """Raise `ValueError` naming the field if the config makes no likelihood."""
        super().__init__()
        self.config = config

    def from_uint8(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map uint8 pixels to float32 in `data_range`, as the encoder takes them."""
        return to_signed(pixels)

    def observe(self, pixels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Map uint8 pixels (b, c, h, w) to float32 as `log_prob` takes them, drawn by keys (b,) if at all."""
        return self.from_uint8(pixels)

    def to_uint8(self, x: torch.Tensor) -> torch.Tensor:
        """Map pixels in `data_range` to uint8, rounded and clipped."""
        return from_signed(x)

    def check(self, x: torch.Tensor) -> None:
        """Raise `ValueError` if x has values that this likelihood is not defined for."""
        low, high = torch.stack(x.aminmax()).tolist()  # the host waits for a device once
        # A dark uint8 image may lie in the range by chance. The comparison is false for NaN too.
        if not x.is_floating_point() or not (low >= -1 - 1e-4 and high <= 1 + 1e-4):
            raise ValueError(
                f"the {self.config.kind} likelihood takes float pixels in [-1, 1], found {x.dtype} in "
                f"[{low:g}, {high:g}]; {_REMEDY}"
            )

    @abc.abstractmethod
    def _log_prob(self, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return nats per element (..., b, c, h, w), from params (p, ..., b, c, h, w) and x (b, c, h, w)."""

    @abc.abstractmethod
    def _mean(self, params: torch.Tensor) -> torch.Tensor: ...

    @abc.abstractmethod
    def _sample(self, params: torch.Tensor, generator: torch.Generator) -> torch.Tensor: ...

    def log_prob(self, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return log p(x|z) in nats per image, (b,), from params (b, p * c, h, w) and x (b, c, h, w).

        Given n latents for each image, params are (n * b, p * c, h, w), those of all images' first latents first, and
        the result is (n * b,). Raises `ValueError` as `check` does.
        """
        if not torch.compiler.is_compiling():
            self.check(x)
        with float32_island(x):
            split = self._split(params)
            if len(params) > len(x):
                split = split.unflatten(1, (-1, len(x)))  # (p, n, b, c, h, w)
            return self._log_prob(split, x.float()).flatten(-3).sum(-1).flatten()

    def mean(self, params: torch.Tensor) -> torch.Tensor:
        """Return the expected pixels (b, c, h, w), in `data_range`."""
        with float32_island(params):
            return self._mean(self._split(params))

    def checked_mean(self, params: torch.Tensor) -> torch.Tensor:
        """Return the expected pixels as an image to show; raise `UserError` if the decoder's output is not finite."""
        check_finite(params, "the decoder's output is")  # of which some likelihoods would make a white image
        return self.mean(params)

    def sample(self, params: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw pixels (b, c, h, w)."""
        with float32_island(params):
            return self._sample(self._split(params), generator)

    def _split(self, params: torch.Tensor) -> torch.Tensor:
        return rearrange(params.float(), "b (p c) h w -> p b c h w", p=self.params_per_channel)


class Gaussian(Likelihood):
    """Models pixels in [-1, 1] by a normal density; sigma is fixed, one learned scalar, or predicted per pixel.

    With a fixed sigma the negative ELBO is a rate-distortion objective: 6 MSE01 / sigma^2 nats per RGB pixel, plus the
    rate. It equals the compression literature's bpp + lambda 255^2 MSE01 at sigma^2 = 6 / (ln 2 * 65025 * lambda):
    lambda .0018 .0035 .0067 .0130 .0250 .0483 give sigma .272 .195 .141 .101 .073 .0525.
    """

    log_sigma: torch.Tensor

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__(config)
        if not config.sigma > 0:
            raise ValueError(f"gaussian likelihood: sigma {config.sigma} must be positive")
        self.params_per_channel = 2 if config.scale == "per_pixel" else 1
        start = torch.tensor(math.log(config.sigma))
        if config.scale == "learned":
            self.log_sigma = nn.Parameter(start)
        else:
            self.register_buffer("log_sigma", start, persistent=False)

    @property
    def sigma(self) -> torch.Tensor:
        """Return the scalar sigma, which is only the starting point if it is predicted per pixel."""
        return self.log_sigma.exp()

    def _log_sigma(self, params: torch.Tensor) -> torch.Tensor:
        if self.config.scale == "per_pixel":
            return (self.log_sigma + params[1]).clamp(-7.0, 2.0)  # at least a tenth of a grey level
        return self.log_sigma.float()

    def _log_prob(self, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        log_sigma = self._log_sigma(params)
        return -0.5 * ((x - params[0]) * torch.exp(-log_sigma)).square() - log_sigma - 0.5 * math.log(2 * math.pi)

    def _mean(self, params: torch.Tensor) -> torch.Tensor:
        return params[0]

    def _sample(self, params: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(params[0].shape, generator=generator, device=params.device)
        return params[0] + self._log_sigma(params).exp() * noise


class DiscretizedLogistic(Likelihood):
    """Gives the 256 pixel values the mass of logistics over each value's bin (Salimans et al. 2017, eq. 2).

    The first and last bins reach to infinity, so that the 256 probabilities sum to 1. Channels are independent.
    Parameters per channel: locations and log scales in units of [-1, 1] pixels, then mixture logits if there are
    several components.
    """

    def __init__(self, config: DiscretizedLogisticConfig) -> None:
        super().__init__(config)
        if config.components < 1:
            raise ValueError(f"discretized_logistic likelihood: components {config.components} must be at least 1")
        self.components = config.components
        self.params_per_channel = 2 if config.components == 1 else 3 * config.components

    def check(self, x: torch.Tensor) -> None:
        super().check(x)
        levels = _levels(x)
        worst = (levels - levels.round()).abs().amax().item()
        if worst > 0.02:
            raise ValueError(
                f"the discretized_logistic likelihood takes the 256 pixel values, found one {worst:.2f} grey levels "
                f"away from the nearest; {_REMEDY}"
            )

    def _parts(self, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log weights, locations and log scales, (k, b, c, h, w) each."""
        if self.components == 1:
            logits, location, log_scale = torch.zeros_like(params[:1]), params[:1], params[1:]
        else:
            location, log_scale, logits = params.chunk(3)
        # Scales from a tenth of a grey level to 500 times the range, so that no logarithm is infinite.
        return log_softmax(logits, dim=0), location, log_scale.clamp(-7.0, 7.0)

    def _log_prob(self, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        log_weight, location, log_scale = self._parts(params)
        # In grey levels the edges of bins are exact, so that neighbours share theirs to the bit and the sum is 1.
        level, centre, inverse = _levels(x).round(), _levels(location), torch.exp(-log_scale) / 127.5
        upper = (level + 0.5 - centre) * inverse
        lower = (level - 0.5 - centre) * inverse
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)): no cancellation in either tail.
        first, last = logsigmoid(upper), logsigmoid(-lower)
        inner = first + last + torch.log(-torch.expm1(-inverse))
        log_bin = torch.where(level == 0, first, torch.where(level == 255, last, inner))
        return torch.logsumexp(log_weight + log_bin, dim=0)

    def _mean(self, params: torch.Tensor) -> torch.Tensor:
        """Return the sum of v P(v) = 255 - sum over k < 255 of P(value <= k), from the exact bin edges."""
        log_weight, location, log_scale = self._parts(params)
        weight, centre, inverse = log_weight.exp(), _levels(location), torch.exp(-log_scale) / 127.5
        total = torch.zeros_like(location[0])
        for k in range(255):  # one edge at a time: 255 copies of an image need too much memory
            total += (weight * torch.sigmoid((k + 0.5 - centre) * inverse)).sum(0)
        return (255.0 - total) / 127.5 - 1.0

    def _sample(self, params: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        log_weight, location, log_scale = self._parts(params)
        shape, device = location.shape, location.device
        u = torch.rand((2, *shape), generator=generator, device=device).clamp(1e-7, 1 - 1e-7)
        chosen = (log_weight - torch.log(-torch.log(u[0]))).argmax(0, keepdim=True)  # Gumbel-max
        location, log_scale, v = (t.gather(0, chosen)[0] for t in (location, log_scale, u[1]))
        x = location + log_scale.exp() * (torch.log(v) - torch.log1p(-v))
        return to_signed(from_signed(x))


class Bernoulli(Likelihood):
    """Models binary pixels {0, 1} by a logit each; uint8 pixels are 1 from 128 up, or drawn if so configured."""

    params_per_channel = 1
    data_range = (0.0, 1.0)

    def from_uint8(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels >= 128).float()

    def observe(self, pixels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        if self.config.pixels == "threshold":
            return self.from_uint8(pixels)
        return (uniforms(keys, tuple(pixels.shape[1:])) * 255 < pixels).float()

    def to_uint8(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() * 255).round().clamp(0, 255).to(torch.uint8)

    def check(self, x: torch.Tensor) -> None:
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError(
                f"the bernoulli likelihood takes pixels that are 0 or 1, found values in [{x.amin().item():g}, "
                f"{x.amax().item():g}] with others among them; binarise them with from_uint8"
            )

    def _log_prob(self, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return -softplus((1 - 2 * x) * params[0])

    def _mean(self, params: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(params[0])

    def _sample(self, params: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.bernoulli(torch.sigmoid(params[0]), generator=generator)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "discretized_logistic": DiscretizedLogistic,
    "bernoulli": Bernoulli,
}
