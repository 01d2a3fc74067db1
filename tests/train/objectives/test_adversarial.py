"""Test the adversarial losses: their values, their gradients, the weight between them, and whole runs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_codec.export import export
from latent_codec.model.codec import Codec
from tests.support.checkpoints import assert_close_runs, assert_same_tensors, log_lines, tensors
from tests.support.run import ONE_STEP, flags, run, run_ranks
from train.config.presets import kl_f8c4
from train.config.vae import AdversarialConfig
from train.objectives.adversarial import AdversarialLosses, Adversary, PatchDiscriminator, last_weight
from train.objectives.elbo import ELBO

CONFIG = AdversarialConfig(
    adversarial_start=2,
    adversarial_weight=0.5,
    adaptive=True,
    most_weight=1e9,
    discriminator_width=32,
    discriminator_layers=2,
)
TINY = flags(
    "kl_f8c4 --widths 8 8 8 8 --groups 4 --layers-per-block 1 --lpips-weight 0 --discriminator-width 32 "
    "--discriminator-layers 2 --adversarial-start 2 --batch-size 4 --crop 32 --eval-crop 32 --steps 5 --save-every 1 "
    "--keep-checkpoints 99 --log-every 1 --eval-every 5 --val-images 2 --lr-warmup-steps 1 --learning-rate 0.002"
)


def make(**fields: object) -> ELBO:
    config = kl_f8c4()
    backbone = dataclasses.replace(config.codec.backbone, widths=(8, 8, 8, 8), groups=4, layers_per_block=1)
    codec = dataclasses.replace(config.codec, backbone=backbone)
    objective = dataclasses.replace(
        config.objective, lpips_weight=0.0, adversarial=dataclasses.replace(CONFIG, **fields)
    )  # pyright: ignore
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ELBO(objective, Codec(codec), None)  # pyright: ignore[reportArgumentType]


def call(objective: ELBO, begun: bool = True) -> tuple[torch.Tensor, AdversarialLosses]:
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    keys, labels = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    losses = objective(pixels, keys, labels, torch.tensor(1e-6), False, begun)
    assert losses.adversarial is not None
    return losses.loss, losses.adversarial


def images(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("layers", "side"), [(1, 8), (2, 32), (3, 72), (3, 24)])
def test_scores_are_a_map_of_patches(layers: int, side: int) -> None:
    net = PatchDiscriminator(3, 32, layers)
    n = side // 2**layers - 2
    assert net(torch.zeros(2, 3, side, side)).shape == (2, 1, n, n) and n >= 1


def test_a_score_with_three_layers_sees_70_pixels() -> None:
    net = PatchDiscriminator(3, 32, 3)
    net.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in net.norms)  # which look at the whole image
    x = torch.rand(1, 3, 160, 160, requires_grad=True)
    scores = net(x)
    (gradient,) = torch.autograd.grad(scores[0, 0, 9, 9], x)
    assert int((gradient.abs().sum((0, 1, 2)) > 0).sum()) == 70


def test_the_discriminators_loss_is_the_hinge() -> None:
    adversary = Adversary(CONFIG, 3)
    real, fake = images(seed=0), images(seed=1).requires_grad_()
    scores = adversary.net(real), adversary.net(fake)
    expected = 0.5 * ((1 - scores[0]).clamp(min=0).mean() + (1 + scores[1]).clamp(min=0).mean())
    last = torch.nn.Parameter(torch.ones(1))
    found = adversary(real, fake * last, (fake * last).square().sum(), last, True)
    torch.testing.assert_close(found.discriminator, expected)
    torch.testing.assert_close(found.score_real, scores[0].mean())
    torch.testing.assert_close(found.score_fake, scores[1].mean())


def test_the_weight_makes_gradients_of_the_asked_proportion() -> None:
    objective = make()
    last = last_weight(objective.codec.backbone.decoder)
    with_it, without = (torch.autograd.grad(call(objective, on)[0], last)[0] for on in (True, False))
    ratio = (with_it - without).norm() / without.norm()
    assert ratio.item() == pytest.approx(CONFIG.adversarial_weight, rel=2e-2)
    assert call(make(most_weight=1e-3))[1].weight.item() == pytest.approx(1e-3)
    assert call(make(adaptive=False))[1].weight.item() == 0.5 * 32 * 32


def test_neither_side_moves_the_other() -> None:
    objective = make()
    adversary = objective.adversary
    assert adversary is not None
    ours = list(adversary.net.parameters())
    loss, adversarial = call(objective)
    whole = torch.autograd.grad(loss, ours)
    assert adversarial.weight > 0
    # Ten times the generator's weight changes nothing for the discriminator, and a blind one nothing for the codec.
    heavier = make(adversarial_weight=5.0)
    heavier.load_state_dict(objective.state_dict())
    assert heavier.adversary is not None
    torch.testing.assert_close(whole, torch.autograd.grad(call(heavier)[0], list(heavier.adversary.net.parameters())))
    with torch.no_grad():
        adversary.net.score.weight.zero_()
    codec = [p for p in objective.codec.parameters() if p.requires_grad]
    torch.testing.assert_close(*(torch.autograd.grad(call(objective, on)[0], codec) for on in (True, False)))


def test_before_the_start_all_adversarial_losses_are_zero() -> None:
    objective = make()
    assert objective.adversary is not None
    loss, adversarial = call(objective, begun=False)
    loss.backward()
    assert [value.item() for value in adversarial] == [0.0] * 5
    assert all(p.grad is not None and not p.grad.any() for p in objective.adversary.net.parameters())


@pytest.fixture(scope="module")
def argv(data: Path) -> list[str]:
    return [*TINY, "--data", str(data)]


def discriminator(out: Path, step: int) -> dict[str, torch.Tensor]:
    return {k: t for k, t in tensors(out, step).items() if k.startswith("discriminator/")}


@pytest.mark.slow
def test_the_discriminator_rests_until_its_step(straight: Path) -> None:
    assert_same_tensors(discriminator(straight, 1), discriminator(straight, 2))
    after = discriminator(straight, 3)
    assert all(not torch.equal(after[k], t) for k, t in discriminator(straight, 2).items())
    weights = [line["adversarial_weight"] for line in log_lines(straight, "train")]
    assert weights[:2] == [0.0, 0.0] and all(w > 0 for w in weights[2:])


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(argv: list[str], straight: Path, tmp_path: Path) -> None:
    for limit in (ONE_STEP, ONE_STEP, ONE_STEP, []):
        run([*argv, *limit], tmp_path / "run")
    assert_same_tensors(tensors(tmp_path / "run", 5), tensors(straight, 5))


@pytest.mark.slow
def test_a_discriminators_gradient_of_nan_skips_the_step(argv: list[str], straight: Path, tmp_path: Path) -> None:
    run(argv, tmp_path / "run", patch=_spoil)
    assert [line["skipped"] for line in log_lines(tmp_path / "run", "train")] == [0, 0, 1, 2, 3]
    assert_same_tensors(tensors(tmp_path / "run", 5), tensors(straight, 2))


def _spoil() -> None:
    """Make the gradient of the discriminator NaN, while its loss stays as it is."""
    real = Adversary.forward

    def forward(self: Adversary, *args: Any) -> AdversarialLosses:
        found = real(self, *args)
        nothing = (0 * self.net.score.weight.sum()).sqrt() if args[-1] else 0.0
        return found._replace(discriminator=found.discriminator + nothing)

    Adversary.forward = forward


@pytest.mark.slow
def test_two_processes_compute_what_one_does(argv: list[str], straight: Path, tmp_path: Path) -> None:
    assert "2 process(es) on cpu" in run_ranks(argv, tmp_path / "run", 2)
    for a, b in zip(log_lines(tmp_path / "run", "train")[:3], log_lines(straight, "train")[:3], strict=True):
        for name in ("loss", "generator", "discriminator", "adversarial_weight", "score_real", "score_fake"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), name

    def compared(name: str) -> bool:  # attention does not depend on to_k's bias, whose gradient is rounding
        return name.startswith("optimizer/") and "to_k.bias" not in name

    assert_close_runs(tmp_path / "run", straight, 3, 1e-3, 1e-6, compared)


def test_the_model_is_exported_without_its_adversary(data: Path, straight: Path, tmp_path: Path) -> None:
    codec = export(straight, tmp_path / "m.safetensors", data=(data,), images=2, half=True)
    assert not [name for name in codec.state_dict() if "discriminator" in name or "adversary" in name]
