"""A training run's configuration. Free of torch."""

import dataclasses
from typing import ClassVar, Literal

from latent_codec.errors import UserError
from latent_codec.model.config import CodecConfig
from train.config.common import _check_numbers
from train.config.prior import context_groups, context_levels


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How the codebook of a vector quantiser is trained."""

    commitment: float
    """Nats for a unit of squared distance of an encoder's output to its code (van den Oord et al. 2017, eq. 3)."""
    codebook: Literal["ema", "gradient"]
    """`ema`: codes are running averages of the outputs they stand for (Razavi et al. 2019, eq. 2); `gradient`: they
    follow the gradient of the squared distance, one nat for a unit."""
    codebook_decay: float
    """Of the running averages, those of the codes' use among them, per step."""
    revive_below: float
    """A code whose share of all positions is below this part of an even share is dead; 0 leaves the dead alone."""
    revive_every: int
    """Steps between the times when dead codes are put on encoder outputs chosen at random."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A discriminator of patches that decoded images are trained to pass (Esser et al. 2021; Rombach et al. 2022)."""

    adversarial_start: int
    """Steps before the contest begins; until then neither side is trained on it."""
    adversarial_weight: float
    """With `adaptive` the length of the generator's gradient at the decoder's last layer, as a share of the
    reconstruction's; without, nats per pixel for one unit of the mean score."""
    adaptive: bool
    most_weight: float
    """The adaptive weight is no larger: nats per image for one unit of the mean score."""
    discriminator_width: int
    """Features of the discriminator's first layer, a multiple of 32."""
    discriminator_layers: int
    """Layers that halve the image; 3 see patches of 70x70 pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELBOConfig:
    kind: ClassVar[str] = "elbo"
    beta: float
    """Weight of the KL once warmed up; with a Gaussian likelihood of fixed sigma it multiplies sigma^2."""
    warmup: Literal["none", "linear", "cosine", "cyclical"]
    """How beta rises: once (linear, cosine), or again and again, half of each cycle (cyclical, Fu et al. 2019)."""
    warmup_steps: int
    """Steps of the rise; of one whole cycle where it is cyclical."""
    free_bits: float
    """Nats per latent element below which a channel's KL costs nothing (Kingma et al. 2016, eq. 15), per image."""
    mode_weight: float
    """Weight of a second NLL, of the decoded mode, whose gradient stops at the latents; 0 leaves it out. It teaches the
    decoder latents without noise, of which the ELBO shows it none."""
    mode_steps: tuple[float, float] | None
    """The mode of that second NLL is quantised as a bitstream does it, at a step drawn anew for each image between
    these two, evenly in its logarithm; steps above 1 weigh 1 / step^2, as their error grows. None: not quantised."""
    lpips_weight: float
    """Nats per pixel for one unit of LPIPS; 0 leaves LPIPS out."""
    lpips_net: Literal["alex", "squeeze", "vgg"]
    codebook: CodebookConfig | None = None
    """There exactly if the bottleneck is `vq`."""
    adversarial: AdversarialConfig | None = None
    """None: no discriminator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IWAEConfig:
    """The importance-weighted bound (Burda et al. 2016)."""

    kind: ClassVar[str] = "iwae"
    samples: int
    """Latents drawn for each image; with 1 it is the ELBO, its KL estimated by the same sample."""
    gradient_samples: int = 0
    """How many of them the gradient goes through, drawn in proportion to their weights: the same gradient on average,
    at half the cost. 0: all of them, each with its weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointConfig:
    """The ELBO of a range of noise levels, a learned prior in the place of N(0, I)."""

    kind: ClassVar[str] = "joint"
    noise_steps: tuple[float, float]
    """What the posterior's standard deviation is multiplied by, drawn anew for each image between these two, evenly in
    its logarithm: noise as large as that of a quantiser's step."""
    mode_weight: float
    """Weight of the NLL of the mode, quantised at that same step as a bitstream does it; its gradient stops at the
    latents."""
    prior_groups: tuple[int, ...]
    """Latent channels of each group of the context prior but the last, those with most bits first; the last takes the
    rest."""
    prior_levels: tuple[int, ...]
    """As `PriorConfig.levels`."""
    prior_width: int
    """Features of the context prior's layers, at most 112."""
    prior_learning_rate: float
    """Of the context prior, on the codec's schedule: it has to follow latents that move."""
    decoder_alone: bool = False
    """Encoder, quantiser and prior stay as they are, and with them what files take: the decoder alone learns."""
    lpips_weight: float = 0.0
    """Nats per pixel for one unit of LPIPS, beside either NLL; 0 leaves LPIPS out."""
    lpips_net: Literal["alex", "squeeze", "vgg"] = "alex"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    codec: CodecConfig
    objective: ELBOConfig | IWAEConfig | JointConfig
    closed_form: bool
    """Start the linear path from probabilistic PCA of the training images' patches."""
    closed_form_crops: int | None
    """Crops whose patches give the closed form its moments; None: all whole patches of all images, read one by one."""
    mean_start: bool
    """Start the decoder of `mlp` from the training images' mean, and all its weights as Glorot & Bengio (2010)."""
    steps: int
    """Optimizer steps in all; the learning rate's schedule ends here."""
    batch_size: int
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: int
    """Micro-batches per optimizer step on each process."""
    crop: int
    """Side of the square training crops, in pixels."""
    flip: bool
    """Mirror half of the crops left to right."""
    learning_rate: float
    lr_warmup_steps: int
    lr_schedule: Literal["cosine", "stages"]
    """Half a cosine to zero after the warm-up, or the eight falling stages of Burda et al. (2016), without one."""
    adam_eps: float
    weight_decay: float
    max_grad_norm: float | None
    """Gradients are scaled down to this norm; None leaves them alone."""
    ema_decay: float
    """Decay of the averaged weights, which are what is evaluated and exported; 0 keeps the raw weights."""
    channels_last: bool
    compile: bool
    seed: int
    log_every: int
    eval_every: int
    eval_crop: int
    """Side of the centre crops of the validation images, in pixels."""
    save_every: int
    keep_checkpoints: int
    max_skipped: int
    """Non-finite steps in a row after which the run stops."""


