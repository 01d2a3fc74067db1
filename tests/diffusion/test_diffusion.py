"""Latent diffusion models: their file, the flow's loss, and samples that depend on nothing but what they should."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latent_codec.diffusion import sampling
from latent_codec.diffusion.config import LatentSpace, TransformerConfig
from latent_codec.diffusion.model import Diffusion
from latent_codec.diffusion.sampling import SETTINGS, Wanted, choose, draw, draw_latents, sample
from latent_codec.errors import UserError
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.info import describe
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal
from latent_codec.storage.tensors import save_tensors
from train.config.diffusion import FlowConfig
from train.objectives.flow import FlowMatching

SMALL = TransformerConfig(size=4, patch=2, depth=2, heads=2, head_width=8)
FLOW = FlowConfig(time_mean=0.0, time_std=1.0, label_dropout=0.25)
CPU = ComputeOptions(batch_size=2, workers=1)


def make(codec: Codec, classes: tuple[str, ...] = ("a", "b"), config: TransformerConfig = SMALL) -> Diffusion:
    """Random weights everywhere, the layers that start at zero included."""
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
        model = Diffusion(config, space).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(model: Diffusion, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        normal(torch.arange(count), tuple(model.shape)),
        torch.linspace(0, 1, count),
        torch.tensor([0, 1, -1][:count]),
    )


def test_a_velocity_has_the_shape_of_its_latents_and_depends_on_all_that_it_is_given(codec: Codec) -> None:
    model = make(codec)
    z, t, labels = inputs(model)
    velocity = model(z, t, labels)
    assert velocity.shape == z.shape == (3, 4, 4, 4) and velocity.dtype == torch.float32
    for other in (model(z + 1, t, labels), model(z, 1 - t + 0.1, labels), model(z, t, labels.roll(1))):
        assert ((velocity - other).abs().amax((1, 2, 3)) > 1e-3).all()


def test_training_drops_no_label_by_itself_and_takes_nothing_from_the_global_state(codec: Codec) -> None:
    model = make(codec)
    z, t, labels = inputs(model)
    expected, before = model(z, t, labels), torch.random.get_rng_state()
    model.train()
    for _ in range(20):
        assert torch.equal(model(z, t, labels), expected)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_start_is_a_velocity_of_zero(codec: Codec) -> None:
    space = make(codec).latents
    model = Diffusion(SMALL, space)
    assert model(*inputs(model)).abs().max() == 0


def test_an_unconditional_model_knows_one_label_none(codec: Codec) -> None:
    model = make(codec, classes=())
    z, t, _ = inputs(model)
    assert model(z, t, torch.full((3,), -1)).shape == z.shape
    assert choose(model, [], 2) == [Wanted(-1, 0), Wanted(-1, 1)]


def test_normalised_latents_have_the_statistics_of_the_codec_taken_out(codec: Codec) -> None:
    model = make(codec)
    z = normal(torch.arange(5), tuple(model.shape))
    raw = model.denormalize(z)
    assert codec.statistics is not None
    for channel, (mean, std) in enumerate(zip(codec.statistics.mean, codec.statistics.std, strict=True)):
        torch.testing.assert_close(raw[:, channel], z[:, channel] * std + mean)
    torch.testing.assert_close(model.normalize(raw), z)


def test_latents_of_another_size_are_refused(codec: Codec) -> None:
    model = make(codec)
    with pytest.raises(ValueError, match=r"\(3, 4, 6, 6\) are not \(b, 4, 4, 4\)"):
        model(torch.zeros(3, 4, 6, 6), torch.zeros(3), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"patch": 3}, "patch 3 does not divide size 4"),
        ({"heads": 1, "head_width": 6}, "no multiple of 4"),
    ],
)
def test_shapes_that_no_transformer_has_are_refused(change: dict[str, int], reason: str) -> None:
    values = {"size": 4, "patch": 2, "depth": 1, "heads": 2, "head_width": 8} | change
    with pytest.raises(ValueError, match=reason):
        TransformerConfig(**values)


# --- the file


def test_a_saved_model_is_loaded_whole(codec: Codec, tmp_path: Path) -> None:
    model = make(codec)
    model.provenance = {"note": "random"}
    model.save(tmp_path / "m.safetensors")
    found = Diffusion.load(tmp_path / "m.safetensors")
    assert (found.config, found.latents, found.provenance) == (model.config, model.latents, model.provenance)
    assert found.model_id == model.model_id and not found.training
    assert torch.equal(found(*inputs(model)), model(*inputs(model)))
    assert make(codec, classes=("a", "c")).model_id != model.model_id


def test_info_says_whose_latents_it_draws(codec: Codec, tmp_path: Path) -> None:
    model = make(codec)
    model.save(tmp_path / "m.safetensors")
    text = describe(str(tmp_path / "m.safetensors"))
    assert model.model_id in text and codec.model_id in text
    assert "classes     a, b" in text and "4 x 4 x 4" in text


def test_what_is_no_diffusion_model_is_refused_by_its_reason(codec: Codec, tmp_path: Path, model_file: Path) -> None:
    with pytest.raises(UserError, match="no latent diffusion model: its header lacks 'transformer'"):
        Diffusion.load(model_file)
    make(codec).save(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="damaged model header: 'config' is missing"):
        Codec.load(tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    save_tensors(tmp_path / "bare.safetensors", tensors, {"format": "pt"})
    with pytest.raises(UserError, match="not written by latent_codec"):
        Diffusion.load(tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="no such model file"):
        Diffusion.load(tmp_path / "none.safetensors")


def test_missing_tensors_and_values_that_are_not_finite_are_named(codec: Codec, tmp_path: Path) -> None:
    model, path = make(codec), tmp_path / "m.safetensors"
    model.save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = "transformer.proj_out_2.bias"
    save_tensors(path, {k: v for k, v in tensors.items() if k != name}, metadata)
    with pytest.raises(UserError, match=f"1 tensors are missing: {name}"):
        Diffusion.load(path)
    save_tensors(path, tensors | {name: tensors[name] * torch.nan}, metadata)
    with pytest.raises(UserError, match=f"tensor {name} holds values that are not finite"):
        Diffusion.load(path)


# --- the loss


def batch(model: Diffusion, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw posteriors, labels and keys."""
    mean, logvar = normal(torch.arange(2 * count), tuple(model.shape)).chunk(2)
    return mean, logvar, torch.arange(count) % 2, fold(3, torch.arange(count))


