"""Compute adversarial losses: a patch discriminator, the losses of both sides, and the weight between them."""

import math
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.func import functional_call
from torch.nn.functional import leaky_relu, relu

from latent_codec.model.networks.conv import GroupNorm
from train.config.vae import AdversarialConfig

_EPSILON = 1e-6  # keeps the ratio of two gradient norms finite
_GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Score each patch of an image; real images should score high (Isola et al. 2017, "PatchGAN"). Groups of channels
    are normalised within an image: its score must depend neither on the batch nor on how that is split."""

    def __init__(self, image_channels: int, width: int, layers: int) -> None:
        """Create the layers: `width`, a multiple of 32, doubles with each further layer up to eight times."""
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        strides = [2] * layers + [1]
        convs, norms, narrow = [], [], image_channels
        for i, (wide, stride) in enumerate(zip(widths, strides, strict=True)):
            convs.append(nn.Conv2d(narrow, wide, 4, stride, padding=1, bias=i == 0))
            norms.append(GroupNorm(_GROUPS, wide) if i > 0 else nn.Identity())
            narrow = wide
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)
        self.score = nn.Conv2d(narrow, 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (b, c, h, w) in [-1, 1] to scores (b, 1, h / 2^layers - 2, w / 2^layers - 2)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = leaky_relu(norm(conv(x)), 0.2)
        return self.score(x)


class AdversarialLosses(NamedTuple):
    """Hold the losses of both sides; each is a scalar, and only the first two have gradients."""

    generator: torch.Tensor  # minus the weighted mean score of decoded images, in nats per image
    discriminator: torch.Tensor  # hinge loss
    weight: torch.Tensor  # nats per image for one unit of the mean score
    score_real: torch.Tensor  # mean score of images
    score_fake: torch.Tensor  # mean score of decoded images

    def values(self) -> dict[str, float]:
        """Return the logged values."""
        values = {name: value.item() for name, value in self._asdict().items()}
        return {"adversarial_weight" if name == "weight" else name: value for name, value in values.items()}


class Adversary(nn.Module):
    """Compute the losses of generator and discriminator together, for one backward pass and one optimizer step.

    The discriminator's hinge loss (Lim & Ye 2017, eq. 3) sees decoded images without their gradient, and the
    generator's loss sees the discriminator's weights as constants, so no gradient of one side reaches the other.

    With `adaptive`, the generator's loss is weighted so that its gradient at the decoder's last layer is
    `adversarial_weight` times as long as the reconstruction's (Esser et al. 2021, eq. 7). Both gradients are averaged
    over all processes first, so every process has the weight of the whole batch. Each micro-batch has its own.
    """

    def __init__(self, config: AdversarialConfig, image_channels: int) -> None:
        super().__init__()
        self.config = config
        self.net = PatchDiscriminator(image_channels, config.discriminator_width, config.discriminator_layers)

    def forward(
        self, real: torch.Tensor, fake: torch.Tensor, reconstruction: torch.Tensor, last: nn.Parameter, begun: bool
    ) -> AdversarialLosses:
        """Return the losses of images `real` and `fake` (b, c, h, w) in [-1, 1], zero until they have `begun`.
        `reconstruction` () is the loss of `fake` in nats per image, `last` the weight of the layer that makes it."""
        if not begun:  # every parameter must take part, or other processes would wait for its gradient
            zero = torch.zeros((), device=fake.device)
            nothing = 0.0 * sum(p.sum() for p in self.net.parameters())
            return AdversarialLosses(zero, nothing, zero, zero, zero)  # pyright: ignore[reportArgumentType]
        fixed = {name: p.detach() for name, p in self.net.named_parameters()}
        score = -functional_call(self.net, fixed, (fake,)).float().mean()
        weight = self._weight(reconstruction, score, last, math.prod(fake.shape[2:]))
        scores_real, scores_fake = self.net(real).float(), self.net(fake.detach()).float()  # (b, 1, h', w') both
        hinge = 0.5 * (relu(1 - scores_real).mean() + relu(1 + scores_fake).mean())
        return AdversarialLosses(
            weight * score, hinge, weight, scores_real.detach().mean(), scores_fake.detach().mean()
        )

    def _weight(
        self, reconstruction: torch.Tensor, score: torch.Tensor, last: nn.Parameter, pixels: int
    ) -> torch.Tensor:
        if not self.config.adaptive:
            return torch.full((), self.config.adversarial_weight * pixels, device=score.device)
        if not torch.is_grad_enabled():  # without gradients there is nothing to balance
            return torch.zeros((), device=score.device)
        gradients = torch.stack(
            [torch.autograd.grad(part, last, retain_graph=True)[0] for part in (reconstruction, score)]
        )
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(gradients)
            gradients = gradients / distributed.get_world_size()
        ours, theirs = gradients.flatten(1).norm(dim=1)
        return (self.config.adversarial_weight * ours / (theirs + _EPSILON)).clamp(max=self.config.most_weight)


def last_weight(decoder: nn.Module) -> nn.Parameter:
    """Return the weight of a decoder's last layer."""
    return [p for p in decoder.parameters() if p.dim() > 1][-1]
