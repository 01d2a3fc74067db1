"""The model: backbone + bottleneck + likelihood."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import one_hot as one_hot_of

from latent_codec.errors import UserError
from latent_codec.model import file as model_file
from latent_codec.model.bottlenecks import BOTTLENECKS, Posterior
from latent_codec.model.config import CodecConfig
from latent_codec.model.file import LatentStatistics, ModelFile
from latent_codec.model.likelihoods import LIKELIHOODS, Likelihood
from latent_codec.model.networks import BACKBONES
from latent_codec.model.shipped import resolve, shipped
from latent_codec.prior.priors import Priors
from latent_codec.storage import tensors as tensor_files


class Codec(nn.Module):
    """A VAE over images (b, c, h, w) whose sides are multiples of `factor`.

    `statistics`, `priors` and `provenance` come from the model file; a codec made from a config has none.
    """

    likelihood: Likelihood

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.statistics: LatentStatistics | None = None
        self.provenance: dict[str, Any] = {}
        self.priors: Priors | None = None
        self.bottleneck = BOTTLENECKS[config.bottleneck.kind](config.bottleneck, config.latent_channels)
        self.likelihood = LIKELIHOODS[config.likelihood.kind](config.likelihood)
        self.backbone = BACKBONES[config.backbone.kind](
            config.backbone,
            config.image_channels,
            config.latent_channels,
            self.bottleneck.features_per_latent,
            self.likelihood.params_per_channel,
            len(config.classes),
        )

    @property
    def factor(self) -> int:
        """Pixels per latent element along one side."""
        return self.backbone.factor

    def check_pixels(self, x: torch.Tensor) -> None:
        """Raise `ValueError` unless x is (b, c, h, w) with h and w multiples of the factor."""
        if x.ndim != 4 or x.shape[1] != self.config.image_channels or any(s % self.factor for s in x.shape[2:]):
            raise ValueError(
                f"pixels of shape {tuple(x.shape)} are not (b, {self.config.image_channels}, h, w) with sides that "
                f"are multiples of {self.factor}; pad them with latent_codec.images.geometry.pad"
            )

    def encode(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Posterior:
        """Posterior over latents (b, z, h/f, w/f) of pixels (b, c, h, w): uint8, or float in the likelihood's range.

        `labels` (b,) int64 number the config's classes; a conditional model needs them, another ignores them.
        Raises `ValueError` if they are missing or out of range, or if h or w is no multiple of the factor (pad with
        `latent_codec.images.geometry.pad`).
        """
        return self.bottleneck(self.features(x, labels))

    def features(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """What the bottleneck makes the posterior of, (b, features * z, h/f, w/f), given what `encode` takes."""
        self.check_pixels(x)
        x = self.likelihood.from_uint8(x) if x.dtype == torch.uint8 else x
        return self.backbone.encode(self._with_labels(x, labels))

    def likelihood_params(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The likelihood's parameters (b, p * c, h, w) given latents (b, z, h/f, w/f); labels as for `encode`."""
        return self.backbone.decode(self._with_labels(z, labels))

    def decode(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Expected pixels (b, c, h, w), float32 in the likelihood's range, not clipped; labels as for `encode`."""
        return self.likelihood.mean(self.likelihood_params(z, labels))

    def decode_uint8(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Expected pixels (b, c, h, w) as uint8, rounded and clipped; labels as for `encode`."""
        return self.likelihood.to_uint8(self.decode(z, labels))

    def class_numbers(self, names: Sequence[str | None]) -> torch.Tensor:
        """Labels (b,) int64 of images by the names of their classes, zeros where the model has none.

        Raises `UserError` for a class that a conditional model does not know.
        """
        classes = self.config.classes
        if not classes:
            return torch.zeros(len(names), dtype=torch.int64)
        for name in names:
            if name not in classes:
                found = "no class" if name is None else f"class {name!r}"
                raise UserError(
                    f"{found}, but the model knows {', '.join(classes)}; put each image in its class' folder"
                )
        return torch.tensor([classes.index(name) for name in names if name is not None], dtype=torch.int64)

    def _with_labels(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """(b, c, h, w) -> (b, c + classes, h, w): one-hot, constant over the image; no copy where there are none."""
        count = len(self.config.classes)
        if count == 0:
            return x
        if labels is None or labels.shape != x.shape[:1] or not bool(((labels >= 0) & (labels < count)).all()):
            found = None if labels is None else labels.tolist()
            raise ValueError(f"labels {found} are not one of {count} classes, 0 to {count - 1}, for each image")
        one_hot = one_hot_of(labels, count).to(x)[:, :, None, None]  # (b, classes, 1, 1)
        return torch.cat([x, one_hot.expand(-1, -1, *x.shape[2:])], 1)

    def compile_networks(self) -> None:
        """Have torch compile encoder and decoder when they are first used; results differ in their last bits."""
        self.backbone.encode = torch.compile(self.backbone.encode)
        self.backbone.decode = torch.compile(self.backbone.decode)

    @property
    def model_id(self) -> str:
        """SHA-256 of config and tensors, 64 hex digits."""
        return model_file.model_id(self.config, self.state_dict())

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> "Codec":
        """A codec from a file, or from a shipped model's name such as "photo"; in eval mode, float32.

        Raises `UserError` if there is no such model, its config makes none, or any tensor is missing, extra,
        mis-shaped or not finite.
        """
        path = resolve(source)
        model = model_file.read(path)
        try:
            codec = cls(model.config)
        except (ArithmeticError, IndexError, MemoryError, RuntimeError, ValueError) as error:
            raise UserError(f"{path}: no model can be made of its config: {error}") from error
        tensor_files.check_state(codec.state_dict(), model.tensors, str(path))
        codec.load_state_dict(model.tensors)
        codec.statistics, codec.priors, codec.provenance = model.statistics, model.priors, model.provenance
        return codec.eval().to(device)

    def save(self, path: Path, *, half: bool = False) -> None:
        """Write a model file that `load` reads; `half` stores float16."""
        model = ModelFile(self.config, self.state_dict(), self.statistics, self.provenance, self.priors)
        model_file.write(path, model, half=half)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device: str | torch.device = "cpu", **options: Any) -> "Codec":
        """A codec from a folder that `save_pretrained` wrote, a repository "user/name" of the Hugging Face hub, or what
        `load` takes. `options` are `hub.find`'s: revision, filename, token ...; raises as that and `load` do.
        """
        from latent_codec import hub

        return cls.load(hub.find(source, **options), device)

    def save_pretrained(self, folder: str | Path, *, half: bool = False) -> None:
        """Write a folder with the model file and a card, as `hub.save` does."""
        from latent_codec import hub

        hub.save(self, Path(folder), half=half)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload model and card to "user/name" on the hub; options, result and errors are `hub.push`'s."""
        from latent_codec.model import hub

        return hub.push(self, repo_id, **options)


def right_model(made_it: Callable[[Codec], bool]) -> str:
    """What to tell someone whose file is another model's: the name of the shipped one that made it, if one did."""
    name = next((name for name in shipped() if made_it(Codec.load(name))), None)
    return "give the right one with --model" if name is None else f"give --model {name}, which made it"
