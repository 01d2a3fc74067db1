"""Configure the training of a VAE. Free of torch."""

import dataclasses
from typing import ClassVar, Literal

from latent_codec.errors import UserError
from latent_codec.model.config import CodecConfig
from train.config.common import LoopConfig, check_interval, check_least, check_numbers
from train.config.prior import context_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """Configure the training of a vector quantiser's codebook."""

    commitment: float
    """Nats per unit of squared distance between an encoder output and its code (van den Oord et al. 2017, eq. 3)."""
    codebook: Literal["ema", "gradient"]
    """`ema`: codes are running averages of the outputs assigned to them (Razavi et al. 2019, eq. 2).
    `gradient`: codes follow the gradient of the squared distance, one nat per unit."""
    codebook_decay: float
    """Decay per step of the running averages of codes and of their usage."""
    revive_below: float
    """Replace a code that is used less than this fraction of an even share of all positions; 0 replaces none."""
    revive_every: int
    """Steps between the replacements of such codes by encoder outputs chosen at random."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Configure the adversarial loss of a patch discriminator (Esser et al. 2021; Rombach et al. 2022)."""

    adversarial_start: int
    """First step with the adversarial loss; until then neither side trains on it."""
    adversarial_weight: float
    """Norm of the adversarial gradient at the decoder's last layer, relative to the reconstruction's, with `adaptive`.
    Without it, nats per pixel for one unit of the mean score."""
    adaptive: bool
    """Adapt the weight so that the two gradient norms keep the ratio `adversarial_weight`."""
    most_weight: float
    """Upper limit of the adaptive weight, in nats per image for one unit of the mean score."""
    discriminator_width: int
    """Features of the discriminator's first layer, a multiple of 32."""
    discriminator_layers: int
    """Layers that halve the image; with 3, the receptive field is 70x70 pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELBOConfig:
    """Configure the evidence lower bound, with optional perceptual and adversarial losses."""

    kind: ClassVar[str] = "elbo"
    beta: float
    """Final weight of the KL. With a Gaussian likelihood of fixed sigma it acts as a factor of sigma^2."""
    warmup: Literal["none", "linear", "cosine", "cyclical"]
    """Rise of beta: once (linear, cosine), or for half of each cycle (cyclical, Fu et al. 2019)."""
    warmup_steps: int
    """Steps of the rise, or of one whole cycle if cyclical."""
    free_bits: float
    """Nats per latent element and image below which a channel's KL costs nothing (Kingma et al. 2016, eq. 15)."""
    mode_weight: float
    """Weight of a second NLL, of the decoded mode; 0 leaves it out. Its gradient stops at the latents.
    It trains the decoder on latents without noise, which the ELBO never shows it."""
    mode_steps: tuple[float, float] | None
    """Quantise that mode as a bitstream does, with a step drawn per image from this range, evenly in its logarithm.
    Steps above 1 have weight 1 / step^2, because their error grows. None: do not quantise."""
    lpips_weight: float
    """Nats per pixel for one unit of LPIPS; 0 leaves LPIPS out."""
    lpips_net: Literal["alex", "squeeze", "vgg"]
    """Network of LPIPS."""
    prefix_share: float = 0.3
    """Share of the images that keep a shorter prefix of the channels, where the model has prefixes."""
    codebook: CodebookConfig | None = None
    """Required if the bottleneck is `vq`, None otherwise."""
    adversarial: AdversarialConfig | None = None
    """None: no discriminator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IWAEConfig:
    """Configure the importance-weighted bound (Burda et al. 2016)."""

    kind: ClassVar[str] = "iwae"
    samples: int
    """Latent samples per image. With 1, the bound is the ELBO with the KL estimated by the same sample."""
    gradient_samples: int = 0
    """Samples that receive a gradient, resampled by weight: the same on average, at half the cost.
    0: all samples, each with its weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Configure the ELBO over a range of noise levels, with a learned context prior in place of N(0, I)."""

    kind: ClassVar[str] = "joint"
    noise_steps: tuple[float, float]
    """Range of the factor of the posterior's standard deviation, drawn per image, evenly in its logarithm.
    The noise is then as large as that of a quantiser with this step."""
    mode_weight: float
    """Weight of the NLL of the mode, quantised with that same step; its gradient stops at the latents."""
    prior_groups: tuple[int, ...]
    """Latent channels of all groups of the context prior but the last; channels with most bits come first."""
    prior_levels: tuple[int, ...]
    """Times that each group's grid is halved before its first pass, as `levels` of `train.prior`."""
    prior_width: int
    """Features of the context prior's layers, at most 112."""
    prior_learning_rate: float
    """Peak learning rate of the context prior, which has to follow the moving latents; same schedule as the codec."""
    fine_weight: float = 2.0
    """Power of the step that an image's loss is weighed with where the step is below 1; less favours fine steps."""
    prefix_share: float = 0.3
    """Share of the images that keep a shorter prefix of the channels, where the model has prefixes."""
    decoder_alone: bool = False
    """Train only the decoder. Encoder, quantiser and prior stay as they are, and so do the sizes of files."""
    lpips_weight: float = 0.0
    """Nats per pixel for one unit of LPIPS, added to both NLLs; 0 leaves LPIPS out."""
    lpips_net: Literal["alex", "squeeze", "vgg"] = "alex"
    """Network of LPIPS."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """Configure `train.vae`."""

    codec: CodecConfig
    objective: ELBOConfig | IWAEConfig | JointConfig
    closed_form: bool
    """Initialise the linear path with probabilistic PCA of the training images' patches."""
    closed_form_crops: int | None
    """Crops from which the closed form estimates patch moments. None: all whole patches of all images."""
    mean_start: bool
    """Initialise the decoder of `mlp` with the mean training image, and all weights as Glorot & Bengio (2010)."""
    crop: int
    """Side of the square training crops in pixels."""
    flip: bool
    """Mirror half of the crops left to right."""
    lr_schedule: Literal["cosine", "stages"]
    """Warm-up and half a cosine to 0, or the eight falling stages of Burda et al. (2016) without warm-up."""
    adam_eps: float
    """Epsilon of Adam."""
    channels_last: bool
    """Store tensors in the channels-last memory format."""
    eval_crop: int
    """Side of the centre crops of the validation images in pixels."""
    resize: int | None = None
    """Resize images to this shorter side when they are read, as `encode --resize` does. None: they keep their sizes."""