def test_an_image_does_not_see_its_batch(codec: Codec) -> None:
    model = make(codec)
    flow = FlowMatching(FLOW, model)
    whole = batch(model, 6)
    single = [flow(*(t[i : i + 1] for t in whole)).loss for i in range(6)]
    torch.testing.assert_close(flow(*whole).loss, torch.stack(single).mean())


def test_a_model_of_zeros_pays_for_noise_and_latents(codec: Codec) -> None:
    """E (noise - z)^2 = 1 + E z^2, whatever t and label are."""
    space = make(codec).latents
    model = Diffusion(SMALL, space)
    mean, logvar, labels, keys = batch(model, 400)
    z = model.normalize(mean) ** 2 + logvar.exp() / torch.tensor(space.std)[:, None, None] ** 2
    assert FlowMatching(FLOW, model)(mean, logvar, labels, keys).loss.item() == pytest.approx(
        1 + z.mean().item(), rel=0.05
    )


def test_labels_are_dropped_as_often_as_asked_and_times_are_logistic_normal(codec: Codec) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Spy(torch.nn.Module):
        shape, normalize = make(codec).shape, make(codec).normalize

        def forward(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            seen.append((t, labels))
            return z

    whole = batch(make(codec), 4000)
    FlowMatching(FLOW, Spy())(*whole)  # pyright: ignore[reportArgumentType]
    ((t, labels),) = seen
    assert (labels < 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    kept = labels >= 0
    assert torch.equal(labels[kept], whole[2][kept])
    logit = torch.logit(t)
    assert logit.mean().abs() < 0.05 and logit.std().item() == pytest.approx(1, abs=0.05)


def test_two_labels_are_learned_and_drawn_each_as_itself(codec: Codec) -> None:
    """Latents of +1 under one label and of -1 under the other, with noise between them."""
    config = TransformerConfig(size=2, patch=1, depth=1, heads=2, head_width=16)
    assert codec.statistics is not None
    space = LatentSpace(codec_id="0" * 64, factor=8, mean=(0.0,) * 4, std=(1.0,) * 4, classes=("minus", "plus"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Diffusion(config, space)
    flow = FlowMatching(FLOW, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(250):
        labels = torch.arange(64) % 2
        mean = (2.0 * labels - 1)[:, None, None, None].expand(-1, *model.shape)
        loss = flow(mean, torch.full_like(mean, -4), labels, fold(step, torch.arange(64))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wanted = [Wanted(label, number) for label in (0, 1) for number in range(50)]
    z = draw_latents(model.eval(), wanted, seed=0, steps=20, guidance=1.0).mean((1, 2, 3))  # (100,)
    assert (z[:50] < -0.5).float().mean() > 0.95 and (z[50:] > 0.5).float().mean() > 0.95
    free = draw(model, normal(torch.arange(100), tuple(model.shape)), torch.full((100,), -1), steps=20, guidance=1.0)
    assert 0.25 < (free.mean((1, 2, 3)) > 0).float().mean() < 0.75


# --- samples


def test_eulers_method_follows_a_straight_path_to_its_end(codec: Codec) -> None:
    """With the true velocity of a single point, noise - z, any number of steps ends at that point."""
    point = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    class Straight(Diffusion):
        def forward(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return (z - point) / t[:, None, None, None]

    model = Straight(SMALL, make(codec).latents)
    for steps in (1, 3, 10):
        z = draw(model, normal(torch.arange(2), (4, 4, 4)), torch.zeros(2, dtype=torch.int64), steps=steps, guidance=1)
        torch.testing.assert_close(z, model.denormalize(point).expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)


def test_guidance_of_one_is_the_model_of_zero_is_without_labels(codec: Codec) -> None:
    model = make(codec)
    noise, labels = normal(torch.arange(3), tuple(model.shape)), torch.tensor([0, 1, 1])

    def drawn(labels: torch.Tensor, guidance: float) -> torch.Tensor:
        return draw(model, noise, labels, steps=3, guidance=guidance)

    torch.testing.assert_close(drawn(labels, 0.0), drawn(torch.full((3,), -1), 1.0))
    assert not torch.allclose(drawn(labels, 1.0), drawn(labels, 2.0))


def test_an_image_depends_on_seed_label_and_number_alone(codec: Codec) -> None:
    model = make(codec)
    wanted = choose(model, ["b", "a"], 3)
    assert wanted == [Wanted(1, 0), Wanted(1, 1), Wanted(1, 2), Wanted(0, 0), Wanted(0, 1), Wanted(0, 2)]
    whole = draw_latents(model, wanted, seed=1, steps=2, guidance=1.5)
    single = [draw_latents(model, [one], seed=1, steps=2, guidance=1.5)[0] for one in wanted]
    torch.testing.assert_close(whole, torch.stack(single), rtol=1e-4, atol=1e-4)
    assert len({tuple(z.flatten().tolist()) for z in whole}) == 6
    assert not torch.equal(whole, draw_latents(model, wanted, seed=2, steps=2, guidance=1.5))


def test_images_lie_in_folders_of_their_labels_and_are_kept_by_the_same_settings(codec: Codec, tmp_path: Path) -> None:
    model = make(codec)
    first = sample(model, Runner(codec, CPU), choose(model, ["a"], 3), tmp_path, steps=2, quiet=True)
    assert first.made == 3 and str(first) == "3 images drawn, 0 were there"
    assert [p.relative_to(tmp_path).as_posix() for p in first.paths] == ["a/00000.png", "a/00001.png", "a/00002.png"]
    with Image.open(first.paths[0]) as image:
        assert image.size == (32, 32)
    before = {path: path.read_bytes() for path in first.paths}
    first.paths[1].unlink()
    more = sample(model, Runner(codec, CPU), choose(model, [], 3), tmp_path, steps=2, quiet=True)
    assert more.made == 4 and {path: path.read_bytes() for path in first.paths} == before


def test_images_by_other_settings_are_not_mistaken_for_these(codec: Codec, tmp_path: Path) -> None:
    model = make(codec)
    paths = sample(model, Runner(codec, CPU), choose(model, ["a"], 1), tmp_path, steps=2, quiet=True).paths
    before = paths[0].read_bytes()
    with pytest.raises(UserError, match="holds images by other settings; give another folder, or --overwrite"):
        sample(model, Runner(codec, CPU), choose(model, ["a"], 1), tmp_path, steps=2, seed=1, quiet=True)
    assert paths[0].read_bytes() == before
    sample(model, Runner(codec, CPU), choose(model, ["a"], 1), tmp_path, steps=2, seed=1, overwrite=True, quiet=True)
    assert paths[0].read_bytes() != before
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(UserError, match="holds images by other settings"):
        sample(model, Runner(codec, CPU), choose(model, ["a"], 1), tmp_path, steps=2, quiet=True)


def test_pixels_are_the_codecs_of_the_drawn_latents(codec: Codec, tmp_path: Path) -> None:
    model = make(codec)
    wanted = choose(model, ["b"], 2)
    paths = sample(model, Runner(codec, CPU), wanted, tmp_path, steps=2, quiet=True).paths
    expected = codec.decode_uint8(draw_latents(model, wanted, seed=0, steps=2, guidance=1.0))
    sampling.write_grid_of(paths, 2, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid, Image.open(paths[1]) as second:
        assert grid.size == (64, 32) and grid.crop((32, 0, 64, 32)).tobytes() == second.tobytes()
        found = torch.frombuffer(bytearray(second.tobytes()), dtype=torch.uint8).reshape(32, 32, 3).permute(2, 0, 1)
    assert (found.int() - expected[1].int()).abs().max() <= 1


def test_what_cannot_be_drawn_is_refused(codec: Codec, tmp_path: Path) -> None:
    model = make(codec)
    with pytest.raises(UserError, match="no label c; the model's are: a, b"):
        choose(model, ["c"], 1)
    with pytest.raises(UserError, match="--count 0 must be at least 1"):
        choose(model, [], 0)
    with pytest.raises(UserError, match="--steps 0 must be at least 1"):
        sample(model, Runner(codec, CPU), choose(model, [], 1), tmp_path, steps=0, quiet=True)
    with torch.no_grad():
        next(codec.parameters()).add_(1)
    with pytest.raises(UserError, match=r"latents of model .*, but the model given is .*--model"):
        sample(model, Runner(codec, CPU), choose(model, [], 1), tmp_path, quiet=True)
