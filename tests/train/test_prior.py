"""Test the training of context priors: what they learn, that runs resume exactly, and that integers lose nothing."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from latent_codec.errors import UserError
from latent_codec.export import export
from latent_codec.images.geometry import Geometry
from latent_codec.latents.format import latents_header, latents_row, unplaced_entry, write_index, write_shard
from latent_codec.model.codec import Codec
from latent_codec.model.file import LatentStatistics
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.prior import factorized
from latent_codec.prior.context import MAX_LEVELS, TABLES, ContextConfig, ContextPrior, table_scale
from latent_codec.prior.layout import PassLayout, Sites
from latent_codec.prior.passes import ideal_bits, quantize
from latent_codec.prior.priors import Priors, to_tensors
from latent_codec.prior.quantizer import STEP_OF_STD, dequantize, scale
from tests.support.checkpoints import assert_same_tensors, checkpoint, log_lines
from tests.support.errors import refused, rejected
from tests.support.run import flags, run_ranks
from tests.support.run import run as run_one
from train.config import prior
from train.context_prior.network import ContextNet, counted_tables, gather, logistic_tables, scatter
from train.data.latents import LatentCrops
from train.prior import PriorConfig, Run, train

CHANNELS = 4
GROUPS, LEVELS = (1, 3), (2,)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> tuple[Path, Path]:
    """Write a model with a quantiser, and latents with something to learn: smooth in space, channels alike."""
    folder = tmp_path_factory.mktemp("prior")
    codec, generator = Codec.load(model_file), torch.Generator().manual_seed(0)
    coarse = torch.randn(6, 1, 4, 5, generator=generator)
    smooth = interpolate(coarse, size=(9, 10), mode="bicubic")
    own = torch.randn(6, CHANNELS, 9, 10, generator=generator)
    means = (smooth * 2 + own * 0.3) * torch.tensor([8.0, 4.0, 2.0, 0.5])[:, None, None]  # (n, z, h, w)
    codec.statistics = LatentStatistics(
        source="made up",
        images=6,
        mean=(0.0,) * CHANNELS,
        std=tuple(means.std((0, 2, 3)).tolist()),
        posterior_std=(0.5, 0.5, 0.25, 0.25),
    )
    channel_steps = np.array(codec.statistics.posterior_std, np.float32) * np.float32(STEP_OF_STD)
    codec.priors = Priors(channel_steps, factorized.fit(means.transpose(0, 1).flatten(1), channel_steps), None)
    codec.save(folder / "model.safetensors")
    geometry = Geometry(width=80, height=72, orientation=1, mode="RGB", background=None)
    posterior, header = DiagonalGaussian(means, torch.zeros_like(means)), latents_header(codec, "float32")
    rows = [latents_row(unplaced_entry(f"{i}.png", geometry, ""), posterior, i, "float32") for i in range(6)]
    (folder / "latents").mkdir()
    write_index(folder / "latents", header, write_shard(folder / "latents", header, "all", rows))
    return folder / "model.safetensors", folder / "latents"


def run(places: tuple[Path, Path], out: Path, max_minutes: float | None = None, **fields: Any) -> Run:
    small = {"groups": GROUPS[:-1], "levels": LEVELS, "width": 8, "batch_size": 2, "crop": 8, "count_images": 4}
    config = PriorConfig(**(small | {"steps": 6, "save_every": 2, "log_every": 2, "lr_warmup_steps": 1} | fields))
    model, latents = places
    return Run(model=str(model), latents=(latents,), val=(latents,), out=out, max_minutes=max_minutes, config=config)


def net_of(
    places: tuple[Path, Path], width: int = 8, levels: tuple[int, ...] = LEVELS, groups: tuple[int, ...] = GROUPS
) -> ContextNet:
    codec = Codec.load(places[0])
    assert codec.priors is not None and codec.statistics is not None
    config = ContextConfig(groups=groups, width=width, centred=True, levels=levels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ContextNet(config, codec.priors.channel_steps, codec.statistics)


def crops_of(places: tuple[Path, Path], crop: int = 8) -> LatentCrops:
    return LatentCrops([places[1]], Codec.load(places[0]).model_id, crop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, places: tuple[Path, Path]) -> Path:
    """Write a run of six steps without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(run(places, out)) == 0
    return out


