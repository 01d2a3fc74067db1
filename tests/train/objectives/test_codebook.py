"""Test the training of codebooks: averages over processes, dead codes revived alike, and runs resumed exactly."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from latent_codec.export import export
from latent_codec.model.codebooks import VectorQuantizer
from latent_codec.model.config import FiniteScalarConfig, VectorQuantizerConfig
from tests.support.checkpoints import assert_same_tensors, log_lines, tensors
from tests.support.networks import make_codec
from tests.support.run import flags, run, run_ranks
from train.config.presets import vqvae
from train.data.crops import Batch, SamplePlan
from train.objectives.codebook import CodebookAverages, CodebookTraining, averages_of
from train.objectives.elbo import ELBO
from train.objectives.losses import CodeLosses

SMALL = flags(
    "--encoder-widths 8 --decoder-widths 8 --encoder-depths 1 --decoder-depths 1 --batch-size 4 --crop 32 "
    "--eval-crop 32 --steps 4 --save-every 1 --keep-checkpoints 99 --log-every 1 --eval-every 4 --val-images 2 "
    "--lr-warmup-steps 2 --learning-rate 0.004"
)
VQ = [*flags("vqvae --latent-channels 3 --codes 16 --revive-every 2 --revive-below 0.6 --codebook-decay 0.5"), *SMALL]


@pytest.fixture(scope="module")
def argv(data: Path) -> list[str]:
    return [*VQ, "--data", str(data)]


@pytest.mark.slow
def test_a_resumed_run_that_revives_codes_has_the_same_bits(argv: list[str], straight: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        revived = tensors(straight, step)["codebook/use"][:, 0] == 1 / 16  # exactly an even share
        assert revived.any() and not revived.all()
    for _ in range(2):
        run([*argv, "--max-minutes", "0.00001"], tmp_path / "run")  # one step
    run(argv, tmp_path / "run")
    for step in range(1, 5):
        assert_same_tensors(tensors(tmp_path / "run", step), tensors(straight, step))


@pytest.mark.slow
def test_two_processes_and_micro_batches_compute_what_one_does(argv: list[str], straight: Path, tmp_path: Path) -> None:
    text = run_ranks([*argv, "--accumulation", "2"], tmp_path / "run", 2)
    assert "2 process(es) on cpu" in text
    for step in (1, 2, 3):
        ours, theirs = tensors(tmp_path / "run", step), tensors(straight, step)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-4, msg=f"{step} {name}")
    for kind in ("train", "eval"):
        for a, b in zip(log_lines(tmp_path / "run", kind), log_lines(straight, kind), strict=True):
            assert a["perplexity"] == pytest.approx(b["perplexity"], rel=0.1)


def test_averages_stay_out_of_models(data: Path, straight: Path, tmp_path: Path) -> None:
    codec = export(straight, tmp_path / "model.safetensors", data=(data,), images=3, half=False)
    assert [name for name in codec.state_dict() if name.startswith("bottleneck")] == ["bottleneck.codebook"]
    assert torch.equal(codec.state_dict()["bottleneck.codebook"], tensors(straight, 4)["ema/bottleneck.codebook"])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fsq --levels 3 3 2", "autoencoder"])
def test_other_bottlenecks_train_and_export(preset: str, data: Path, tmp_path: Path) -> None:
    argv = [*flags(preset), *SMALL, *flags("--latent-channels 3 --steps 1"), "--data", str(data)]
    if preset == "autoencoder":
        argv += flags("--encoder-widths 8 8 --decoder-widths 8 8 --encoder-depths 1 1 --decoder-depths 1 1")
    run(argv, tmp_path / "run")
    codec = export(tmp_path / "run", tmp_path / "m.safetensors", data=(data,), images=3, half=False)
    assert codec.priors is not None
    assert all(math.isfinite(line["loss"]) for line in log_lines(tmp_path / "run", "train"))


def make(**fields: Any) -> tuple[CodebookTraining, list[torch.Tensor]]:
    """Return a small training of 8 codes, and the pixels from which it draws encoder outputs."""
    preset = vqvae()
    backbone: Any = dataclasses.replace(
        preset.codec.backbone, encoder_widths=(8,), decoder_widths=(8,), encoder_depths=(1,), decoder_depths=(1,)
    )
    config = dataclasses.replace(
        preset.codec, latent_channels=3, backbone=backbone, bottleneck=VectorQuantizerConfig(codes=8)
    )
    codec = make_codec(config)
    assert preset.objective.codebook is not None
    training = dataclasses.replace(preset.objective.codebook, **fields)
    averages = averages_of(codec, training)
    assert averages is not None
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8) for _ in range(9)]

    class Images:
        def batches(self, plan: SamplePlan, first_step: int, last_step: int) -> Iterator[Batch]:
            for step in range(first_step, last_step):
                yield Batch(pixels[step], torch.arange(2), torch.zeros(2, dtype=torch.int64))

    plan = SamplePlan(seed=3, crop=16, flip=False, batch_size=2, micro_batches=1, rank=0, world=1)
    return CodebookTraining(training, codec, averages, Accelerator(cpu=True), Images(), plan), pixels


def outputs(training: CodebookTraining, pixels: torch.Tensor) -> torch.Tensor:
    """Return the encoder outputs (n, z)."""
    with torch.no_grad():
        return training.codec.encode(pixels).outputs.movedim(1, -1).reshape(-1, 3)  # pyright: ignore


def is_among(vectors: torch.Tensor, others: torch.Tensor) -> list[bool]:
    return (vectors[:, None] == others).all(-1).any(1).tolist()


def losses_of(training: CodebookTraining, use: torch.Tensor) -> Any:
    return SimpleNamespace(codes=CodeLosses(torch.zeros(()), use))


def test_codes_start_on_different_encoder_outputs() -> None:
    training, pixels = make()
    training.start(keep=False)
    codebook = training.quantizer.codebook.detach()
    assert all(is_among(codebook, outputs(training, pixels[0]))) and len(codebook.unique(dim=0)) == 8
    torch.testing.assert_close(training.averages.vectors, codebook)


def test_codes_of_a_model_that_training_starts_from_stay() -> None:
    training, _ = make()
    before = training.quantizer.codebook.detach().clone()
    training.start(keep=True)
    assert torch.equal(training.quantizer.codebook.detach(), before)
    torch.testing.assert_close(training.averages.vectors, before)


def test_averages_follow_the_paper() -> None:
    """Razavi et al. (2019), eq. 2, written out for counts and sums."""
    training, _ = make(codebook_decay=0.9, revive_below=0.0)
    training.start(keep=True)
    count = torch.full((8,), 1 / 8)
    total = training.quantizer.codebook.detach().clone() / 8
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        use = torch.rand(8, 4, generator=generator)
        use[:, 0] /= use[:, 0].sum()
        training.after_step(losses_of(training, use), step)
        count, total = 0.9 * count + 0.1 * use[:, 0], 0.9 * total + 0.1 * use[:, 1:]
        torch.testing.assert_close(training.quantizer.codebook.detach(), total / count[:, None], rtol=1e-4, atol=1e-5)


def test_a_code_that_is_never_used_does_not_divide_by_zero() -> None:
    averages = CodebookAverages(4, 2)
    averages.add(torch.tensor([[1.0, 3.0, -2.0], *[[0.0] * 3] * 3]), 0.0)
    assert averages.vectors.isfinite().all()
    torch.testing.assert_close(averages.vectors[0], torch.tensor([3.0, -2.0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_only_dead_codes_are_revived_and_only_when_it_is_time(codebook: str) -> None:
    training, pixels = make(codebook=codebook, codebook_decay=0.0, revive_below=0.5, revive_every=3)
    training.start(keep=False)
    share = torch.tensor([0.3, 0.2, 0.0, 0.06, 0.064, 0.176, 0.0, 0.2])  # half of an even share is 0.0625
    use = torch.cat([share[:, None], share[:, None] * training.quantizer.codebook.detach()], 1)
    dead = [2, 3, 6]
    for step in (1, 2, 3):
        before = training.quantizer.codebook.detach().clone()
        training.after_step(losses_of(training, use), step)
        after = training.quantizer.codebook.detach()
        if step == 3:
            assert all(is_among(after[dead], outputs(training, pixels[3])))
            assert torch.equal(training.averages.use[dead, 0], torch.full((3,), 1 / 8))
        kept = [i for i in range(8) if i not in dead]
        torch.testing.assert_close(after[kept], before[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "bottleneck", [VectorQuantizerConfig(codes=8), FiniteScalarConfig(levels=(3, 3, 2))], ids=lambda one: one.kind
)
def test_a_compiled_objective_is_one_graph(bottleneck: Any) -> None:
    training, pixels = make()
    codec = make_codec(dataclasses.replace(training.codec.config, bottleneck=bottleneck))
    training = training.config if isinstance(bottleneck, VectorQuantizerConfig) else None
    objective = ELBO(dataclasses.replace(vqvae().objective, codebook=training), codec, None)
    arguments = pixels[0], torch.arange(2), torch.zeros(2, dtype=torch.int64), torch.tensor(1.0), True
    expected = objective(*arguments)
    objective.compile(backend="aot_eager", fullgraph=True)
    found = objective(*arguments)
    found.loss.backward()
    torch.testing.assert_close((found.loss, *found.codes), (expected.loss, *expected.codes))


def test_the_optimizer_leaves_an_averaged_codebook_alone() -> None:
    for codebook, trained in (("ema", False), ("gradient", True)):
        training, pixels = make(codebook=codebook)
        objective = ELBO(dataclasses.replace(vqvae().objective, codebook=training.config), training.codec, None)
        losses = objective(pixels[0], torch.arange(2), torch.zeros(2, dtype=torch.int64), torch.tensor(1.0), False)
        losses.loss.backward()
        assert isinstance(training.codec.bottleneck, VectorQuantizer)
        assert (training.codec.bottleneck.codebook.grad is not None) == trained
        posterior: Any = training.codec.encode(pixels[0])
        expected = training.config.commitment * posterior.commitment().mean()
        expected = expected + trained * posterior.codebook_loss().mean()
        assert losses.codes is not None
        torch.testing.assert_close(losses.codes.penalty, expected.detach())
        torch.testing.assert_close(losses.loss.detach(), losses.bound.nll + losses.bound.kl + losses.codes.penalty)
        torch.testing.assert_close(losses.codes.use, posterior.use())
