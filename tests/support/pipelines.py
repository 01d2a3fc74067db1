"""Make diffusers' pipelines with small random parts around an autoencoder; prompts are given as embeddings."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_inpaint import FluxInpaintPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_inpaint import StableDiffusion3InpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

FAMILIES = ("SD", "SDXL", "SD3", "FLUX")
SIDE = 32  # pixels
_WIDTH = 8  # width of the prompts' embeddings


class Painted(NamedTuple):
    latents: torch.Tensor
    """The diffusion model's output, (1, z, h/f, w/f)."""
    picture: torch.Tensor
    """(1, 3, h, w) in [0, 1]."""


def pipeline(family: str, vae: Any) -> Any:
    """Make the pipeline of a family, always with the same random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = _MAKERS[family](vae, vae.config.latent_channels)
    made.set_progress_bar_config(disable=True)
    return made


def paint(family: str, vae: Any) -> Painted:
    """Paint the same picture twice: as latents, and decoded by the pipeline."""
    made, size = pipeline(family, vae), {"height": SIDE, "width": SIDE, "num_inference_steps": 2}

    def run(kind: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return made(**_prompts(family), **size, generator=generator, output_type=kind).images

    latents = run("latent")
    if family == "FLUX":
        latents = FluxPipeline._unpack_latents(latents, SIDE, SIDE, made.vae_scale_factor)
    return Painted(latents, run("pt"))


def encode(family: str, vae: Any, x: torch.Tensor, seed: int) -> torch.Tensor:
    """Encode an image (1, 3, h, w) in [-1, 1] as a pipeline that starts from one does."""
    this: Any = SimpleNamespace(vae=vae)
    generator = torch.Generator().manual_seed(seed)
    if family == "SDXL":
        prepare: Any = StableDiffusionXLImg2ImgPipeline.prepare_latents
        return prepare(this, x, None, 1, 1, x.dtype, x.device, generator, add_noise=False)
    inpaint = {
        "SD": StableDiffusionInpaintPipeline,
        "SD3": StableDiffusion3InpaintPipeline,
        "FLUX": FluxInpaintPipeline,
    }
    return inpaint[family]._encode_vae_image(this, x, generator)


def _prompts(family: str) -> dict[str, torch.Tensor]:
    prompts = {"prompt_embeds": torch.ones(1, 4, _WIDTH)}
    if family != "SD":
        prompts["pooled_prompt_embeds"] = torch.ones(1, _WIDTH)
    if family != "FLUX":
        prompts |= {f"negative_{name}": torch.zeros_like(value) for name, value in prompts.items()}
    return prompts


def _unet(channels: int, **settings: Any) -> UNet2DConditionModel:
    settings |= {"block_out_channels": (8,), "layers_per_block": 1, "cross_attention_dim": _WIDTH}
    settings |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    settings |= {"sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 4}
    return UNet2DConditionModel(in_channels=channels, out_channels=channels, **settings)


def _absent(*parts: str) -> dict[str, Any]:
    return dict.fromkeys(parts)


def _sd(vae: Any, channels: int) -> Any:
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = _absent("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    unet = _unet(channels)
    return StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)


def _sdxl(vae: Any, channels: int) -> Any:
    parts = _absent("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = _unet(channels, **more, projection_class_embeddings_input_dim=_WIDTH + 6 * 4)
    return StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=DDIMScheduler(), add_watermarker=False, **parts)


def _sd3(vae: Any, channels: int) -> Any:
    parts = _absent(*(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")))
    size: Any = {"sample_size": 8, "patch_size": 1, "in_channels": channels, "out_channels": channels}
    transformer = SD3Transformer2DModel(**size, **_BLOCK, **_TEXT, attention_head_dim=8, caption_projection_dim=16)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **parts)


def _flux(vae: Any, channels: int) -> Any:
    parts = _absent("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    size: Any = {"patch_size": 1, "in_channels": 4 * channels, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8)}
    transformer = FluxTransformer2DModel(**size, **_BLOCK, **_TEXT, attention_head_dim=16)
    return FluxPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, **parts)


def _dit(vae: Any, channels: int) -> Any:
    """Make a pipeline that takes classes instead of prompts."""
    size: Any = {"sample_size": 4, "in_channels": channels, "out_channels": channels}
    transformer = DiTTransformer2DModel(**size, **_BLOCK, attention_head_dim=8)
    return DiTPipeline(transformer.eval(), vae, DDIMScheduler())


_BLOCK: Any = {"num_layers": 1, "num_attention_heads": 2}
_TEXT: Any = {"joint_attention_dim": _WIDTH, "pooled_projection_dim": _WIDTH}
_MAKERS = {"SD": _sd, "SDXL": _sdxl, "SD3": _sd3, "FLUX": _flux, "DiT": _dit}