@pytest.mark.slow
def test_a_run_leaves_the_model_with_a_prior_that_saves_bits(tmp_path: Path, places: tuple[Path, Path]) -> None:
    assert train(run(places, tmp_path / "run", steps=80, log_every=40, learning_rate=1e-2, count_images=12)) == 0
    before, after = Codec.load(places[0]), Codec.load(tmp_path / "run" / "model.safetensors")
    assert after.model_id == before.model_id and after.statistics == before.statistics
    assert after.priors is not None and after.priors.context is not None
    assert after.priors.feedback is not None and after.priors.feedback.weights.shape == (CHANNELS, CHANNELS, 3, 3)
    for line in log_lines(tmp_path / "run", "train"):
        assert list(line) == ["kind", "step", "bits_per_position", "grad_norm", "images_per_s", "learning_rate"]
    evaluated = log_lines(tmp_path / "run", "eval")
    assert [line["step"] for line in evaluated] == [1, 1.4, 2, 4]
    for line in evaluated:
        assert line["context_bits"] < 1.05 * line["float_bits"]
        assert line["context_bits"] < line["factorized_bits"] or line["step"] > 2
    copied = export(tmp_path / "run", tmp_path / "out.safetensors", data=(), images=1, half=False)
    assert copied.priors is not None
    assert_same_tensors(to_tensors(copied.priors), to_tensors(after.priors))


@pytest.mark.slow
def test_error_feedback_changes_the_tables_alone(tmp_path: Path, places: tuple[Path, Path]) -> None:
    """The latents that tables are counted on are rounded by it."""
    models = []
    for feedback in (True, False):
        train(run(places, tmp_path / str(feedback), steps=0, feedback=feedback))
        models.append(Codec.load(tmp_path / str(feedback) / "model.safetensors"))
    one, other = (model.priors for model in models)
    assert one is not None and other is not None and one.context is not None and other.context is not None
    assert one.feedback is not None and other.feedback is None
    for layer, same in zip(one.context.networks[0], other.context.networks[0], strict=True):
        assert torch.equal(layer.weight, same.weight)
    assert not np.array_equal(one.context.tables.counts, other.context.tables.counts)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, places: tuple[Path, Path], whole: Path) -> None:
    out = tmp_path / "run"
    for step in (1, 2):
        assert train(run(places, out, max_minutes=1e-5)) == 0
        assert checkpoint(out, step).is_dir() and not (out / "model.safetensors").exists()
    refused("not finished", export, out, tmp_path / "m.safetensors", data=(), images=1, half=False)
    shutil.rmtree(checkpoint(out, 2))
    train(run(places, out))
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    assert_same_tensors(load_file(out / "model.safetensors"), load_file(whole / "model.safetensors"))
    for name in ("prior.safetensors", "optimizer.safetensors"):
        assert_same_tensors(load_file(checkpoint(out, 6) / name), load_file(checkpoint(whole, 6) / name))


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, places: tuple[Path, Path]) -> None:
    argv = flags("--groups 1 --levels 2 --width 8 --steps 1 --batch-size 4 --crop 8 --count-images 2")
    argv = [str(places[0]), "--latents", str(places[1]), *argv]
    assert "2 process(es) on cpu" in run_ranks(argv, tmp_path / "two", 2, program="prior")
    run_one(argv, tmp_path / "one", program="prior")
    two, one = (load_file(checkpoint(tmp_path / name, 1) / "optimizer.safetensors") for name in ("two", "one"))
    for name, found in two.items():
        torch.testing.assert_close(found, one[name], rtol=1e-4, atol=1e-7)
    assert (tmp_path / "two" / "model.safetensors").is_file()


