"""Define the codec, a VAE of images, as one module of a backbone, a bottleneck and a likelihood."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import one_hot, pad
from torch.utils import _pytree as pytree

from latent_codec.errors import UserError
from latent_codec.model import file, hub, parts
from latent_codec.model.config import CodecConfig
from latent_codec.model.file import LatentStatistics, ModelFile
from latent_codec.model.posteriors import Posterior
from latent_codec.model.shipped import resolve, shipped_names
from latent_codec.precision import layer_dtype
from latent_codec.prior.priors import Priors


class CodecOutput(NamedTuple):
    """Holds what `Codec.forward` returns."""

    posterior: Posterior
    reconstruction: torch.Tensor
    """Expected pixels (b, c, h, w), as `Codec.decode` returns them."""


pytree._register_namedtuple(CodecOutput, serialized_type_name=f"{__name__}.CodecOutput")  # torch.export writes it


class Codec(nn.Module):
    """Encodes images to posteriors over latents, and decodes latents to images.

    Shapes: images (b, c, h, w), whose sides h and w are multiples of `factor` f; latents (b, z, h/f, w/f). c and z are
    `config.image_channels` and `config.latent_channels`. Labels (b,) int64 number the classes of a conditional model
    from 0; an unconditional model ignores them. Floats of any type are taken as the weights' own; results are float32,
    or float16 or bfloat16 where the weights are.

    Attributes:
        config: what the tensors mean; a model is made of it, and its file carries it.
        statistics: mean and standard deviation of the latents over a set of images, or None.
        priors: the distributions that entropy coding assumes for .lc files, or None.
        provenance: how the model was trained, as JSON values; empty if unknown.
    """

    def __init__(self, config: CodecConfig) -> None:
        """Make a model with random weights; raises `ValueError` naming the field of a config that makes none."""
        super().__init__()
        self.config = config
        self.statistics: LatentStatistics | None = None
        self.provenance: dict[str, Any] = {}
        self.priors: Priors | None = None
        self.backbone, self.bottleneck, self.likelihood = parts.build(config)

    @property
    def factor(self) -> int:
        """Return the pixels per latent element along one side."""
        return self.backbone.factor

    def check_pixels(self, x: torch.Tensor) -> None:
        """Raise `ValueError` unless x is (b, c, h, w) with h and w multiples of the factor."""
        if x.ndim != 4 or x.shape[1] != self.config.image_channels or any(s % self.factor for s in x.shape[2:]):
            raise ValueError(
                f"pixels of shape {tuple(x.shape)} are not (b, {self.config.image_channels}, h, w) with sides that "
                f"are multiples of {self.factor}; pad them with latent_codec.images.geometry.pad"
            )

    def encode(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Posterior:
        """Return the posterior over latents of pixels: uint8, or float in the likelihood's range.

        Raises `ValueError` if h or w is not a multiple of the factor (pad with `latent_codec.images.geometry.pad`), or
        if a conditional model's labels are missing or out of range.
        """
        posterior = self.bottleneck(self.features(x, labels))
        return posterior if (dtype := self._result_dtype(x)) == torch.float32 else posterior.to(dtype)

    def features(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the encoder's output, (b, features, h/f, w/f); arguments as for `encode`."""
        self.check_pixels(x)
        x = self.likelihood.from_uint8(x) if x.dtype == torch.uint8 else x
        return self.backbone.encode(self._with_labels(self._as_weights(x), labels))

    def likelihood_params(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the likelihood's parameters (b, params_per_channel * c, h, w) given latents, of all channels or of one
        of the model's prefixes. Raises `ValueError` for another number of channels."""
        return self.backbone.decode(self._with_labels(self._as_weights(self._filled(z)), labels))

    def _filled(self, z: torch.Tensor) -> torch.Tensor:
        """Append zeros, the prior's mean, for the channels that a prefix lacks."""
        channels, prefixes = self.config.latent_channels, self.config.prefixes
        if z.shape[1] == channels:
            return z
        if z.shape[1] not in prefixes:
            choice = f"the model takes {', '.join(map(str, prefixes or (channels,)))}"
            raise ValueError(f"latents of shape {tuple(z.shape)} have {z.shape[1]} channels; {choice}")
        return pad(z, (0, 0, 0, 0, 0, channels - z.shape[1]))

    def decode(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return expected pixels (b, c, h, w) given latents, in the likelihood's range, not clipped."""
        return self.likelihood.mean(self.likelihood_params(z, labels)).to(self._result_dtype(z))

    def decode_uint8(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return expected pixels (b, c, h, w) given latents, rounded and clipped to uint8.
        Raises `UserError` if the decoder's output is not finite."""
        return self.likelihood.to_uint8(self.likelihood.checked_mean(self.likelihood_params(z, labels)))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None, *, sample: bool = False) -> CodecOutput:
        """Return the posterior of pixels and what the decoder makes of its mode, or of a draw from torch's generator.

        `torch.compile(codec)`, `torch.export.export` and DistributedDataParallel run this; x is as for `encode`.
        """
        posterior = self.encode(x, labels)
        return CodecOutput(posterior, self.decode(posterior.sample() if sample else posterior.mode(), labels))

    def _as_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Return pixels or latents in the number type of the networks."""
        return x.to(layer_dtype(self.backbone, x)) if x.is_floating_point() else x

    def _result_dtype(self, x: torch.Tensor) -> torch.dtype:
        dtype = layer_dtype(self.backbone, x)
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32

    def class_numbers(self, names: Sequence[str | None]) -> torch.Tensor:
        """Return labels (b,) int64 of images by the names of their classes; zeros for an unconditional model.

        Raises `UserError` for a class that a conditional model does not know.
        """
        if not self.config.classes:
            return torch.zeros(len(names), dtype=torch.int64)
        numbers: dict[str | None, int] = {name: number for number, name in enumerate(self.config.classes)}
        for name in names:
            if name not in numbers:
                found = "no class" if name is None else f"class {name!r}"
                known = ", ".join(self.config.classes)
                raise UserError(f"{found}, but the model knows {known}; put each image in its class' folder")
        return torch.tensor([numbers[name] for name in names], dtype=torch.int64)

    def _with_labels(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Append one-hot labels to x as channels that are constant over the image, (b, c + classes, h, w)."""
        count = len(self.config.classes)
        if count == 0:
            return x
        if labels is None or labels.shape != x.shape[:1] or not _in_range(labels, count):
            found = None if labels is None else labels.tolist()
            raise ValueError(f"labels {found} are not one of {count} classes, 0 to {count - 1}, for each image")
        planes = one_hot(labels, count).to(x)[:, :, None, None]  # (b, classes, 1, 1)
        return torch.cat([x, planes.expand(-1, -1, *x.shape[2:])], 1)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Have torch compile encoder and decoder on first use; results differ in their last bits.

        Arguments are those of `torch.compile`. This reaches `encode` and `decode`; of `torch.compile(codec)`, torch
        compiles `forward` alone, and the `encode` and `decode` of its result run as they are.
        """
        self.backbone.encode = torch.compile(self.backbone.encode, *args, **kwargs)
        self.backbone.decode = torch.compile(self.backbone.decode, *args, **kwargs)

    @property
    def model_id(self) -> str:
        """Return the SHA-256 of config and tensors as 64 hex digits, computed from the weights as they are now."""
        return self.contents().model_id

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> "Codec":
        """Load a model file, or a shipped model by a name such as "photo", in eval mode and float32. Raises `UserError`
        if there is no such model, its config makes none, or a tensor is missing, extra, misshapen or not finite."""
        path = resolve(source)
        model = file.read(path)
        codec = cls(model.config)
        codec.load_state_dict(model.tensors)
        codec.statistics, codec.priors, codec.provenance = model.statistics, model.priors, model.provenance
        return codec.eval().to(device)

    def contents(self) -> ModelFile:
        """Return what a model file holds of this model; the tensors are not copied."""
        return ModelFile(self.config, self.state_dict(), self.statistics, self.provenance, self.priors)

    def save(self, path: Path, *, half: bool = False) -> None:
        """Write a model file that `load` reads, with float16 tensors if `half`; errors as `model.file.write`."""
        file.write(path, self.contents(), half=half)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device: str | torch.device = "cpu", **options: Any) -> "Codec":
        """Load a model from a folder, a repository "user/name" of the Hugging Face hub, or whatever `load` takes.
        `options` are those of `hub.find`: filename, and revision, token, cache_dir ... of `hf_hub_download`."""
        return cls.load(hub.find(source, **options), device)

    def save_pretrained(self, folder: str | Path, *, half: bool = False) -> None:
        """Write a folder with the model file and, unless there is one, a model card; see `hub.save`."""
        hub.save(self.contents(), Path(folder), half=half)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload model and card to "user/name" on the Hugging Face hub, and return the commit's URL. `options` are the
        fields of `hub.PushOptions`: half, private, revision, commit_message, create_pr, token and endpoint."""
        return hub.push(self.contents(), repo_id, hub.PushOptions(**options))


def _in_range(labels: torch.Tensor, count: int) -> bool:
    """Return whether labels number `count` classes; a compiled graph cannot ask."""
    return torch.compiler.is_compiling() or bool(((labels >= 0) & (labels < count)).all())


def suggest_model(made_it: Callable[[Codec], bool]) -> str:
    """Return advice for a user whose file another model made: the name of the shipped model that did, if one did."""
    name = next((name for name in shipped_names() if made_it(Codec.load(name))), None)
    return "give the right one with --model" if name is None else f"give --model {name}, which made it"
