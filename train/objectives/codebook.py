"""What trains a vector quantiser's codebook beside the optimizer: running averages, and codes brought back to life."""

import dataclasses
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from einops import rearrange
from torch import nn

from latent_codec.model.codebooks import Codes, VectorQuantizer
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, permutation
from latent_codec.storage import tensors as tensor_files
from train.config.vae import CodebookConfig
from train.data.crops import Batches, SamplePlan
from train.objectives.losses import Losses

_EPSILON = 1e-5  # of an even share, that each code is taken to be used besides
_CHOICE = 3  # what a run's seed is folded with to choose encoder outputs


class CodebookAverages(nn.Module):
    """Running averages of each code's share of the positions and of the outputs it stands for.

    They belong to a run's checkpoints, not to its model.
    """

    use: torch.Tensor  # (K, 1 + z) as `Codes.use`

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("use", torch.zeros(codes, 1 + channels))

    def save(self, path: Path) -> None:
        tensor_files.save_tensors(path, {"use": self.use.detach().cpu().contiguous()}, {"format": "pt"})

    @torch.no_grad()
    def put(self, code: torch.Tensor, vectors: torch.Tensor) -> None:
        """Codes (n,) start again as vectors (n, z), with an even share each."""
        share = 1 / len(self.use)
        self.use[code] = torch.cat([torch.ones_like(vectors[:, :1]), vectors], 1) * share

    @torch.no_grad()
    def add(self, use: torch.Tensor, decay: float) -> None:
        """use: (K, 1 + z), of one step over all processes (Razavi et al. 2019, eq. 2)."""
        self.use.lerp_(use, 1 - decay)

    @property
    def vectors(self) -> torch.Tensor:
        """(K, z): sums over shares, these smoothed so that no code divides by zero."""
        share, sums = self.use[:, :1], self.use[:, 1:]
        even = share.sum() / len(share)
        smoothed = (share + _EPSILON * even) / (1 + _EPSILON)
        return sums / smoothed


def averages_of(codec: Codec, config: CodebookConfig | None) -> CodebookAverages | None:
    """New ones for a codec whose codebook is trained; the optimizer is told whether the codebook is its business."""
    if config is None or not isinstance(codec.bottleneck, VectorQuantizer):
        return None
    codec.bottleneck.codebook.requires_grad_(config.codebook == "gradient")
    return CodebookAverages(*codec.bottleneck.codebook.shape)


@dataclasses.dataclass
class CodebookTraining:
    """Follows one run's vector quantiser: `start`, then `after_step` at every step that the optimizer took."""

    config: CodebookConfig
    codec: Codec
    averages: CodebookAverages
    accelerator: Accelerator
    images: Batches
    plan: SamplePlan

    @property
    def quantizer(self) -> VectorQuantizer:
        assert isinstance(self.codec.bottleneck, VectorQuantizer)
        return self.codec.bottleneck

    @torch.no_grad()
    def start(self, *, keep: bool) -> None:
        """Every code on an encoder output of the first samples, or where it is."""
        codes = torch.arange(len(self.averages.use), device=self.accelerator.device)
        if keep:
            self.averages.put(codes, self.quantizer.codebook)
        else:
            self._put(codes, 0)

    @torch.no_grad()
    def after_step(self, losses: Losses, step: int) -> None:
        """`losses`: this process' averages over the micro-batches of step number `step`, from 1."""
        use = torch.as_tensor(self.accelerator.reduce(losses.code_use, "mean"))
        self.averages.add(use, self.config.codebook_decay)
        if self.config.codebook == "ema":
            self.quantizer.codebook.copy_(self.averages.vectors)
        if step % self.config.revive_every == 0 and self.config.revive_below > 0:
            share = self.averages.use[:, 0]
            dead = torch.nonzero(share * len(share) < self.config.revive_below)[:, 0]
            if len(dead):  # on every process alike, for the averages are
                self._put(dead, step)

    def _put(self, codes: torch.Tensor, step: int) -> None:
        vectors = self._outputs(len(codes), step)
        self.averages.put(codes, vectors)
        self.quantizer.codebook[codes] = vectors

    def _outputs(self, count: int, step: int) -> torch.Tensor:
        """Encoder outputs (count, z) at places of this step's samples that a counter chooses.

        Every process computes them from the same samples, whoever trains on them, and takes the first one's.
        """
        whole = self.plan._replace(rank=0, world=1, micro_batches=1)
        batches = math.ceil(count / (whole.batch_size * (whole.crop // self.codec.factor) ** 2))
        found: list[torch.Tensor] = []
        for batch in self.images.batches(whole, step, step + batches):
            posterior = self.codec.encode(batch.pixels, batch.labels)
            assert isinstance(posterior, Codes)
            found.append(rearrange(posterior.outputs, "b z h w -> (b h w) z"))
        outputs = torch.cat(found)
        chosen = permutation(len(outputs), fold(self.plan.seed, _CHOICE, step))[:count]
        return torch.as_tensor(broadcast(outputs[chosen.to(outputs.device)].contiguous()))
