"""An adversary for what a decoder makes: a discriminator of patches, the two losses, and the weight between them."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.func import functional_call
from torch.nn.functional import leaky_relu, relu

from latent_codec.storage.tensors import save_tensors
from train.config.vae import AdversarialConfig

_LEAST = 1e-6  # added to the norm that the reconstruction's is divided by
_GROUPS = 32


class PatchDiscriminator(nn.Module):
    """A score for each patch of an image: real ones high (Isola et al. 2017, "PatchGAN").

    Normalised by groups of channels within each image, not by a batch: an image's score must not depend on the others,
    nor on how a batch is shared out over processes.
    """

    def __init__(self, image_channels: int, width: int, layers: int) -> None:
        """`width`: features of the first layer, doubled by each further one up to eight times; a multiple of 32."""
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        strides = [2] * layers + [1]
        convs, norms, narrow = [], [], image_channels
        for i, (wide, stride) in enumerate(zip(widths, strides, strict=True)):
            convs.append(nn.Conv2d(narrow, wide, 4, stride, padding=1, bias=i == 0))
            norms.append(nn.GroupNorm(_GROUPS, wide) if i > 0 else nn.Identity())
            narrow = wide
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)
        self.score = nn.Conv2d(narrow, 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) in [-1, 1] -> (b, 1, h / 2^layers - 2, w / 2^layers - 2)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = leaky_relu(norm(conv(x)), 0.2)
        return self.score(x)

    def save(self, path: Path) -> None:
        save_tensors(path, {k: t.detach().cpu().contiguous() for k, t in self.state_dict().items()}, {"format": "pt"})


def scores_along(side: int, layers: int) -> int:
    """Scores along one side of an image; below 1 there are none."""
    return side // 2**layers - 2


class Contest(NamedTuple):
    """() each; the first two have gradients, the others are for the log."""

    generator: torch.Tensor  # what the codec is to pay, weighted
    discriminator: torch.Tensor  # hinge loss
    weight: torch.Tensor  # of -real scores of decoded images, in nats per image
    real: torch.Tensor  # mean score of images
    fake: torch.Tensor  # mean score of decoded images


def no_contest(like: torch.Tensor) -> Contest:
    zero = torch.zeros((), device=like.device)
    return Contest(zero, zero, zero, zero, zero)


class Adversary(nn.Module):
    """Both sides of the contest in one loss, so that one backward pass and one optimizer step serve both.

    The discriminator's hinge loss (Lim & Ye 2017, eq. 3) sees decoded images without their gradient; the generator's
    -mean score goes through the discriminator's weights as constants. No gradient of one side reaches the other.

    With `adaptive`, the generator's loss is weighted so that its gradient at the decoder's last layer is
    `adversarial_weight` times as long as the reconstruction's (Esser et al. 2021, eq. 7). Both gradients are averaged
    over all processes first: every process has the same weight, that of the whole batch. Each micro-batch has its own.
    """

    def __init__(self, config: AdversarialConfig, image_channels: int) -> None:
        super().__init__()
        self.config = config
        self.net = PatchDiscriminator(image_channels, config.discriminator_width, config.discriminator_layers)

    def forward(
        self,
        real: torch.Tensor,
        fake: torch.Tensor,
        reconstruction: torch.Tensor,
        last: nn.Parameter,
        begun: bool,
    ) -> Contest:
        """real, fake (b, c, h, w) in [-1, 1]; reconstruction () is the loss that `fake` is made by, in nats per image;
        `last` the weight of the layer that makes it. Before it has `begun` there is no contest.
        """
        if not begun:  # every parameter must still take part, or other processes would wait for its gradient
            return no_contest(fake)._replace(discriminator=0.0 * sum(p.sum() for p in self.net.parameters()))
        fixed = {name: p.detach() for name, p in self.net.named_parameters()}
        score = -functional_call(self.net, fixed, (fake,)).float().mean()
        weight = self._weight(reconstruction, score, last, math.prod(fake.shape[2:]))
        scores_real, scores_fake = self.net(real).float(), self.net(fake.detach()).float()  # (b, 1, h', w') both
        hinge = 0.5 * (relu(1 - scores_real).mean() + relu(1 + scores_fake).mean())
        return Contest(weight * score, hinge, weight, scores_real.detach().mean(), scores_fake.detach().mean())

    def _weight(
        self, reconstruction: torch.Tensor, score: torch.Tensor, last: nn.Parameter, pixels: int
    ) -> torch.Tensor:
        if not self.config.adaptive:
            return torch.full((), self.config.adversarial_weight * pixels, device=score.device)
        if not torch.is_grad_enabled():  # nothing is trained, so nothing is to be balanced
            return torch.zeros((), device=score.device)
        gradients = torch.stack(
            [torch.autograd.grad(part, last, retain_graph=True)[0] for part in (reconstruction, score)]
        )
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(gradients)
            gradients = gradients / distributed.get_world_size()
        ours, theirs = gradients.flatten(1).norm(dim=1)
        return (self.config.adversarial_weight * ours / (theirs + _LEAST)).clamp(max=self.config.most_weight)


def last_weight(decoder: nn.Module) -> nn.Parameter:
    """The weight of a decoder's last layer."""
    return [p for p in decoder.parameters() if p.dim() > 1][-1]