def test_wrong_values_are_refused_by_name(tmp_path: Path, places: tuple[Path, Path], whole: Path, codec: Codec) -> None:
    refused(r"other settings \(width\)", train, run(places, whole, width=16))
    codec.priors, bare = None, tmp_path / "bare.safetensors"
    codec.save(bare)
    refused("export", train, run((bare, places[1]), tmp_path / "run"))
    wrong = {"crop": 6, "batch_size": 0, "step_range": (2.0, 1.0), "dithered": 2.0, "levels": (-1,)}
    for name, value in wrong.items():
        refused(name, train, run(places, tmp_path / "other", **{name: value}))
    for groups in ((1, 3), (0,)):  # of four channels
        with pytest.raises(UserError, match="leave some of the 4 channels for the last group"):
            train(run(places, tmp_path / "other", groups=groups))
    refused("give a smaller --crop", train, run(places, tmp_path / "other", crop=64))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "checkpoint.safetensors").touch()
    refused("cannot be resumed by this version", train, run(places, tmp_path / "old"))


def test_crops_depend_on_seed_and_number_alone(places: tuple[Path, Path]) -> None:
    crops = crops_of(places, 6)
    assert len(crops) == 6
    whole = crops.batch(range(20), 3)
    assert whole.means.shape == (20, CHANNELS, 6, 6)
    again = [crops.batch([i], 3) for i in range(20)]
    assert torch.equal(whole.means, torch.cat([b.means for b in again]))
    assert torch.equal(whole.keys, torch.cat([b.keys for b in again]))
    assert not torch.equal(whole.means, crops.batch(range(20), 4).means)


def test_drawn_latents_are_those_of_the_quantiser(places: tuple[Path, Path]) -> None:
    net, priors = net_of(places), Codec.load(places[0]).priors
    batch = crops_of(places).batch(range(16), 0)
    drawn = net.draw(batch.means, batch.keys, (0.5, 4.0), 0.5)
    assert 0 < int(drawn.dithered.sum()) < 16 and priors is not None
    for mean, found in zip(batch.means, net.unquantized(drawn), strict=True):
        expected = scale(mean, priors.channel_steps, found.step, found.seed)
        assert np.array_equal(found.latents, expected.latents) and 512 <= found.step <= 4096


@pytest.mark.parametrize("levels", [(), (2, 1), (0, 3)])
def test_integers_cost_what_the_float_network_says(places: tuple[Path, Path], levels: tuple[int, ...]) -> None:
    """With the same tables, only weights, activations and grids are rounded."""
    net = net_of(places, 16, levels)
    with torch.no_grad():
        for layers in net.nets:
            layers[3].weight.mul_(0.3)  # pyright: ignore
    batch = crops_of(places).batch(range(12), 0)
    drawn = net.draw(batch.means, batch.keys, (0.7, 2.0), 0.3)
    with torch.no_grad():
        coded = net.code(drawn)
    wanted = coded.bits.double().numpy() * 64
    prior = net.freeze(logistic_tables())
    codings = quantize(prior, net.unquantized(drawn), "cpu")
    found = [ideal_bits(prior, coding.passes) for coding in codings]
    channel_steps = Codec.load(places[0]).priors.channel_steps  # pyright: ignore[reportOptionalMemberAccess]
    read = torch.stack([dequantize(coding.quantized, channel_steps) for coding in codings])
    size = torch.from_numpy(channel_steps)[:, None, None] * (drawn.step / 1024)[:, None, None, None]
    assert ((coded.latents - read) / size).abs().mean() < 0.03  # an eighth apart where a location is at an edge
    assert np.sum(found) == pytest.approx(np.sum(wanted), rel=0.03) and np.corrcoef(found, wanted)[0, 1] > 0.99


