"""Test latent diffusion models: their file, the flow's loss, and samples that depend on nothing but their options."""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from latent_codec.diffusion.config import LatentSpace, SampleOptions, TransformerConfig
from latent_codec.diffusion.model import Diffusion
from latent_codec.diffusion.sampling import SETTINGS, SampleId, choose, draw, draw_latents, sample
from latent_codec.errors import UserError
from latent_codec.images.read import read_image
from latent_codec.images.write import write_grid
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.info import describe
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal
from latent_codec.storage.tensors import save_tensors
from tests.support.errors import refused, rejected
from tests.support.networks import overflow_float16
from tests.support.operators import Operators
from train.config.diffusion import FlowConfig
from train.objectives.flow import FlowMatching

SMALL = TransformerConfig(size=4, patch=2, depth=2, heads=2, head_width=8)
FLOW = FlowConfig(time_mean=0.0, time_std=1.0, label_dropout=0.25)
QUICK = SampleOptions(steps=2)


def make(codec: Codec, classes: tuple[str, ...] = ("a", "b")) -> Diffusion:
    """Return a model with random weights everywhere, including the layers that start at zero."""
    assert codec.statistics is not None
    space = LatentSpace(
        codec_id=codec.model_id,
        factor=codec.factor,
        mean=codec.statistics.mean,
        std=codec.statistics.std,
        classes=classes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Diffusion(SMALL, space).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def model(codec: Codec) -> Diffusion:
    return make(codec)


@pytest.fixture
def runner(codec: Codec) -> Runner:
    return Runner(codec, ComputeOptions(device="cpu", batch_size=2, workers=1))


def inputs(model: Diffusion) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents, times and labels of three images."""
    return normal(torch.arange(3), tuple(model.shape)), torch.linspace(0, 1, 3), torch.tensor([0, 1, -1])


def test_a_velocity_depends_on_all_inputs_and_on_no_random_state(model: Diffusion) -> None:
    z, t, labels = inputs(model)
    velocity, before = model(z, t, labels), torch.random.get_rng_state()
    assert velocity.shape == z.shape == (3, 4, 4, 4) and velocity.dtype == torch.float32
    for other in (model(z + 1, t, labels), model(z, 1 - t + 0.1, labels), model(z, t, labels.roll(1))):
        assert ((velocity - other).abs().amax((1, 2, 3)) > 1e-3).all()
    model.train()  # diffusers would drop labels
    for _ in range(20):
        assert torch.equal(model(z, t, labels), velocity)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_unconditional_model_has_one_label_none_and_velocities_start_at_zero(codec: Codec) -> None:
    model = make(codec, classes=())
    z, t, _ = inputs(model)
    assert choose(model, [], 2) == [SampleId(-1, 0), SampleId(-1, 1)]
    assert model(z, t, torch.full((3,), -1)).abs().min() > 0
    assert Diffusion(SMALL, model.latents)(z, t, torch.full((3,), -1)).abs().max() == 0


def test_latents_are_normalised_by_the_codecs_statistics(codec: Codec, model: Diffusion) -> None:
    z = normal(torch.arange(5), tuple(model.shape))
    raw = model.denormalize(z)
    assert codec.statistics is not None
    for channel, (mean, std) in enumerate(zip(codec.statistics.mean, codec.statistics.std, strict=True)):
        torch.testing.assert_close(raw[:, channel], z[:, channel] * std + mean)
    torch.testing.assert_close(model.normalize(raw), z)


def test_impossible_shapes_are_refused(model: Diffusion) -> None:
    with pytest.raises(ValueError, match=r"\(3, 4, 6, 6\) are not \(b, 4, 4, 4\)"):
        model(torch.zeros(3, 4, 6, 6), torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    for change, reason in (
        ({"depth": 0}, "depth is 0"),
        ({"patch": 3}, "patch 3 does not divide size 4"),
        ({"heads": 1, "head_width": 6}, "no multiple of 4"),
    ):
        rejected(reason, dataclasses.replace, SMALL, **change)


# --- the file


def test_a_saved_model_is_loaded_and_described(codec: Codec, model: Diffusion, tmp_path: Path) -> None:
    model.provenance = {"note": "random"}
    model.save(tmp_path / "m.safetensors")
    found = Diffusion.load(tmp_path / "m.safetensors")
    assert (found.config, found.latents, found.provenance) == (model.config, model.latents, model.provenance)
    assert found.model_id == model.model_id and not found.training
    assert torch.equal(found(*inputs(model)), model(*inputs(model)))
    assert make(codec, classes=("a", "c")).model_id != model.model_id
    text = describe(str(tmp_path / "m.safetensors"))
    assert model.model_id in text and codec.model_id in text and "a, b" in text and "4 x 4 x 4" in text


def test_files_that_hold_no_diffusion_model_are_refused(model: Diffusion, tmp_path: Path, model_file: Path) -> None:
    path = tmp_path / "m.safetensors"
    model.save(path)
    refused("damaged model header: 'config' is missing", Codec.load, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, name = load_file(path), "transformer.proj_out_2.bias"
    save_tensors(tmp_path / "bare", tensors, {"format": "pt"})
    save_tensors(tmp_path / "fewer", {k: v for k, v in tensors.items() if k != name}, metadata)
    save_tensors(tmp_path / "nan", tensors | {name: tensors[name] * torch.nan}, metadata)
    for bad, reason in (
        (model_file, "no latent diffusion model: its header lacks 'transformer'"),
        (tmp_path / "bare", "not written by latent_codec"),
        (tmp_path / "none", "no such model file"),
        (tmp_path / "fewer", f"1 tensors are missing: {name}"),
        (tmp_path / "nan", f"tensor {name} holds values that are not finite"),
    ):
        refused(reason, Diffusion.load, bad)


@pytest.mark.parametrize("name", ["../up", "/root", "a/../../b", "", ".", "a\\b", "nul\0"])
def test_class_names_that_are_no_folder_of_the_destination_are_refused(model: Diffusion, name: str) -> None:
    rejected("unsafe name", dataclasses.replace, model.latents, classes=("a", name))


def test_a_header_that_asks_for_more_than_the_file_holds_is_refused(model: Diffusion, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for change in ({"depth": 10**9}, {"heads": 10**9}, {"size": 2**40}):
        model.config = dataclasses.replace(SMALL, **change)
        model.save(path)
        refused(f"{next(iter(change))} is .*, but the file holds only", Diffusion.load, path)


# --- the loss


def batch(model: Diffusion, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return raw posteriors, labels and keys."""
    mean, logvar = normal(torch.arange(2 * count), tuple(model.shape)).chunk(2)
    return mean, logvar, torch.arange(count) % 2, fold(3, torch.arange(count))


def test_an_images_loss_does_not_depend_on_its_batch(model: Diffusion) -> None:
    flow, whole = FlowMatching(FLOW, model), batch(model, 6)
    single = [flow(*(t[i : i + 1] for t in whole)).loss for i in range(6)]
    torch.testing.assert_close(flow(*whole).loss, torch.stack(single).mean())


def test_the_loss_of_a_zero_velocity_is_the_variance_of_noise_and_latents(model: Diffusion) -> None:
    """E (noise - z)^2 = 1 + E z^2, whatever t and label are."""
    model = Diffusion(SMALL, model.latents)
    mean, logvar, labels, keys = batch(model, 400)
    z = model.normalize(mean) ** 2 + logvar.exp() / torch.tensor(model.latents.std)[:, None, None] ** 2
    loss = FlowMatching(FLOW, model)(mean, logvar, labels, keys).loss
    assert loss.item() == pytest.approx(1 + z.mean().item(), rel=0.05)


def test_labels_are_dropped_as_often_as_configured_and_times_are_logistic_normal(model: Diffusion) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Spy(torch.nn.Module):
        shape, normalize = model.shape, model.normalize

        def forward(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            seen.append((t, labels))
            return z

    whole = batch(model, 4000)
    FlowMatching(FLOW, Spy())(*whole)  # pyright: ignore[reportArgumentType]
    ((t, labels),) = seen
    assert (labels < 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(labels[labels >= 0], whole[2][labels >= 0])
    logit = torch.logit(t)
    assert logit.mean().abs() < 0.05 and logit.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_two_labels_are_learned_and_drawn_apart() -> None:
    """Latents are +1 under one label and -1 under the other, with some noise."""
    config = TransformerConfig(size=2, patch=1, depth=1, heads=2, head_width=16)
    space = LatentSpace(codec_id="0" * 64, factor=8, mean=(0.0,) * 4, std=(1.0,) * 4, classes=("minus", "plus"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Diffusion(config, space)
    flow = FlowMatching(FLOW, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        labels = torch.arange(64) % 2
        mean = (2.0 * labels - 1)[:, None, None, None].expand(-1, *model.shape)
        loss = flow(mean, torch.full_like(mean, -4), labels, fold(step, torch.arange(64))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = [SampleId(label, number) for label in (0, 1) for number in range(50)]
    z = draw_latents(model.eval(), ids, seed=0, steps=10, guidance=1.0).mean((1, 2, 3))  # (100,)
    assert (z[:50] < -0.5).float().mean() > 0.95 and (z[50:] > 0.5).float().mean() > 0.95
    free = draw(model, normal(torch.arange(100), tuple(model.shape)), torch.full((100,), -1), steps=10, guidance=1.0)
    assert 0.25 < (free.mean((1, 2, 3)) > 0).float().mean() < 0.75


# --- samples


def test_eulers_method_follows_a_straight_path_to_its_end(model: Diffusion) -> None:
    """With the true velocity of a single point, noise - z, any number of steps ends at that point."""
    point = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    class Straight(Diffusion):
        def forward(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return (z - point) / t[:, None, None, None]

    straight = Straight(SMALL, model.latents)
    labels = torch.zeros(2, dtype=torch.int64)
    for steps in (1, 3, 10):
        z = draw(straight, normal(torch.arange(2), (4, 4, 4)), labels, steps=steps, guidance=1)
        torch.testing.assert_close(z, straight.denormalize(point).expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)


def test_guidance_of_zero_ignores_labels_and_other_scales_differ(model: Diffusion) -> None:
    noise, labels = normal(torch.arange(3), tuple(model.shape)), torch.tensor([0, 1, 1])

    def drawn(labels: torch.Tensor, guidance: float) -> torch.Tensor:
        return draw(model, noise, labels, steps=3, guidance=guidance)

    torch.testing.assert_close(drawn(labels, 0.0), drawn(torch.full((3,), -1), 1.0))
    assert not torch.allclose(drawn(labels, 1.0), drawn(labels, 2.0))


def test_an_image_depends_on_seed_label_and_number_alone(model: Diffusion) -> None:
    ids = choose(model, ["b", "a"], 3)
    assert ids == [SampleId(1, 0), SampleId(1, 1), SampleId(1, 2), SampleId(0, 0), SampleId(0, 1), SampleId(0, 2)]
    whole = draw_latents(model, ids, seed=1, steps=2, guidance=1.5)
    single = [draw_latents(model, [one], seed=1, steps=2, guidance=1.5)[0] for one in ids]
    torch.testing.assert_close(whole, torch.stack(single), rtol=1e-4, atol=1e-4)
    assert len({tuple(z.flatten().tolist()) for z in whole}) == 6
    assert not torch.equal(whole, draw_latents(model, ids, seed=2, steps=2, guidance=1.5))


def test_images_are_kept_and_those_of_other_options_refused(model: Diffusion, runner: Runner, tmp_path: Path) -> None:
    first = sample(model, runner, choose(model, ["a"], 3), tmp_path, QUICK, quiet=True)
    assert first.made == 3 and str(first) == "3 images drawn, 0 were there"
    assert [p.relative_to(tmp_path).as_posix() for p in first.paths] == ["a/00000.png", "a/00001.png", "a/00002.png"]
    before = {path: path.read_bytes() for path in first.paths}
    first.paths[1].unlink()
    ids = choose(model, [], 3)
    assert sample(model, runner, ids, tmp_path, QUICK, quiet=True).made == 4
    assert {path: path.read_bytes() for path in first.paths} == before
    other = dataclasses.replace(QUICK, seed=1)
    with pytest.raises(UserError, match="holds images by other settings; give another folder, or --overwrite"):
        sample(model, runner, ids, tmp_path, other, quiet=True)
    assert {path: path.read_bytes() for path in first.paths} == before
    sample(model, runner, ids, tmp_path, dataclasses.replace(other, overwrite=True), quiet=True)
    assert not any(path.read_bytes() == data for path, data in before.items())
    (tmp_path / SETTINGS).write_text("{")
    refused("holds images by other settings", sample, model, runner, ids, tmp_path, other, quiet=True)


def test_pixels_are_decoded_from_drawn_latents(codec: Codec, model: Diffusion, runner: Runner, tmp_path: Path) -> None:
    ids = choose(model, ["b"], 2)
    pixels = torch.stack(
        [read_image(path).pixels for path in sample(model, runner, ids, tmp_path, QUICK, quiet=True).paths]
    )
    expected = codec.decode_uint8(draw_latents(model, ids, seed=0, steps=2, guidance=1.0))
    assert pixels.shape == (2, 3, 32, 32) and (pixels.int() - expected.int()).abs().max() <= 1
    write_grid(tmp_path / "grid.png", pixels, 2)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (64, 32) and grid.crop((32, 0, 64, 32)).getpixel((3, 5)) == tuple(pixels[1, :, 5, 3])


def test_no_step_waits_for_the_device_or_copies_constants_to_it() -> None:
    space = LatentSpace(codec_id="0" * 64, factor=8, mean=(0.0,) * 4, std=(1.0,) * 4, classes=("a", "b"))
    with FakeTensorMode(), torch.device("cuda"):  # tensors without values: to wait for one is an error
        flow = FlowMatching(FLOW, Diffusion(SMALL, space))
        arguments = torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4), torch.zeros(2).long(), torch.arange(2)
        with Operators() as seen:
            assert flow(*arguments).loss.device.type == "cuda"
    assert "lift_fresh" not in seen.names  # which is `torch.tensor` of numbers


def test_samples_beyond_float16_fail_alone(codec: Codec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overflow_float16(codec)
    model = make(codec)
    runner = Runner(codec, ComputeOptions(device="cpu", dtype="float16", batch_size=4))
    ids = choose(model, [], 2)
    with mock.patch("latent_codec.diffusion.sampling.draw_latents") as drawn:
        drawn.return_value = torch.zeros(4, *model.shape).index_fill_(0, torch.tensor([1]), -4.0)
        found = sample(model, runner, ids, tmp_path, QUICK, quiet=True)
    assert found.failures.keys() == {"a/00001.png"} and str(found) == "3 images drawn, 0 were there, 1 failed"
    assert sorted(tmp_path.rglob("*.png")) == sorted(found.paths) and len(found.paths) == 3
    assert "a/00001.png: the decoder's output is not finite; try --dtype" in capsys.readouterr().err


def test_impossible_samples_are_refused(codec: Codec, model: Diffusion, runner: Runner, tmp_path: Path) -> None:
    refused("no label c; the model's are: a, b", choose, model, ["c"], 1)
    refused("--count 0 must be at least 1", choose, model, [], 0)
    refused("--steps 0 must be at least 1", SampleOptions(steps=0).check)
    with torch.no_grad():
        next(codec.parameters()).add_(1)
    with pytest.raises(UserError, match=r"latents of model .*, but the model given is .*--model"):
        sample(model, runner, choose(model, [], 1), tmp_path, QUICK, quiet=True)
