"""Test the joint phase: its bound, its gradients, its runs, and the priors that runs start from."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves

from latent_codec.export import export
from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec
from latent_codec.model.file import LatentStatistics
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.prior import factorized
from latent_codec.prior.context import ContextConfig
from latent_codec.prior.priors import Priors, to_tensors
from latent_codec.prior.quantizer import STEP_OF_STD
from tests.conftest import SQUEEZE
from tests.support.checkpoints import assert_close_runs, assert_same_tensors, checkpoint, log_lines, tensors
from tests.support.errors import refused, rejected
from tests.support.networks import TINY_LITE, make_codec
from tests.support.prior import context_tables, feedback
from tests.support.run import ONE_STEP, flags, run, run_ranks
from train.config.presets import photo
from train.config.vae import JointConfig
from train.context_prior.network import Coded, ContextNet, Drawn
from train.context_prior.trained import prior_from, prior_of
from train.objectives.elbo import ELBO
from train.objectives.joint import Joint

Z = 4
CONFIG = JointConfig(
    noise_steps=(0.5, 2.0),
    mode_weight=1.0,
    prior_groups=(1,),
    prior_levels=(2,),
    prior_width=8,
    prior_learning_rate=0.004,
)
SHAPE = ContextConfig(groups=(1, 3), width=CONFIG.prior_width, centred=True, levels=(2,))
STATISTICS = LatentStatistics(
    source="made up", images=2, mean=(0.0,) * Z, std=(1.0, 4.0, 2.0, 3.0), posterior_std=(0.5, 0.5, 0.25, 0.25)
)
SMALL = flags(
    "photo_joint --encoder-widths 8 8 --decoder-widths 8 8 --encoder-depths 1 1 --decoder-depths 1 1 "
    "--latent-channels 4 --prior-groups 1 --prior-levels 2 --prior-width 8 --batch-size 4 --crop 32 --eval-crop 32 "
    "--steps 4 --save-every 1 --keep-checkpoints 99 --log-every 1 --eval-every 2 --val-images 2 --lr-warmup-steps 2 "
    "--learning-rate 0.004"
)


def tiny_codec() -> Codec:
    codec = make_codec(dataclasses.replace(photo().codec, backbone=TINY_LITE, latent_channels=Z))
    means = torch.randn(Z, 500, generator=torch.Generator().manual_seed(1))
    base = torch.tensor(STATISTICS.posterior_std).numpy() * STEP_OF_STD
    base = base.astype("float32")
    codec.statistics, codec.priors = STATISTICS, Priors(base, factorized.fit(means, base), None)
    return codec


def net_of(codec: Codec, seed: int = 0, order: tuple[int, ...] | None = None) -> ContextNet:
    assert codec.priors is not None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ContextNet(SHAPE, codec.priors.channel_steps, STATISTICS, None if order is None else np.array(order))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model with a quantiser and a context prior of the runs' shape, whose order is not that of new ones."""
    codec = tiny_codec()
    assert codec.priors is not None
    codec.priors = codec.priors._replace(context=net_of(codec, 5, (0, 2, 1, 3)).freeze(context_tables()))
    codec.provenance = {"training": "made up", "prior": {"steps": 1}}
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    codec.save(path)
    return path


@pytest.fixture(scope="module")
def argv(model: Path, data: Path) -> list[str]:
    return [*SMALL, "--data", str(data), "--start-from", str(model)]


