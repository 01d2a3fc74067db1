"""Put any codec into the `vae=` slot of a diffusers pipeline. Needs the extra `diffusers`."""

from typing import Any, cast

import torch

from latent_codec.errors import UserError
from latent_codec.inference import tiling
from latent_codec.interop.autoencoder_kl import activations
from latent_codec.model.checks import check_prefix, check_unconditional
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig
from latent_codec.model.file import LatentStatistics
from latent_codec.model.finite import check_finite
from latent_codec.model.likelihoods import from_signed
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.storage.json_config import from_json, to_json

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ImportError as error:
    raise ImportError(f"the adapter needs diffusers ({error}): pip install 'latent-codec[diffusers]'") from error


class CodecAutoencoder(ModelMixin, ConfigMixin):
    """Wrap a codec with the interface of AutoencoderKL; make one with `from_codec`.

    Its latents are normalised by the codec's statistics, so that scaling factor 1 and shift 0 are right in any
    pipeline. Pixels are in [-1, 1] whatever the codec's likelihood. Results have the weights' number type, as
    AutoencoderKL's do; the posterior and the expected pixels are computed in float32. `save_pretrained` and
    `from_pretrained` are diffusers'.
    """

    @register_to_config
    # Parameters: diffusers stores each in config.json, where pipelines look for them by these names.
    def __init__(
        self,
        *,
        codec_config: dict[str, Any],
        statistics: dict[str, Any],
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        scaling_factor: float,
        shift_factor: float,
        latents_mean: tuple[float, ...] | None,
        latents_std: tuple[float, ...] | None,
        force_upcast: bool,
    ) -> None:
        super().__init__()
        self.codec = Codec(from_json(CodecConfig, codec_config))
        self.codec.statistics = from_json(LatentStatistics, statistics, where="statistics")
        self.use_slicing = False
        self._tile: int | None = None

    @classmethod
    def from_codec(cls, codec: Codec, channels: int | None = None) -> "CodecAutoencoder":
        """Return an adapter that shares the codec's weights, for latents of all channels or of one of its prefixes.

        `force_upcast` is measured on made-up images. Raises `UserError` for a codec without latent statistics or a
        Gaussian posterior, without such a prefix, or whose factor is no power of two, as pipelines require.
        """
        if (kind := codec.config.bottleneck.kind) != "gaussian":
            raise UserError(f"pipelines need a Gaussian posterior; this codec's bottleneck is {kind}")
        check_unconditional(codec, "a pipeline")
        channels = codec.config.latent_channels if channels is None else channels
        check_prefix(codec, channels)
        if codec.statistics is None:
            raise UserError(
                "the codec has no latent statistics to normalise by; measure them: latent-codec export --data"
            )
        stages = codec.factor.bit_length()
        if 2 ** (stages - 1) != codec.factor:
            raise UserError(f"pipelines take latents of 1/2^n of each side; this codec's are of 1/{codec.factor}")
        force_upcast = activations.overflows(_peak(codec))
        with torch.device("meta"):
            adapter = cls(
                codec_config=to_json(codec.config),
                statistics=to_json(codec.statistics),
                in_channels=codec.config.image_channels,
                out_channels=codec.config.image_channels,
                latent_channels=channels,
                block_out_channels=(1,) * stages,  # pipelines compute the factor from their number
                scaling_factor=1.0,
                shift_factor=0.0,
                latents_mean=None,
                latents_std=None,
                force_upcast=force_upcast,
            )
        adapter.codec = codec
        return adapter.eval()

    @property
    def post_quant_conv(self) -> torch.nn.Module:
        """Return the module that SDXL's pipelines ask for the decoder's number type."""
        return self.codec

    def enable_tiling(self, tile: int | None = None) -> None:
        """Run larger images through the networks in tiles of `tile` pixels a side, by default `tiling`'s; exact for
        `lite` and `linear`, blended for `conv`. Raises `UserError` for a tile too small."""
        tile = tiling.default_tile(self.codec) if tile is None else tile
        tiling.check_tile(self.codec, tile)
        self._tile = tile

    def disable_tiling(self) -> None:
        """Run every image through the networks whole."""
        self._tile = None

    def enable_slicing(self) -> None:
        """Run the images of a batch through the networks one by one."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Run batches through the networks whole."""
        self.use_slicing = False

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Encode pixels (b, c, h, w) in [-1, 1]; `latent_dist` is the posterior of normalised latents (b, z, h/f, w/f).
        Raises `ValueError` unless h and w are multiples of the factor f."""
        parts = [self._posterior(part) for part in self._slices(x)]
        posterior = DiagonalGaussianDistribution(torch.cat(parts).to(self.dtype))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        """Decode normalised latents (b, z, h/f, w/f); `sample` is the expected pixels (b, c, h, w), not clipped.
        The generator is accepted, as by other decoders, and not used. Raises `UserError` for pixels that are not finite
        (`encode` for such latents), as float16 ends at 65504."""
        sample = torch.cat([self._pixels(part) for part in self._slices(z)]).to(self.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Encode, and decode the posterior's mode or a draw from it."""
        posterior = self.encode(sample).latent_dist
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)

    def _slices(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.split(1) if self.use_slicing else (x,)

    def _posterior(self, x: torch.Tensor) -> torch.Tensor:
        """Return mean and log-variance of normalised latents, (b, 2z, h/f, w/f) float32."""
        if self.codec.likelihood.data_range != (-1.0, 1.0):
            x = self.codec.likelihood.from_uint8(from_signed(x))
        x = x.to(self.dtype)
        self.codec.check_pixels(x)
        cut = tiling.cuts(x[0, 0].numel(), self._tile)
        posterior = tiling.encode(self.codec, x, self._tile) if cut else self.codec.encode(x)
        assert isinstance(posterior, DiagonalGaussian)
        posterior = posterior.prefix(self._channels)
        check_finite(posterior.mean, "the model's latents are")
        mean, std = self._moments(x.device)
        return torch.cat([(posterior.mean.to(x.device) - mean) / std, posterior.logvar.to(x.device) - 2 * std.log()], 1)

    def _pixels(self, z: torch.Tensor) -> torch.Tensor:
        mean, std = self._moments(z.device)
        latents = (z.float() * std + mean).to(self.dtype)
        cut = tiling.cuts(z[0, 0].numel() * self.codec.factor**2, self._tile)
        likelihood = self.codec.likelihood
        if cut:
            pixels = tiling.decode(self.codec, latents, self._tile)
        else:
            pixels = likelihood.checked_mean(self.codec.likelihood_params(latents))
        low, high = likelihood.data_range
        return (pixels.to(z.device).float() - low) * (2 / (high - low)) - 1

    @property
    def _channels(self) -> int:
        return self.config["latent_channels"]

    def _moments(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each channel's mean and standard deviation, (z, 1, 1) float32 whatever the weights are."""
        statistics = cast(LatentStatistics, self.codec.statistics).prefix(self._channels)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
            for values in (statistics.mean, statistics.std)
        )
        return mean, std


@torch.inference_mode()
def _peak(codec: Codec) -> float:
    """Return the largest activation while made-up images are encoded and decoded."""
    weight = next(codec.parameters())
    with activations.watched(codec) as peak:
        for pixels in activations.made_up_images(codec.config.image_channels, codec.factor):
            x = codec.likelihood.from_uint8(pixels.to(weight.device)).to(weight.dtype)
            posterior = codec.encode(x)
            codec.decode(posterior.sample(activations.standard_noise(posterior.mean)).to(weight.dtype))
    return peak.value
