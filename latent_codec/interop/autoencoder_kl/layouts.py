"""Translate tensor names of AutoencoderKL, today's and earlier ones, and of the original latent diffusion code."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

from latent_codec.errors import UserError
from latent_codec.interop.autoencoder_kl.folding import Tensors
from latent_codec.model.config import ConvConfig

_ANCHOR = "encoder.conv_in.weight"
"""A tensor of every layout; what precedes it in a checkpoint of several models is the autoencoder's prefix."""
_PREFIXES = ("first_stage_model.", "vae.", "")
"""Prefixes in order of preference."""
_TRAINING = ("loss.", "model_ema.")
"""Prefixes in training checkpoints of what is no part of the autoencoder: discriminator, LPIPS and counters."""
_ATTENTION = {"norm": "group_norm", "q(uery)?": "to_q", "k(ey)?": "to_k", "v(alue)?": "to_v"}
_ATTENTION |= {"proj_(attn|out)": "to_out.0"}
"""Names within attention, of the original layout and of diffusers until 2023, and today's."""
_GROUPS = 32  # of all known AutoencoderKL; tensors do not tell

_LACKED = (
    (r"(en|de)coder\.(down|up|down_blocks|up_blocks)\.\d+\.(attn|attentions)\.", "attention outside the middle block"),
    (r"quantize\.", "a codebook (VQModel)"),
    (r"bn\.", "batch normalisation of latents (AutoencoderKLFlux2)"),
    (r".*(temporal|time_)", "layers over time (a video's autoencoder)"),
)


class InferredConfig(NamedTuple):
    """Hold what the names and shapes of an AutoencoderKL's tensors tell of its configuration."""

    backbone: ConvConfig
    image_channels: int
    latent_channels: int


def prefix_of(names: Iterable[str], where: str) -> str:
    """Return the prefix of an autoencoder's tensor names; raises `UserError` if a file holds none or several."""
    found = {name.removesuffix(_ANCHOR) for name in names if f".{name}".endswith(f".{_ANCHOR}")}
    if not found:
        raise UserError(f"{where}: no tensor {_ANCHOR}, under whatever prefix; it holds no autoencoder of this kind")
    for prefix in _PREFIXES:
        if prefix in found:
            return prefix
    if len(found) > 1:
        raise UserError(f"{where}: holds several autoencoders, {', '.join(sorted(found))}; give a file with one")
    return found.pop()


def is_training_state(name: str) -> bool:
    """Return True for a tensor that is left from training, such as the discriminator's."""
    return name.startswith(_TRAINING)


def canonical(tensors: Tensors, where: str) -> Tensors:
    """Return the tensors under today's names and shapes.
    Raises `UserError` if two get the same name, or for a feature that no codec has."""
    for name in sorted(tensors):
        for pattern, feature in _LACKED:
            if re.match(pattern, name):
                raise UserError(f"{where}: this autoencoder has {feature}, which no codec here has: tensor {name}")
    stages = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=-1)
    named: Tensors = {}
    for name, tensor in tensors.items():
        new = _canonical_name(name, stages)
        if new in named:
            raise UserError(f"{where}: tensor {new} is there under two names, one of them {name}")
        named[new] = _as_matrix(tensor) if ".attentions." in new else tensor
    return named


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return the matrix of a 1x1 convolution; other tensors as they are."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


_RULES = (
    (r"(en|de)coder\.(down|up)\.(\d+)\.block", r"\1coder.\2_blocks.\3.resnets"),
    (r"(en|de)coder\.(down|up)\.(\d+)\.(down|up)sample", r"\1coder.\2_blocks.\3.\4samplers.0"),
    (r"(en|de)coder\.mid\.block_1", r"\1coder.mid_block.resnets.0"),
    (r"(en|de)coder\.mid\.block_2", r"\1coder.mid_block.resnets.1"),
    (r"(en|de)coder\.mid\.attn_1", r"\1coder.mid_block.attentions.0"),
    (r"(en|de)coder\.norm_out", r"\1coder.conv_norm_out"),
    (r"(.*)\.nin_shortcut", r"\1.conv_shortcut"),
    *((rf"(.*\.attentions\.0)\.{theirs}", rf"\1.{ours}") for theirs, ours in _ATTENTION.items()),
)
"""Beginnings of the original layout's names, up to a dot, and today's in their place; applied one after the other."""


def _canonical_name(name: str, stages: int) -> str:
    # The original counts the decoder's resolutions from the finest, AutoencoderKL in the order of computation.
    if match := re.match(r"decoder\.up\.(\d+)", name):
        name = f"decoder.up.{stages - 1 - int(match[1])}{name[match.end() :]}"
    for pattern, today in _RULES:
        name = re.sub(rf"^{pattern}\.", rf"{today}.", name)
    return name


def infer_config(tensors: Tensors, where: str) -> InferredConfig:
    """Infer a configuration from tensors under today's names; raises `UserError` if one that decides it is missing.
    `storage.tensors.check_state` checks afterwards that all tensors are there and fit."""

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for name in tensors if (m := re.match(pattern, name))), default=-1)

    def size(name: str, dim: int) -> int:
        if name not in tensors or tensors[name].ndim != 4:
            raise UserError(f"{where}: tensor {name} is missing or no convolution; it holds no whole autoencoder")
        return tensors[name].shape[dim]

    stages = count(r"encoder\.down_blocks\.(\d+)\.")
    if stages == 0:
        raise UserError(
            f"{where}: the encoder has no blocks, so this is no whole autoencoder of the AutoencoderKL kind"
        )
    widths = tuple(size(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0) for i in range(stages))
    if any(width % _GROUPS for width in widths):
        raise UserError(
            f"{where}: widths {widths} are no multiples of {_GROUPS} groups, and a file alone does not tell another "
            "number; give a folder whose config.json has norm_num_groups"
        )
    backbone = ConvConfig(
        widths=widths,
        layers_per_block=count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        groups=_GROUPS,
        mid_attention=any(name.startswith("encoder.mid_block.attentions.") for name in tensors),
        quant_conv="quant_conv.weight" in tensors,
        post_quant_conv="post_quant_conv.weight" in tensors,
    )
    return InferredConfig(backbone, size("encoder.conv_in.weight", 1), size("decoder.conv_in.weight", 1))