def batch(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return pixels, torch.arange(count), torch.zeros(count, dtype=torch.int64)


def test_the_kl_is_exact_in_expectation_where_the_prior_is_a_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a prior that is N(0, I)'s density times the cell's size, the KL is KL(N(m, s^2 std^2), N(0, I))."""
    codec = tiny_codec()
    objective = Joint(CONFIG, codec, net_of(codec))

    def code(drawn: Drawn) -> Coded:
        size = objective.prior.sizes(drawn.step)
        z = drawn.scaled * size
        log_mass = -0.5 * (z.square() + math.log(2 * math.pi)) + size.log()
        return Coded(-log_mass.mean((2, 3))[:, objective.prior.inverse] / math.log(2), z)

    monkeypatch.setattr(objective.prior, "code", code)
    n, generator = 10_000, torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 1, Z, 2, 2, generator=generator)
    posterior = DiagonalGaussian(mean.expand(n, -1, -1, -1), logvar.expand(n, -1, -1, -1))
    step = torch.full((n,), 1.25)
    z = posterior.mean + 1.25 * posterior.std * torch.randn(n, Z, 2, 2, generator=generator)
    found = objective.kl(posterior, z, step).sum(1)
    std = 1.25 * posterior.std[0]
    exact = (0.5 * (std.square() + mean[0].square() - 1) - std.log()).sum()
    assert found.mean().item() == pytest.approx(exact.item(), abs=4 * found.std().item() / math.sqrt(n))


def test_images_pay_what_a_standard_normal_charges_for_their_channels_means(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = tiny_codec()
    objective = Joint(dataclasses.replace(CONFIG, noise_steps=(2.0, 2.0)), codec, net_of(codec))
    monkeypatch.setattr(codec, "likelihood_params", lambda z, labels: torch.zeros(len(z), 3, 32, 32))
    monkeypatch.setattr(objective.prior, "code", lambda drawn: Coded(torch.zeros(3, Z), drawn.scaled))
    noise, losses = torch.randn(3, Z, 4, 4, generator=torch.Generator().manual_seed(1)), []
    noise = noise - noise.mean((2, 3), keepdim=True)
    for shift in (0.0, 0.5):
        monkeypatch.setattr(
            codec, "encode", lambda x, labels, m=noise + shift: DiagonalGaussian(m, torch.zeros_like(m))
        )
        losses.append(objective(*batch(), torch.tensor(1.0), False).loss.item())
    assert losses[1] - losses[0] == pytest.approx(16 * Z * 0.5 * 0.5**2, rel=1e-3)


def test_a_batchs_losses_are_the_means_of_its_images() -> None:
    codec = tiny_codec()
    objective = Joint(CONFIG, codec, net_of(codec))
    one = torch.tensor(1.0)
    whole = objective(*batch(), one, True)
    singles = [objective(*(t[i : i + 1] for t in batch()), one, True) for i in range(3)]
    for found, *parts in zip(*map(tree_leaves, (whole, *singles)), strict=True):
        if found is not None:
            torch.testing.assert_close(found, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-4)


def test_the_quantised_mode_teaches_the_decoder_alone() -> None:
    codec = tiny_codec()
    gradients = []
    for weight in (0.0, 5.0):
        objective = Joint(dataclasses.replace(CONFIG, mode_weight=weight), codec, net_of(codec))
        parts = codec.backbone.encoder, codec.backbone.decoder
        loss = objective(*batch(), torch.tensor(1.0), False).loss
        gradients.append([torch.autograd.grad(loss, list(p.parameters()), retain_graph=True) for p in parts])
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert any(not torch.allclose(a, b) for a, b in zip(gradients[0][1], gradients[1][1], strict=True))


def test_a_decoder_alone_learns_both_kinds_of_latents() -> None:
    """A Bernoulli mask gives each image one NLL; on average the loss is that of both."""
    codec = tiny_codec()
    fixed = dataclasses.replace(CONFIG, noise_steps=(1.5, 1.5), mode_weight=3.0)
    alone = Joint(dataclasses.replace(fixed, decoder_alone=True), codec, net_of(codec))
    pixels = batch(1)[0].expand(200, -1, -1, -1)
    keys, labels = torch.arange(200), torch.zeros(200, dtype=torch.int64)
    found = alone(pixels, keys, labels, torch.tensor(1.0), False)
    found.loss.backward()
    for name, parameter in alone.named_parameters():
        assert (parameter.grad is not None) == (".decoder." in name), name
    with torch.no_grad():
        whole = Joint(fixed, codec, net_of(codec))(pixels, keys, labels, torch.tensor(1.0), False)
    assert found.nll_mode.item() == pytest.approx(whole.nll_mode.item(), rel=0.1)
    assert found.bound.nll.item() == pytest.approx(whole.bound.nll.item(), rel=0.25)
    expected = found.bound.nll.item() / 1.5**2 + 3 * found.nll_mode.item()
    assert found.loss.item() == pytest.approx(expected, rel=1e-4) and found.bound.kl.item() == 0


@pytest.mark.parametrize("alone", [False, True])
def test_lpips_of_decoded_pixels_joins_either_nll(alone: bool, lpips: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, arguments, params = tiny_codec(), (*batch(2), torch.tensor(1.0), False), []
    decode = codec.likelihood_params
    monkeypatch.setattr(codec, "likelihood_params", lambda z, labels: params.append(decode(z, labels)) or params[-1])
    plain = dataclasses.replace(CONFIG, noise_steps=(1.5, 1.5), mode_weight=3.0, decoder_alone=alone)
    without = Joint(plain, codec, net_of(codec))(*arguments)
    params.clear()
    perceptual = Joint(dataclasses.replace(plain, lpips_weight=2.0), codec, net_of(codec), lpips)
    found = perceptual(*arguments)
    x = arguments[0].float() / 127.5 - 1
    distances = [lpips(codec.likelihood.mean(p), x).mean() for p in params]
    total = 4 * distances[0] if alone else distances[0] + 3 * distances[1]  # the draw's, then the quantised mode's
    added = found.loss - without.loss
    assert added.item() == pytest.approx(2.0 * 32 * 32 * total.item() / 1.5**2, rel=1e-3)
    assert found.lpips.item() == pytest.approx(distances[0].item(), rel=1e-5) and without.lpips is None
    torch.testing.assert_close(found.nll_mode, without.nll_mode, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.bound, without.bound, equal_nan=True)
    gradients = torch.autograd.grad(added, [p for p in codec.backbone.decoder.parameters() if p.requires_grad])
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    trained = {id(p) for p in perceptual.parameters() if p.requires_grad}
    assert trained.isdisjoint(id(p) for p in lpips.parameters())


@pytest.mark.parametrize(("weight", "module"), [(1.0, None), (0.0, nn.Identity())])
def test_an_objective_has_lpips_exactly_when_its_weight_is_positive(weight: float, module: Any) -> None:
    codec = tiny_codec()
    rejected("lpips_weight", Joint, dataclasses.replace(CONFIG, lpips_weight=weight), codec, net_of(codec), module)
    rejected("lpips_weight", ELBO, dataclasses.replace(photo().objective, lpips_weight=weight), codec, module)


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_it_compiles_to_one_graph_and_computes_the_same(alone: bool, lpips: LPIPS) -> None:
    """On a GPU a break in the graph would wait for the host."""
    codec = tiny_codec()
    assert codec.priors is not None
    net = ContextNet(ContextConfig(groups=(Z,), width=8, centred=True), codec.priors.channel_steps, STATISTICS)
    net.round_by(feedback(Z))
    config = dataclasses.replace(CONFIG, decoder_alone=alone, lpips_weight=2.0 if alone else 0.0)
    objective = Joint(config, codec, net, lpips if alone else None)
    gradients = []
    for compiled in (False, True):
        if compiled:
            objective.compile(backend="eager" if alone else "aot_eager", fullgraph=True)
        objective.zero_grad()
        objective(*batch(), torch.tensor(1.0), True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_the_prior_prices_the_encoder() -> None:
    """The gradient of the rate reaches the latents directly and through the contexts of others."""
    codec = tiny_codec()
    net = net_of(codec)
    z = torch.randn(1, Z, 4, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05)  # a new network's last layer may ignore its inputs
    net.code(net.take(z, torch.ones(1), exact=True)).bits.sum().backward()
    assert z.grad is not None and (z.grad != 0).all()


def test_thawing_is_the_inverse_of_freezing_and_keeps_the_order_of_channels(model: Path) -> None:
    frozen = Codec.load(model).priors
    assert frozen is not None and frozen.context is not None
    net = prior_of(CONFIG, str(model))
    again = frozen._replace(context=net.freeze(frozen.context.tables))
    one, other = to_tensors(frozen), to_tensors(again)
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith(("weight", "bias")):
            shift = [t[name.rpartition(".")[0] + ".shift"] for t in (one, other)]
            scale = [torch.exp2(-s.double()).reshape(-1, *[1] * (one[name].dim() - 1)) for s in shift]
            torch.testing.assert_close(one[name] * scale[0], other[name] * scale[1], rtol=0, atol=0)
        elif not name.endswith("shift"):
            assert torch.equal(one[name], other[name]), name


def test_a_run_rounds_as_the_model_it_starts_from(model: Path, tmp_path: Path) -> None:
    assert prior_of(CONFIG, str(model)).feedback is None
    codec = Codec.load(model)
    assert codec.priors is not None
    codec.priors = codec.priors._replace(feedback=feedback(Z))
    codec.save(tmp_path / "fed.safetensors")
    for width in (CONFIG.prior_width, 16):  # thawed, and anew
        net = prior_of(dataclasses.replace(CONFIG, prior_width=width), str(tmp_path / "fed.safetensors"))
        assert net.feedback is not None
        i, j = 2, 1  # in the prior's order
        expected = feedback(Z).weights[net.order[i], net.order[j]] / 2**14
        assert torch.equal(net.feedback[i, j], torch.from_numpy(expected).float())


def test_a_run_without_a_model_of_its_channels_is_refused(argv: list[str], tmp_path: Path) -> None:
    for words, message in (
        ([*argv, "--latent-channels", "5"], "its quantiser is for 4 latent channels, not 5"),
        (argv[: argv.index("--start-from")], "--start-from"),
    ):
        assert message in run(words, tmp_path / "run", code=1)


def test_the_prior_of_another_shape_starts_anew_but_not_for_a_decoder_alone(model: Path, tmp_path: Path) -> None:
    wide, alone = dataclasses.replace(CONFIG, prior_width=16), dataclasses.replace(CONFIG, decoder_alone=True)
    net = prior_of(wide, str(model))
    assert net.config.width == 16
    with pytest.raises(ValueError, match="does not fit"):
        net.thaw(Codec.load(model).priors.context)  # pyright: ignore
    assert prior_of(alone, str(model)).config == SHAPE
    codec = tiny_codec()
    codec.save(tmp_path / "factorised.safetensors")
    codec.priors = codec.statistics = None
    codec.save(tmp_path / "bare.safetensors")
    for config, source, message in (
        (dataclasses.replace(alone, prior_width=16), model, "its context prior is to stay"),
        (alone, tmp_path / "factorised.safetensors", "not none"),
        (CONFIG, tmp_path / "bare.safetensors", "no quantiser"),
    ):
        refused(message, prior_of, config, str(source))


@pytest.mark.slow
def test_evaluations_log_rate_and_distortion_of_the_latents(straight: Path) -> None:
    lines = log_lines(straight, "eval")
    assert len(lines) == 2
    for line in lines:
        for name in ("bpp", "psnr"):
            values = [line[f"{name}_step_{step}"] for step in ("0.5", "1", "2")]
            assert values == sorted(values, reverse=True) and values[-1] > 0


@pytest.mark.slow
def test_a_run_with_lpips_logs_it(argv: list[str], lpips: LPIPS, tmp_path: Path) -> None:
    words = "--decoder-alone --steps 2 --eval-every 2 --lpips-weight 2 --lpips-net squeeze --lpips-backbone"
    run([*argv, *flags(words), str(SQUEEZE)], tmp_path / "run")
    (line,) = log_lines(tmp_path / "run", "eval")
    assert all(0 < line[f"lpips_step_{step}"] < 2 for step in ("0.5", "1", "2"))
    assert all(0 < line["lpips"] < 2 for line in log_lines(tmp_path / "run", "train"))


def test_all_three_parts_are_trained(straight: Path) -> None:
    first, last = tensors(straight, 1), tensors(straight, 4)
    for part in (
        *("codec/backbone.encoder", "codec/backbone.decoder", "ema/backbone.decoder"),
        *("prior/nets", "prior_ema/nets"),
    ):
        changed = [not torch.equal(first[name], last[name]) for name in first if name.startswith(part)]
        assert changed and sum(changed) > len(changed) / 2, part


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(argv: list[str], straight: Path, tmp_path: Path) -> None:
    for limit in (ONE_STEP, ONE_STEP, []):
        run([*argv, *limit], tmp_path / "run")
    assert_same_tensors(tensors(tmp_path / "run", 4), tensors(straight, 4))
    assert any(name.startswith("optimizer/prior.nets") for name in tensors(straight, 4))


@pytest.mark.slow
def test_two_processes_compute_what_one_does(argv: list[str], straight: Path, tmp_path: Path) -> None:
    assert "2 process(es) on cpu" in run_ranks(argv, tmp_path / "run", 2)
    assert_close_runs(tmp_path / "run", straight, 2, 1e-4, 1e-6)


@pytest.mark.slow
def test_a_decoder_alone_leaves_what_files_hold_as_it_was(argv: list[str], model: Path, tmp_path: Path) -> None:
    """The decoder is deeper here by a block, and the run is interrupted once."""
    words = [*argv, *flags("--decoder-alone --decoder-depths 1 2 --lap 0 --steps 2")]
    run([*words, *ONE_STEP], tmp_path / "run")
    run(words, tmp_path / "run")
    before = Codec.load(model)
    after = export(tmp_path / "run", tmp_path / "m.safetensors", data=(), images=1, half=False)
    assert before.priors is not None and after.priors is not None and after.statistics == before.statistics
    assert_same_tensors(to_tensors(after.priors), to_tensors(before.priors))
    assert after.provenance["prior"] == {"steps": 1} and after.provenance["training"]["data_images"] == 6
    kept = {name: t for name, t in before.state_dict().items() if ".decoder." not in name}
    assert_same_tensors({name: after.state_dict()[name] for name in kept}, kept)
    name = "backbone.linear.decoder.weight"
    assert not torch.equal(after.state_dict()[name], before.state_dict()[name])
    x = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(after.encode(x).mean, before.encode(x).mean, rtol=0, atol=0)


def test_a_prior_starts_from_the_run(data: Path, straight: Path, tmp_path: Path) -> None:
    codec = export(straight, tmp_path / "model.safetensors", data=(data,), images=3, half=False)
    assert codec.priors is not None and codec.statistics is not None and codec.priors.context is None
    net = prior_from(straight, SHAPE, codec)
    trained = load_file(checkpoint(straight, 4) / "prior_ema.safetensors")
    assert net.order.tolist() == trained["channels"].tolist()
    assert_same_tensors(dict(net.state_dict()), trained)


def test_sources_without_a_fitting_prior_are_refused(straight: Path, model: Path, tmp_path: Path) -> None:
    codec = tiny_codec()
    codec.save(tmp_path / "bare.safetensors")
    for source, message in (
        (tmp_path, "no checkpoint with a prior"),
        (tmp_path / "bare.safetensors", "has no context prior"),
    ):
        refused(message, prior_from, source, SHAPE, codec)
    for source in (straight, model):
        refused("--start-from", prior_from, source, dataclasses.replace(SHAPE, width=16), codec)


@pytest.mark.slow
def test_the_prior_has_a_learning_rate_of_its_own(argv: list[str], model: Path, tmp_path: Path) -> None:
    """The first step of Adam is as long as the learning rate."""
    start, codecs = prior_of(CONFIG, str(model)).state_dict(), []
    for rate in (1e-3, 1e-5):
        out = tmp_path / f"{rate:g}"
        run([*argv, *flags(f"--steps 1 --lr-warmup-steps 0 --prior-learning-rate {rate:g}")], out)
        found = tensors(out, 1)
        moved = max((found[f"prior/{k}"] - v).abs().max().item() for k, v in start.items() if k.startswith("nets"))
        assert moved == pytest.approx(rate, rel=0.05)
        codecs.append({name: value for name, value in found.items() if name.startswith("codec/")})
    assert_same_tensors(*codecs)


def test_a_context_net_without_an_order_takes_the_strongest_first() -> None:
    net = ContextNet(SHAPE, tiny_codec().priors.channel_steps, STATISTICS)  # pyright: ignore
    assert net.order.tolist() == [3, 1, 2, 0]  # 3 / .25, 4 / .5, 2 / .25 (in this order of equals), 1 / .5
