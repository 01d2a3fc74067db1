"""Train the codebook of a vector quantiser beside the optimizer: keep running averages and revive dead codes."""

import dataclasses
import math

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from einops import rearrange
from torch import nn

from latent_codec.model.codebooks import Codes, VectorQuantizer
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, permutation
from train.config.vae import CodebookConfig
from train.data.crops import Batches, SamplePlan
from train.objectives.losses import VAELosses

_EPSILON = 1e-5  # of an even share, added to each code's share
_CHOICE = 3  # a run's seed is folded with it to choose encoder outputs


class CodebookAverages(nn.Module):
    """Keep running averages of each code's share of the positions and of the outputs assigned to it.
    They belong to a run's checkpoints, not to its model."""

    use: torch.Tensor  # (K, 1 + z) as `Codes.use` returns it

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("use", torch.zeros(codes, 1 + channels))

    @torch.no_grad()
    def reset(self, codes: torch.Tensor, vectors: torch.Tensor) -> None:
        """Restart codes (n,) at vectors (n, z), with an even share each."""
        share = 1 / len(self.use)
        self.use[codes] = torch.cat([torch.ones_like(vectors[:, :1]), vectors], 1) * share

    @torch.no_grad()
    def add(self, use: torch.Tensor, decay: float) -> None:
        """Add `use` (K, 1 + z) of one step over all processes (Razavi et al. 2019, eq. 2)."""
        self.use.lerp_(use, 1 - decay)

    @property
    def vectors(self) -> torch.Tensor:
        """Return the averaged outputs (K, z): sums over shares, which are smoothed so that none is zero."""
        share, sums = self.use[:, :1], self.use[:, 1:]
        even = share.sum() / len(share)
        smoothed = (share + _EPSILON * even) / (1 + _EPSILON)
        return sums / smoothed


def averages_of(codec: Codec, config: CodebookConfig | None) -> CodebookAverages | None:
    """Return new averages for a codec whose codebook is trained, else None.
    The codebook gets `requires_grad` exactly if the optimizer trains it."""
    if config is None or not isinstance(codec.bottleneck, VectorQuantizer):
        return None
    codec.bottleneck.codebook.requires_grad_(config.codebook == "gradient")
    return CodebookAverages(*codec.bottleneck.codebook.shape)


@dataclasses.dataclass
class CodebookTraining:
    """Train one run's codebook: call `start` once, then `after_step` after every step that the optimizer took."""

    config: CodebookConfig
    codec: Codec
    averages: CodebookAverages
    accelerator: Accelerator
    images: Batches
    plan: SamplePlan

    @property
    def quantizer(self) -> VectorQuantizer:
        """Return the codec's quantiser."""
        assert isinstance(self.codec.bottleneck, VectorQuantizer)
        return self.codec.bottleneck

    @torch.no_grad()
    def start(self, *, keep: bool) -> None:
        """Put every code on an encoder output of the first samples, or leave the codes where they are."""
        codes = torch.arange(len(self.averages.use), device=self.accelerator.device)
        if keep:
            self.averages.reset(codes, self.quantizer.codebook)
        else:
            self._move(codes, 0)

    @torch.no_grad()
    def after_step(self, losses: VAELosses, step: int) -> None:
        """Update averages and codebook with this process' average losses of step number `step`, counted from 1."""
        assert losses.codes is not None
        use = torch.as_tensor(self.accelerator.reduce(losses.codes.use, "mean"))
        self.averages.add(use, self.config.codebook_decay)
        if self.config.codebook == "ema":
            self.quantizer.codebook.copy_(self.averages.vectors)
        if step % self.config.revive_every == 0 and self.config.revive_below > 0:
            share = self.averages.use[:, 0]
            dead = torch.nonzero(share * len(share) < self.config.revive_below)[:, 0]
            if len(dead):  # the same on every process, because the averages are
                self._move(dead, step)

    def _move(self, codes: torch.Tensor, step: int) -> None:
        vectors = self._outputs(len(codes), step)
        self.averages.reset(codes, vectors)
        self.quantizer.codebook[codes] = vectors

    def _outputs(self, count: int, step: int) -> torch.Tensor:
        """Return encoder outputs (count, z) at positions of this step's samples, chosen by a counter.
        Every process computes them from the same samples and takes those of the first."""
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