def check(config: TrainConfig) -> None:
    """Raise `UserError` for values that would only fail, or fail to resume, later."""
    check_numbers(config)
    objective = config.objective
    if config.resize is not None and config.resize < (needed := max(config.crop, config.eval_crop)):
        raise UserError(f"resize {config.resize} is below {needed}, the larger of crop and eval_crop; lower them too")
    if config.lr_schedule == "stages" and config.lr_warmup_steps:
        raise UserError(f"lr_warmup_steps is {config.lr_warmup_steps}; stages have no warm-up: set it to 0")
    if isinstance(objective, IWAEConfig):
        _check_iwae(objective, config.codec)
        return
    _check_lpips(objective, config.codec)
    if not 0 <= objective.prefix_share <= 1:
        raise UserError(f"prefix_share is {objective.prefix_share}; it is a share, 0 to 1")
    if isinstance(objective, JointConfig):
        _check_joint(objective, config.codec)
        return
    if objective.mode_steps is not None:
        check_interval("mode_steps", objective.mode_steps)
    if objective.adversarial is not None:
        _check_adversarial(objective.adversarial, config)
    _check_bottleneck(objective, config.codec.bottleneck.kind)


def _check_iwae(objective: IWAEConfig, codec: CodecConfig) -> None:
    check_least(objective, 1, "samples")
    if not 0 <= objective.gradient_samples <= objective.samples:
        found, limit = objective.gradient_samples, objective.samples
        raise UserError(f"gradient_samples is {found}; it must be from 0 to the {limit} samples")
    if (kind := codec.bottleneck.kind) != "gaussian":
        raise UserError(f"iwae weighs samples of a gaussian posterior, not of {kind}; train an elbo")


def _check_lpips(objective: ELBOConfig | JointConfig, codec: CodecConfig) -> None:
    check_least(objective, 0, "lpips_weight")
    if objective.lpips_weight > 0 and (channels := codec.image_channels) != 3:
        raise UserError(f"LPIPS compares RGB images, and the model's have {channels} channels: set lpips_weight to 0")


def _check_adversarial(adversarial: AdversarialConfig, config: TrainConfig) -> None:
    check_least(adversarial, 0, "adversarial_start", "adversarial_weight", "most_weight")
    if (start := adversarial.adversarial_start) >= config.steps > 0:
        raise UserError(f"adversarial_start {start} is not below steps {config.steps}; the loss would never be used")
    width, layers = adversarial.discriminator_width, adversarial.discriminator_layers
    if width < 32 or width % 32 or layers < 1:
        raise UserError(
            f"discriminator_width {width} must be a multiple of 32, and discriminator_layers {layers} at least 1"
        )
    if config.crop // 2**layers < 3:
        raise UserError(
            f"crop {config.crop} is too small for {layers} discriminator_layers, which need {3 * 2**layers} pixels"
        )
    if config.compile and adversarial.adaptive:
        raise UserError("compile does not support the gradients of the adaptive weight; turn off one of the two")
    if config.codec.likelihood.kind == "bernoulli":
        raise UserError("the adversarial loss needs continuous pixels, not a bernoulli likelihood's; leave it out")


def _check_joint(joint: JointConfig, codec: CodecConfig) -> None:
    if (kind := codec.bottleneck.kind) != "gaussian":
        raise UserError(f"joint scales the noise of a gaussian posterior, not of {kind}; train an elbo")
    if codec.classes:
        raise UserError(
            f"joint trains the prior of .lc files, which do not store which of {len(codec.classes)} classes an image "
            "is of: use a model without classes"
        )
    check_interval("noise_steps", joint.noise_steps)
    check_least(joint, 0, "mode_weight", "fine_weight")
    context_layout(joint.prior_groups, joint.prior_levels, codec.latent_channels)
    if not joint.prior_learning_rate > 0:
        raise UserError(f"prior_learning_rate is {joint.prior_learning_rate}; it must be positive")
    if not 1 <= joint.prior_width <= 112:
        raise UserError(f"prior_width is {joint.prior_width}; it must be from 1 to 112, or sums would not be exact")


def _check_bottleneck(objective: ELBOConfig, kind: str) -> None:
    """Raise `UserError` for parts of the objective that do not apply to this bottleneck."""
    codebook = objective.codebook
    if (kind == "vq") != (codebook is not None):
        raise UserError(f"a {kind} bottleneck and codebook {codebook} do not match; vq needs a codebook, others none")
    if kind != "gaussian":
        for name, off in (("warmup", "none"), ("free_bits", 0.0), ("mode_weight", 0.0)):
            if (value := getattr(objective, name)) != off:
                raise UserError(f"{name} is {value}, which needs a gaussian posterior, not {kind}; set it to {off}")
    if codebook is not None:
        check_least(codebook, 0, "commitment", "revive_below")
        check_least(codebook, 1, "revive_every")
        if not 0 <= codebook.codebook_decay < 1:
            raise UserError(f"codebook_decay is {codebook.codebook_decay}; it must be at least 0 and below 1")
