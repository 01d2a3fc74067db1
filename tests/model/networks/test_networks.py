"""Every backbone has the one interface: its shapes, gradients, labels, and weights of any precision."""

from typing import Any

import pytest
import torch

from latent_codec.model.codec import Codec
from latent_codec.model.config import LinearConfig
from latent_codec.model.networks import BACKBONES
from latent_codec.storage.json_config import to_json
from tests.support.errors import refused, rejected
from tests.support.networks import CONV, LITE, MLP, ONE_RESOLUTION, SMALL_LITE, config_of, make_codec, shape

EVERY_KIND = {
    "linear": LinearConfig(patch=4),
    "overlapping": LinearConfig(patch=4, overlap=2),
    "lite": LITE,
    "small lite": SMALL_LITE,
    "one resolution": ONE_RESOLUTION,
    "conv": CONV,
    "mlp": MLP,
}
every_kind = pytest.mark.parametrize("config", EVERY_KIND.values(), ids=EVERY_KIND)
conditional = pytest.mark.parametrize("config", [SMALL_LITE, CONV, MLP], ids=lambda config: config.kind)


def make(backbone: Any, *classes: str) -> Codec:
    return make_codec(config_of(backbone, classes=classes))


def test_every_registered_backbone_is_tested_here() -> None:
    assert {config.kind for config in EVERY_KIND.values()} == set(BACKBONES)


@every_kind
@pytest.mark.parametrize(("c", "z", "features", "params"), [(3, 4, 2, 1), (1, 5, 1, 2), (3, 3, 2, 6)])
def test_shapes_set_all_sizes_and_all_weights_take_part(
    config: Any, c: int, z: int, features: int, params: int
) -> None:
    network: Any = BACKBONES[config.kind](config, shape(c, z, features, params))
    f = network.factor
    found, params_found = network.encode(torch.rand(2, c, 3 * f, 2 * f)), network.decode(torch.rand(2, z, 3, 2))
    assert found.shape == (2, features * z, 3, 2) and params_found.shape == (2, params * c, 3 * f, 2 * f)
    (found.square().sum() + params_found.square().sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("config", [LinearConfig(patch=4), LITE], ids=["linear", "lite"])
def test_a_backbone_of_coarse_weights_takes_float32_images_under_autocast(config: Any) -> None:
    network: Any = BACKBONES[config.kind](config, shape())
    network.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert network.encode(torch.zeros(1, 3, 16, 16)).isfinite().all()
        assert network.decode(torch.zeros(1, 4, 2, 2)).isfinite().all()


@conditional
def test_a_class_changes_what_its_image_gives_and_no_other(config: Any) -> None:
    codec = make(config, "a", "b")
    x, z = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 16 // codec.factor, 16 // codec.factor)
    same, other = torch.tensor([1, 0]), torch.tensor([1, 1])
    for call, value in ((lambda v, y: codec.encode(v, y).mean, x), (codec.decode, z)):
        before, after = call(value, same), call(value, other)
        torch.testing.assert_close(before[0], after[0])
        assert not torch.allclose(before[1], after[1])
    for labels in (None, torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0])):
        rejected("are not one of 2 classes", codec.encode, x, labels)


@conditional
def test_without_classes_labels_change_nothing_and_the_config_names_none(config: Any) -> None:
    codec, x = make(config), torch.rand(2, 3, 16, 16)
    assert torch.equal(codec.encode(x).mean, codec.encode(x, torch.tensor([5, -1])).mean)
    assert "classes" not in to_json(codec.config) and codec.class_numbers([None, "a"]).tolist() == [0, 0]


def test_classes_are_numbered_by_name_and_strangers_refused() -> None:
    codec = make(SMALL_LITE, "b", "a")
    assert codec.class_numbers(["a", "b", "a"]).tolist() == [1, 0, 1]
    for stranger in ("c", None):
        refused("the model knows b, a", codec.class_numbers, ["a", stranger])