def check(config: TrainConfig) -> None:
    """Raise `UserError` for values that would only fail, or fail to resume, later."""
    _check_numbers(config)
    if config.lr_schedule == "stages" and config.lr_warmup_steps:
        raise UserError(f"lr_warmup_steps is {config.lr_warmup_steps}; stages have no warm-up: set it to 0")
    if isinstance(config.objective, IWAEConfig):
        if config.objective.samples < 1:
            raise UserError(f"samples is {config.objective.samples}; it must be at least 1")
        if not 0 <= config.objective.gradient_samples <= config.objective.samples:
            found, limit = config.objective.gradient_samples, config.objective.samples
            raise UserError(f"gradient_samples is {found}; it must be from 0 to the {limit} samples")
        if config.codec.bottleneck.kind != "gaussian":
            kind = config.codec.bottleneck.kind
            raise UserError(f"iwae weighs draws from a gaussian posterior, which {kind} has not: take an elbo")
    elif isinstance(config.objective, JointConfig):
        _check_joint(config.objective, config.codec)
    elif (steps := config.objective.mode_steps) is not None and not 0 < steps[0] <= steps[1]:
        raise UserError(f"mode_steps is {steps}; it must be two positive steps, the smaller one first")
    if not isinstance(config.objective, IWAEConfig):
        _check_lpips(config.objective, config.codec)
    if isinstance(config.objective, ELBOConfig) and config.objective.adversarial is not None:
        _check_adversarial(config.objective.adversarial, config)
    _check_bottleneck(config)


def _check_lpips(objective: ELBOConfig | JointConfig, codec: CodecConfig) -> None:
    if (weight := objective.lpips_weight) < 0:
        raise UserError(f"lpips_weight is {weight}; it must not be negative")
    if weight > 0 and (channels := codec.image_channels) != 3:
        raise UserError(f"LPIPS compares RGB images, and the model's have {channels} channels: set lpips_weight to 0")


def _check_adversarial(adversarial: AdversarialConfig, config: TrainConfig) -> None:
    for name in ("adversarial_start", "adversarial_weight", "most_weight"):
        if (value := getattr(adversarial, name)) < 0:
            raise UserError(f"{name} is {value}; it must not be negative")
    if (start := adversarial.adversarial_start) >= config.steps > 0:
        raise UserError(f"adversarial_start {start} is not below steps {config.steps}, so there would be no contest")
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
        raise UserError("compile cannot take the gradients that the adaptive weight needs; leave out one of the two")
    if config.codec.likelihood.kind == "bernoulli":
        raise UserError("a discriminator would tell binary pixels from expected ones by their values alone")


def _check_joint(joint: JointConfig, codec: CodecConfig) -> None:
    if codec.bottleneck.kind != "gaussian":
        kind = codec.bottleneck.kind
        raise UserError(f"joint scales the noise of a Gaussian posterior, which a {kind} bottleneck has not")
    if codec.classes:
        raise UserError(f"a .lc file, whose prior this trains, cannot tell which of {len(codec.classes)} classes it is")
    if not 0 < joint.noise_steps[0] <= joint.noise_steps[1]:
        raise UserError(f"noise_steps is {joint.noise_steps}; it must be two positive steps, the smaller one first")
    if joint.mode_weight < 0:
        raise UserError(f"mode_weight is {joint.mode_weight}; it must not be negative")
    groups = context_groups(joint.prior_groups, codec.latent_channels)
    context_levels(joint.prior_levels, groups)
    if not joint.prior_learning_rate > 0:
        raise UserError(f"prior_learning_rate is {joint.prior_learning_rate}; it must be positive")
    if not 1 <= joint.prior_width <= 112:
        raise UserError(f"prior_width is {joint.prior_width}; it must be from 1 to 112, or sums would not be exact")


def _check_bottleneck(config: TrainConfig) -> None:
    """Raise `UserError` for parts of the objective that this bottleneck has nothing for."""
    objective, kind = config.objective, config.codec.bottleneck.kind
    if not isinstance(objective, ELBOConfig):
        return
    if (kind == "vq") != (objective.codebook is not None):
        raise UserError(
            f"a {kind} bottleneck and codebook {objective.codebook}: vq needs its training, others have none"
        )
    if kind != "gaussian":
        for name, off in (("warmup", "none"), ("free_bits", 0.0), ("mode_weight", 0.0)):
            if (value := getattr(objective, name)) != off:
                raise UserError(f"{name} is {value}, which is about a Gaussian posterior, not {kind}; set it to {off}")
    if (codebook := objective.codebook) is not None:
        if codebook.commitment < 0 or codebook.revive_below < 0:
            raise UserError(
                f"commitment {codebook.commitment} and revive_below {codebook.revive_below} must not be negative"
            )
        if not 0 <= codebook.codebook_decay < 1:
            raise UserError(f"codebook_decay is {codebook.codebook_decay}; it must be at least 0 and below 1")
        if codebook.revive_every < 1:
            raise UserError(f"revive_every is {codebook.revive_every}; it must be at least 1")
