"""Define a class-conditional flow model of normalised latents, and its safetensors file. Needs the extra `diffusers`.
The file's metadata key `latent_codec` holds {format_version, transformer, latents, provenance}."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from latent_codec.diffusion.config import LatentSpace, TransformerConfig
from latent_codec.errors import UserError
from latent_codec.precision import float32_island
from latent_codec.storage.json_config import dumps, from_json, to_json
from latent_codec.storage.tensors import (
    FORMAT_VERSION,
    KEY,
    check_claim,
    check_finite,
    content_id,
    read_header,
    save_tensors,
    stored_shapes,
)

TIMES = 1000
"""Number of diffusers' time steps: its schedulers and embeddings call t = 1, pure noise, 1000."""


class Diffusion(nn.Module):
    """Predict the velocity noise - z of the straight path z_t = (1 - t) z + t noise from z_t, t and a label: rectified
    flow (Liu et al. 2023; Lipman et al. 2023) of normalised latents. Raises `UserError` without diffusers."""

    scale: torch.Tensor  # (2, z, 1, 1): mean and standard deviation of the latents

    def __init__(self, config: TransformerConfig, latents: LatentSpace) -> None:
        super().__init__()
        self.config, self.latents = config, latents
        self.provenance: dict[str, Any] = {}
        scale = torch.tensor([latents.mean, latents.std], dtype=torch.float32)[..., None, None]
        self.register_buffer("scale", scale, persistent=False)  # to copy it in each step, the host would wait
        self.transformer = _transformer(config, latents)

    def forward(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return velocities (b, z, s, s) float32 at latents of that shape, t (b,) in [0, 1] and labels (b,) int64,
        where -1 means none: guidance compares with it, and an unconditional model has no other."""
        if z.shape[1:] != self.shape:
            raise ValueError(f"latents of shape {tuple(z.shape)} are not (b, {', '.join(map(str, self.shape))})")
        labels = torch.where(labels < 0, len(self.latents.classes), labels)
        velocity = self.transformer(z, timestep=t * TIMES, class_labels=labels, return_dict=False)[0]
        return velocity.float()

    @property
    def shape(self) -> torch.Size:
        """Return the shape (z, s, s) of one image's latents."""
        return torch.Size((self.latents.channels, self.config.size, self.config.size))

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        """Scale raw latents (b, z, h, w) to mean 0 and standard deviation 1 per channel, in float32."""
        mean, std = self.scale
        with float32_island(z):
            return (z.float() - mean) / std

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """Invert `normalize`."""
        mean, std = self.scale
        return z.float() * std + mean

    @property
    def model_id(self) -> str:
        """Return the SHA-256 of configuration and tensors, 64 hex digits."""
        return content_id([to_json(self.config), to_json(self.latents)], self.state_dict())

    def save(self, path: Path) -> None:
        """Write a file that `load` reads; raises `OSError` if it cannot be written."""
        tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in self.state_dict().items()}
        check_finite(tensors, path)
        header = {
            "format_version": FORMAT_VERSION,
            "transformer": to_json(self.config),
            "latents": to_json(self.latents),
            "provenance": self.provenance,
        }
        save_tensors(path, tensors, {KEY: dumps(header)})

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> "Diffusion":
        """Read a file that `save` wrote; raises `UserError` if it is damaged or holds another kind of model."""
        header = read_header(path)
        try:
            config = from_json(TransformerConfig, header["transformer"], where="transformer")
            latents = from_json(LatentSpace, header["latents"], where="latents")
            provenance = from_json(dict, header["provenance"], where="provenance")
        except KeyError as error:
            raise UserError(f"{path}: no latent diffusion model: its header lacks {error}") from error
        except ValueError as error:
            raise UserError(f"{path}: damaged or unknown header: {error}") from error
        check_claim([config, latents], lambda: cls(config, latents), stored_shapes(path), path)
        model, tensors = cls(config, latents), load_file(path)
        check_finite(tensors, path)
        model.load_state_dict(tensors)
        model.provenance = provenance
        return model.eval().to(device)


def _transformer(config: TransformerConfig, latents: LatentSpace) -> nn.Module:
    """Build the network with the initial weights of adaLN-Zero (Peebles & Xie 2023, section 3.2), unlike diffusers."""
    try:
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    except ImportError as error:
        raise UserError(f"diffusion models need diffusers ({error}): pip install 'latent-codec[diffusers]'") from error
    net: Any = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_width,
        in_channels=latents.channels,
        out_channels=latents.channels,
        num_layers=config.depth,
        sample_size=config.size,
        patch_size=config.patch,
        num_embeds_ada_norm=len(latents.classes),
    )
    for block in net.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # it would drop labels by the global random state
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (net.proj_out_1, net.proj_out_2, *(block.norm1.linear for block in net.transformer_blocks)):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net