def test_locations_learn_although_all_integers_are_zero(places: tuple[Path, Path]) -> None:
    """A latent within half a step of its location is 0 wherever it lies, so integers do not tell."""
    net = net_of(places)
    means = crops_of(places).batch(range(4), 0).means
    drawn = net.take(means, torch.full((4,), 60.0))
    coded = net.code(drawn)
    assert not torch.equal(coded.latents, torch.zeros_like(means))
    coded.bits.sum().backward()
    for span, layers in zip(net.layouts, net.nets, strict=True):
        gradient = layers[3].weight.grad  # pyright: ignore
        located, wide = gradient.split(span.stop - span.start)  # pyright: ignore
        assert located.abs().amax() > 0 and wide.abs().amax() > 0


def test_scattering_is_the_inverse_of_gathering() -> None:
    x = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12).float()
    for passes in (
        [PassLayout(0, 3, Sites.EVEN), PassLayout(0, 3, Sites.ODD)],
        [PassLayout(0, 3, Sites.ALL, 4), *(PassLayout(0, 3, s, n) for n in (2, 1) for s in (Sites.CENTRES, Sites.ODD))],
    ):
        parts = [scatter(gather(x, span), (8, 12), span) for span in passes]
        assert torch.equal(sum(parts), x)
        for span, part in zip(passes, parts, strict=True):
            assert not part[:, :, ~torch.from_numpy(span.mask((8, 12)))].any()


def test_the_limits_of_levels_agree() -> None:
    assert prior.MAX_LEVELS == MAX_LEVELS


def test_logistic_tables_have_the_logistics_masses() -> None:
    tables = logistic_tables()
    for table in range(0, TABLES, 29):
        location, scale = table_scale(table)
        counts = tables.frequencies(table)[:-1] / 2**24
        k = np.arange(len(counts)) + tables.first[table]
        mass = 0.5 * np.tanh((k + 0.5 - location) / scale / 2) - 0.5 * np.tanh((k - 0.5 - location) / scale / 2)
        assert np.abs(counts - mass).max() < 1.2e-3  # no frequency exceeds 1 - 2^-10
        assert mass.sum() > 1 - 1e-5


def test_counted_tables_approach_the_coded_frequencies() -> None:
    start = logistic_tables()
    table = 30 * 8 + 4
    values = np.repeat([0, 1, 5], [60_000, 30_000, 10_000])
    found = counted_tables(start, values, np.full(len(values), table))
    shares = found.frequencies(table) / 2**24
    assert shares[[0 - found.first[table], 1 - found.first[table]]] == pytest.approx([0.6, 0.3], abs=0.02)
    assert np.array_equal(found.frequencies(3), start.frequencies(3)) or np.allclose(
        found.frequencies(3), start.frequencies(3), rtol=1e-2, atol=20
    )


def test_thawing_a_prior_of_other_levels_takes_the_passes_in_common(places: tuple[Path, Path]) -> None:
    before, net = net_of(places, levels=(0, 1)), net_of(places)
    fresh = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert [span in before.layouts for span in net.layouts] == [False, False, False, False, True, False, True]
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.mul_(1.5)
    frozen = before.freeze(logistic_tables())
    net.thaw(frozen)
    after = net.freeze(logistic_tables())
    for number, span in enumerate(net.layouts):
        if span in before.layouts:
            taken = frozen.networks[before.layouts.index(span)]
            for one, other in zip(after.networks[number], taken, strict=True):
                assert torch.equal(one.weight * 2.0 ** -one.shift[:, None], other.weight * 2.0 ** -other.shift[:, None])
        else:
            own = {k: t for k, t in net.state_dict().items() if k.startswith(f"nets.{number}.")}
            assert own and all(torch.equal(t, fresh[k]) for k, t in own.items())
    rejected("does not fit", net_of(places, groups=(4,)).thaw, frozen)


def test_only_networks_whose_sums_are_exact_are_frozen(places: tuple[Path, Path]) -> None:
    assert isinstance(net_of(places, width=112).freeze(logistic_tables()), ContextPrior)
    with pytest.raises(ValueError, match="2\\^24"):
        net = net_of(places, width=300)
        torch.nn.init.constant_(net.nets[0][1].weight, 1.0)  # pyright: ignore
        net.freeze(logistic_tables())
