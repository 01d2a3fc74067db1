"""Check that an imported codec computes what diffusers does, and that what cannot be imported is refused by name."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latent_codec.errors import UserError
from latent_codec.interop.autoencoder_kl import settings
from latent_codec.interop.autoencoder_kl.exporting import CONFIG, WEIGHTS
from latent_codec.interop.autoencoder_kl.importing import import_model
from latent_codec.model.codec import Codec
from latent_codec.model.config import ConvConfig, DiagonalGaussianConfig, GaussianConfig
from tests.support import kl
from tests.support.errors import refused

FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
SCALES = {"SD and SDXL": {"scaling_factor": 0.13025}, "FLUX and SD3": FLUX}


Saved = tuple[AutoencoderKL, Path]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def saved(tmp_path: Path, shape: tuple[ConvConfig, int] = (kl.SMALL, 4), **scale: Any) -> Saved:
    """Save one of diffusers' own."""
    model = kl.autoencoder(*shape, **scale)
    model.save_pretrained(tmp_path / "vae")
    return model, tmp_path / "vae"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Save a small model; it is not to be changed."""
    return saved(tmp_path_factory.mktemp("small"), scaling_factor=0.13025)


@pytest.mark.slow
@pytest.mark.parametrize("shape", kl.SHAPES)
def test_a_folder_becomes_the_same_codec_and_back_again_the_same_folder(tmp_path: Path, out: Path, shape: str) -> None:
    """Going back is exact without folding; with it the latents are scaled and all else is as before."""
    model, folder = saved(tmp_path, kl.SHAPES[shape], **SCALES.get(shape, {}))
    codec = import_model(folder, out)
    kl.assert_same_model(codec, model)
    with torch.inference_mode():
        ours, theirs = codec.encode(kl.pixels()).kl(), model.encode(kl.pixels()).latent_dist.kl()
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-4) and codec.config.backbone == kl.SHAPES[shape][0]
    assert codec.config.bottleneck == DiagonalGaussianConfig(logvar_min=-30.0, logvar_max=20.0)
    assert codec.config.likelihood == GaussianConfig(scale="fixed", sigma=settings.SIGMA)
    assert codec.provenance["imported_from"] == "vae" and Codec.load(out).model_id == codec.model_id
    kl.export(codec, tmp_path / "back", normalize=False)
    before, after = (load_file(f / WEIGHTS) for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config, again = (json.loads((f / CONFIG).read_text()) for f in (folder, tmp_path / "back"))
    assert all((config[key] or 0) == (again[key] or 0) for key in ("scaling_factor", "shift_factor"))
    kl.export(codec, tmp_path / "folded")
    folded = AutoencoderKL.from_pretrained(tmp_path / "folded")
    kl.assert_same_model(codec, folded, config["shift_factor"] or 0.0, 1 / config["scaling_factor"])


def test_training_moves_log_variances_within_the_range_and_tells_the_share_beyond(small: Saved, out: Path) -> None:
    codec = import_model(small[1], out)
    weights = dict(codec.backbone.named_parameters())
    weight, bias = weights["quant_conv.weight"], weights["quant_conv.bias"]
    with torch.no_grad():
        weight[4:], bias[4:] = 0, torch.tensor([-31.0, -29.0, 19.0, 21.0])
    posterior = codec.encode(kl.pixels())
    posterior.kl().sum().backward()
    assert bias.grad is not None and (bias.grad != 0).tolist() == [True] * 4 + [False, True, True, False]
    assert bias.grad[5] < 0 < bias.grad[6]  # descent moves both towards the prior
    assert posterior.clamped == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "prefix"), [*zip(kl.SHAPES, ("", "first_stage_model.", "vae."), strict=True), ("FLUX and SD3", "")]
)
def test_the_original_layout_is_read_alone_or_in_a_file(tmp_path: Path, out: Path, shape: str, prefix: str) -> None:
    model = kl.autoencoder(*kl.SHAPES[shape])
    tensors = {prefix + name: tensor.contiguous() for name, tensor in kl.to_ldm(model.state_dict()).items()}
    others = ["loss.discriminator.main.0.weight", "model_ema.decay"] if not prefix else ["model.diffusion_model.weight"]
    save_file(tensors | {name: torch.full((1,), torch.nan) for name in others}, tmp_path / "file.safetensors")
    codec = import_model(tmp_path / "file.safetensors", out)
    kl.assert_same_model(codec, model)
    assert codec.statistics is None


def test_a_file_beside_its_config_json_goes_by_that(tmp_path: Path, out: Path) -> None:
    """Shapes do not tell the number of groups."""
    backbone = dataclasses.replace(kl.SMALL, groups=8)
    model = kl.autoencoder(backbone, scaling_factor=0.5)
    model.save_pretrained(tmp_path / "vae", variant="fp32")
    codec = import_model(tmp_path / "vae" / "diffusion_pytorch_model.fp32.safetensors", out)
    kl.assert_same_model(codec, model)
    assert codec.config.backbone == backbone and codec.statistics is not None
    (tmp_path / "vae" / CONFIG).write_text('{"_class_name": "UNet2DModel"}')
    other = import_model(tmp_path / "vae" / "diffusion_pytorch_model.fp32.safetensors", out)
    assert other.config.backbone == kl.SMALL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_to_the_bit(tmp_path: Path, out: Path, dtype: torch.dtype) -> None:
    model = kl.autoencoder().to(dtype)
    model.save_pretrained(tmp_path / "vae", variant="fp16")
    codec = import_model(tmp_path / "vae", out)
    kl.assert_same_model(codec, model.float())
    assert torch.equal(codec.state_dict()["backbone.encoder.conv_in.weight"], model.encoder.conv_in.weight)
    assert {t.dtype for t in load_file(out).values()} == {torch.float32}
    import_model(tmp_path / "vae", out, half=True)
    assert {t.dtype for t in load_file(out).values()} == {torch.float16}


@pytest.mark.slow
def test_a_pipelines_folder_is_read(small: Saved, out: Path) -> None:
    kl.assert_same_model(import_model(small[1].parent, out), small[0])


@pytest.mark.parametrize(
    ("factor", "others", "mean", "std"),
    [
        (0.18215, {}, [0] * 4, [1 / 0.18215] * 4),
        (0.5, {"shift_factor": 0.25}, [0.25] * 4, [2] * 4),
        (1.0, {}, [0] * 4, [1] * 4),
        (0.5, {"latents_mean": [1, 2, 3, 4], "latents_std": [1, 2, 1, 4]}, [1, 2, 3, 4], [2, 4, 2, 8]),
    ],
)
def test_the_scale_becomes_statistics(tmp_path: Path, factor: float, others: Any, mean: Any, std: Any) -> None:
    folder = saved(tmp_path, scaling_factor=factor, **others)[1]
    found = import_model(folder, tmp_path / "out.safetensors").statistics
    assert found and (found.source, found.images, found.posterior_std) == ("the scale of vae", 0, None)
    assert found.mean == pytest.approx(mean) and found.std == pytest.approx(std)


def test_factors_given_replace_those_of_the_source(small: Saved, out: Path) -> None:
    _, folder = small
    found = import_model(folder, out, scaling_factor=0.25, shift_factor=2.0).statistics
    assert found and (found.source, found.mean, found.std) == ("the scale of the command line", (2.0,) * 4, (4.0,) * 4)
    with pytest.raises(UserError, match=r"--scaling-factor -1\.0 --shift-factor None: both must be finite"):
        import_model(folder, out, scaling_factor=-1.0)


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.pt", "a.pth", "a.safetensors"])
def test_pickles_are_refused_whatever_their_name(tmp_path: Path, out: Path, name: str) -> None:
    torch.save({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / name)
    refused("a pickle, which can run anything when it is loaded, is never read", import_model, tmp_path / name, out)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / CONFIG).write_text("{}")
    (tmp_path / name).rename(tmp_path / "vae" / "diffusion_pytorch_model.bin")
    refused(r"diffusion_pytorch_model\.bin: a pickle", import_model, tmp_path / "vae", out)
    assert not out.exists()


def test_a_lone_file_goes_by_its_shapes_even_if_it_begins_like_a_pickle(tmp_path: Path, out: Path) -> None:
    """Its first byte belongs to the header's length, and may be a pickle's 0x80."""
    model, file = kl.autoencoder(), tmp_path / "file.safetensors"
    save_file(model.state_dict(), file, {"note": ""})
    padding = (0x80 - file.read_bytes()[0]) % 256
    save_file(model.state_dict(), file, {"note": "x" * padding})
    assert file.read_bytes()[:1] == b"\x80"
    kl.assert_same_model(codec := import_model(file, out), model)
    assert codec.statistics is None


@pytest.mark.parametrize("layout", ["folder", "original"])
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, out: Path, layout: str) -> None:
    model, folder = saved(tmp_path)
    weights = folder / WEIGHTS
    if layout == "original":
        weights = tmp_path / "file.safetensors"
        save_file({n: t.contiguous() for n, t in kl.to_ldm(model.state_dict()).items()}, weights)
    good, name = load_file(weights), "decoder.conv_out.weight"
    cases = [
        ({n: t for n, t in good.items() if n != name}, f"1 tensors are missing: {name}"),
        (good | {"decoder.conv_more.weight": torch.zeros(1)}, r"1 tensors are unknown: decoder\.conv_more\.weight"),
        (good | {name: torch.zeros(3, 32, 1, 1)}, rf"tensor {name} has shape \(3, 32, 1, 1\), the config asks for"),
        (good | {name: torch.full_like(good[name], torch.inf)}, f"tensor {name} holds values that are not finite"),
        (good | {name: torch.zeros(3, 32, 3, 3, dtype=torch.int32)}, f"tensor {name} is torch.int32"),
        (good | {"bn.running_mean": torch.zeros(1)}, "batch normalisation of latents"),
    ]
    for tensors, reason in cases:
        save_file(tensors, weights)
        with pytest.raises(UserError, match=reason) as caught:
            import_model(folder if layout == "folder" else weights, out)
        assert str(weights) in str(caught.value)
    assert not out.exists()


def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, out: Path) -> None:
    _, folder = saved(tmp_path, (dataclasses.replace(kl.SMALL, mid_attention=True), 4))
    good = json.loads((folder / CONFIG).read_text())
    for change, reason in (
        ({"layers_per_block": 3}, "tensors are missing"),
        ({"mid_block_add_attention": False}, "tensors are unknown: .*attentions"),
        ({"latent_channels": 8}, "has shape"),
        ({"norm_num_groups": 5}, "no model can be made of its config: conv: groups 5 must divide"),
        ({"block_out_channels": [2**40, 2**40]}, "no model can be made|has shape"),
    ):
        (folder / CONFIG).write_text(json.dumps(good | change))
        refused(reason, import_model, folder, out)
    for text in ("{", "[]", "null", '"x"'):
        (folder / CONFIG).write_text(text)
        refused(r"config\.json: (cannot be read as JSON|not the configuration)", import_model, folder, out)
    assert not out.exists()


def test_impossible_sources_and_destinations_are_refused(codec: Codec, tmp_path: Path, out: Path) -> None:
    _, folder = saved(tmp_path)
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "empty").mkdir()
    codec.save(tmp_path / "ours.safetensors")
    for source, destination, reason in (
        (tmp_path / "none", out, "no such file or folder"),
        (tmp_path / "empty", out, r"no config\.json in it"),
        (tmp_path / "text.safetensors", out, "not a safetensors file"),
        (tmp_path / "ours.safetensors", out, r"no tensor encoder\.conv_in\.weight"),
        (folder, tmp_path, "is a folder; give the model file's name"),
        (folder, folder / WEIGHTS, "is the file to import"),
        (folder, tmp_path / "text.safetensors" / "x.safetensors", "cannot be written into"),
    ):
        refused(reason, import_model, source, destination)
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "b.safetensors")
    refused(r"but a\.safetensors, b\.safetensors; name the file", import_model, folder, out)
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    refused("in several shards", import_model, folder, out)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a model; its folder is not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "vae"
    kl.export(kl.codec(), folder)
    return folder


@pytest.mark.slow
def test_a_changed_export_is_imported_as_it_stands(exported: Path, tmp_path: Path, out: Path, caplog: Any) -> None:
    shutil.copytree(exported, tmp_path / "vae")
    weights, tensors = tmp_path / "vae" / WEIGHTS, load_file(exported / WEIGHTS)
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    for name in ("encoder.conv_in.bias", "quant_conv.bias", "post_quant_conv.weight"):
        save_file(tensors | {name: tensors[name] + 1}, weights, metadata)
        back = import_model(tmp_path / "vae", out)
        assert "its tensors are not those that were exported" in caplog.text
        kl.assert_same_model(back, AutoencoderKL.from_pretrained(tmp_path / "vae"))
        assert back.statistics is not None and set(back.statistics.std) == {1.0}
        caplog.clear()
    model = AutoencoderKL.from_pretrained(exported)
    for header in ("{", "[]", "{}", '{"format_version":2}', '{"format_version":1,"config":{}}'):
        save_file(tensors, weights, {"format": "pt", "latent_codec_export": header})
        kl.assert_same_model(import_model(tmp_path / "vae", out), model)
        assert "imported as it stands" in caplog.text
        caplog.clear()
    model.save_pretrained(tmp_path / "again")
    kl.assert_same_model(import_model(tmp_path / "again", out), model)
