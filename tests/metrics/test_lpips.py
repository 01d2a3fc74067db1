"""Test LPIPS: the published numbers, its gradients, and what it refuses."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lpips import pretrained_networks
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models import squeezenet1_1

from latent_codec.errors import UserError
from latent_codec.metrics.lpips import BACKBONES, LPIPS, Net
from tests.support.data import WEIGHTS
from tests.support.errors import refused, rejected

FILES: dict[Net, str] = {"alex": "alexnet_features.safetensors", "squeeze": "squeezenet1_1_features.safetensors"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write squeezenet's features with random weights; with the real heads they make a distance like any other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = squeezenet1_1(weights=None).state_dict()
    path = tmp_path_factory.mktemp("backbone") / "squeeze.safetensors"
    save_file({name: tensor for name, tensor in state.items() if name.startswith("features.")}, path)
    return path


@pytest.fixture(scope="module")
def distance(backbone: Path) -> LPIPS:
    return LPIPS("squeeze", backbone)


def images(batch: int = 2, side: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    x = torch.rand(batch, 3, side, side + 3, generator=noise) * 2 - 1
    return x, (x + 0.3 * torch.randn(x.shape, generator=noise)).clamp(-1, 1)


@pytest.mark.skipif(not (WEIGHTS / "lpips_check").is_dir(), reason=f"no {WEIGHTS}/lpips_check here")
@pytest.mark.parametrize(("net", "far", "near"), [("alex", 0.7219, 0.1376), ("squeeze", 0.7110, 0.1479)])
def test_the_package_s_example_has_its_published_distances(net: Net, far: float, near: float) -> None:
    def read(name: str) -> torch.Tensor:
        pixels = np.array(Image.open(WEIGHTS / "lpips_check" / name).convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1

    reference, others = read("ex_ref.png"), torch.cat([read("ex_p0.png"), read("ex_p1.png")])
    with torch.no_grad():
        values = LPIPS(net, WEIGHTS / FILES[net])(reference.expand_as(others), others)
    assert values.tolist() == pytest.approx([far, near], abs=6e-5)


def test_values_are_the_package_s(distance: LPIPS, backbone: Path) -> None:
    import lpips

    with warnings.catch_warnings(action="ignore"):
        package = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    found = load_file(backbone)
    package.net.load_state_dict({k: found["features." + k.split(".", 1)[1]] for k in package.net.state_dict()})
    x, y = images()
    with torch.no_grad():
        assert torch.allclose(distance(x, y), package(x, y).flatten(), rtol=1e-5)


def test_distances_are_float32_symmetric_and_zero_only_for_equal_images(distance: LPIPS) -> None:
    x, y = images(3)
    values = distance(x, y)
    assert (values.shape, values.dtype) == ((3,), torch.float32) and (values > 1e-3).all()
    assert torch.equal(distance(x, x), torch.zeros(3)) and torch.allclose(values, distance(y, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # does not lower the precision
        assert torch.equal(distance(x, y), values)
    low = distance(x.bfloat16(), y.bfloat16())
    assert low.dtype == torch.float32 and torch.equal(low, distance(x.bfloat16().float(), y.bfloat16().float()))
    parent = torch.nn.ModuleList([distance]).train()
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert not any(module.training for module in distance.modules())
    assert torch.equal(parent[0](x, y), values)  # no dropout


@pytest.mark.parametrize("argument", [0, 1])
def test_gradients_are_finite_differences(distance: LPIPS, argument: int) -> None:
    pair = list(images(1))
    leaf = pair[argument].requires_grad_()
    (gradient,) = torch.autograd.grad(distance(*pair).sum(), leaf)
    assert float(gradient.norm()) > 1e-4
    direction = gradient / gradient.norm()  # along which the slope is the gradient's length
    step = 0.005  # short: ReLUs make the distance piecewise
    ends = []
    for sign in (1, -1):
        moved = [p.detach() for p in pair]
        moved[argument] = moved[argument] + sign * step * direction
        with torch.no_grad():
            ends.append(float(distance(*moved)))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.02)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_gradients_are_finite_where_every_feature_is_zero(backbone: Path, tmp_path: Path) -> None:
    dead = {name: torch.zeros_like(tensor) for name, tensor in load_file(backbone).items()}
    save_file(dead, tmp_path / "dead.safetensors")
    x, y = images(1)
    x.requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN on the way either
        LPIPS("squeeze", tmp_path / "dead.safetensors")(x, y).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_building_is_silent_and_keeps_the_random_state(backbone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LPIPS("squeeze", backbone)
    assert torch.equal(torch.random.get_rng_state(), before) and capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:Arguments other than:UserWarning")
@pytest.mark.parametrize("net", BACKBONES)
def test_the_smallest_side_is_the_smallest_that_works(net: str) -> None:
    name, side = BACKBONES[net]
    with torch.device("meta"):
        make = getattr(pretrained_networks, "squeezenet" if net == "squeeze" else name)
        features = make(requires_grad=False, pretrained=False)
        features(torch.zeros(1, 3, side, 64))
        for shape in ((1, 3, side - 1, 64), (1, 3, 64, side - 1)):
            with pytest.raises(RuntimeError):
                features(torch.zeros(shape))


def test_small_images_and_unlike_shapes_are_refused(distance: LPIPS) -> None:
    x = torch.zeros(2, 3, 40, 40)
    for small in (x[:, :, :16], x[..., :16]):
        refused("17 px", distance, small, small)
    for a, b in ((x, x[:1]), (x[:, :1], x[:, :1])):
        rejected(r"\(b, 3, h, w\)", distance, a, b)


def test_files_that_are_no_such_backbone_are_refused_with_tensor_and_remedy(backbone: Path, tmp_path: Path) -> None:
    path, good, name = tmp_path / "features.safetensors", load_file(backbone), "features.3.squeeze.weight"
    bad = {
        "no such file": None,
        "not a safetensors file": b"no tensors here",
        f"missing: {name}": {k: v for k, v in good.items() if k != name},
        "unknown: classifier.1.weight": good | {"classifier.1.weight": torch.zeros(1)},
        f"{name} has shape": good | {name: good[name][:, :1].clone()},
        f"{name} holds values that are not finite": good | {name: good[name] * torch.inf},
    }
    for words, content in bad.items():
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            save_file(content, path)
        refused(rf"features\.safetensors: .*{words}.*--lpips-backbone.*squeezenet1_1", LPIPS, "squeeze", path)
    with pytest.raises(UserError, match="alex, squeeze, vgg"):
        LPIPS("resnet", None)  # pyright: ignore[reportArgumentType]


def test_without_a_network_the_error_says_which_file_to_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    refused(r"--lpips-backbone FILE.*torchvision\.models\.squeezenet1_1", LPIPS, "squeeze", None)
    assert capfd.readouterr().out == ""
