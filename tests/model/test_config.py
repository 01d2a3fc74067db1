"""Configurations travel as strict, canonical JSON."""

import dataclasses
import json
import math
import subprocess
import sys
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.model import config as configs
from latent_codec.storage.json_config import dumps, from_json, to_json
from tests.support.data import ROOT
from tests.support.errors import rejected
from tests.support.networks import CONV, LITE, config_of

PLAIN = {
    int: st.integers(-(2**40), 2**40),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(max_size=3),
    type(None): st.none(),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Return any values of a type that configs use."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{f.name: values(hints[f.name]) for f in dataclasses.fields(hint)})
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return st.lists(values(args[0]), max_size=4).map(tuple)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(args)
    return st.one_of(map(values, args)) if args else PLAIN[hint]


EXAMPLE = config_of(LITE, z=16)
PART_TYPES = (configs.BackboneConfig, configs.BottleneckConfig, configs.LikelihoodConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Stands for other headers, whose types a codec's config does not have."""

    name: str
    values: tuple[float, ...]
    sigma: float | None
    bottleneck: configs.DiagonalGaussianConfig | None


def changed(path: str, value: Any) -> Any:
    """Return EXAMPLE as JSON with the value at a dotted path replaced; `...` deletes it."""
    document = place = json.loads(dumps(to_json(EXAMPLE)))
    *parents, last = path.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    if value is ...:
        del place[last]
    return document


@pytest.mark.slow
@given(st.one_of(map(values, (configs.CodecConfig, *PART_TYPES, Statistics))))
def test_json_text_round_trip_gives_the_equal_config_and_is_a_fixed_point(config: Any) -> None:
    text = dumps(to_json(config))
    found = from_json(type(config), json.loads(text))
    assert found == config and type(found) is type(config) and dumps(to_json(found)) == text
    if isinstance(config, configs.CodecConfig):
        for part in ("backbone", "bottleneck", "likelihood"):  # a union keeps the class
            assert type(getattr(found, part)) is type(getattr(config, part))


def test_equal_configs_give_equal_text_whether_a_float_was_written_as_an_integer() -> None:
    whole = configs.DiagonalGaussianConfig(logvar_min=-16, logvar_max=11)
    assert whole == EXAMPLE.bottleneck and dumps(to_json(whole)) == dumps(to_json(EXAMPLE.bottleneck))
    many = Statistics(name="", values=(1, 2), sigma=3, bottleneck=whole)
    assert dumps(to_json(many)) == dumps(to_json(from_json(Statistics, to_json(many))))


def test_a_field_at_its_default_is_left_out_so_that_older_files_keep_their_text() -> None:
    assert to_json(configs.BernoulliConfig(pixels="threshold")) == {"kind": "bernoulli"}
    assert from_json(configs.BernoulliConfig, {"kind": "bernoulli"}) == configs.BernoulliConfig(pixels="threshold")
    assert to_json(configs.BernoulliConfig(pixels="drawn")) == {"kind": "bernoulli", "pixels": "drawn"}


def test_the_overlap_keeps_the_json_key_of_the_first_files() -> None:
    config = configs.LinearConfig(patch=8, overlap=3)
    assert to_json(config) == {"kind": "linear", "patch": 8, "lap": 3}
    assert from_json(configs.LinearConfig, to_json(config)) == config
    with pytest.raises(ValueError, match=r"unknown fields \['overlap'\]; this version knows \['patch', 'lap'\]"):
        from_json(configs.LinearConfig, {"kind": "linear", "patch": 8, "overlap": 3})


PARTS = ("backbone", "bottleneck", "likelihood")
WRONG = [
    *((f"{part}surprise", 1, "surprise") for part in ("", *(f"{part}." for part in PARTS))),
    *(
        (path, ..., f"missing.*{path.split('.')[-1]}")
        for path in ("image_channels", "backbone", "backbone.decoder_depths", "likelihood.sigma")
    ),
    *(
        (f"{part}.kind", kind, rf"config\.{part}.*kind")
        for part in PARTS
        for kind in ("transformer", None, ["lite"], {"lite": 1}, ...)
    ),
    ("kind", "codec", r"unknown.*kind"),  # of a class that has none
    *(("image_channels", value, r"config\.image_channels") for value in (3.0, "3", True, None)),
    *(("backbone", value, r"config\.backbone") for value in ("lite", None)),
    *(("backbone.encoder_widths", value, r"config\.backbone\.encoder_widths") for value in (64, "64", {"0": 64})),
    ("backbone.encoder_widths", [64, "128"], r"config\.backbone\.encoder_widths\[1\]"),
    *(("bottleneck.logvar_min", value, r"config\.bottleneck\.logvar_min") for value in ("-16", None, True, [11.0])),
    *(("likelihood.scale", value, r"config\.likelihood\.scale") for value in ("free", ["fixed"])),
    *(("likelihood.sigma", value, r"likelihood\.sigma") for value in (math.nan, -math.inf, math.inf, 10**400)),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG, ids=lambda value: str(value)[:20])
def test_anything_else_is_an_error_that_names_the_field(path: str, value: Any, message: str) -> None:
    rejected(message, from_json, configs.CodecConfig, changed(path, value))


def test_a_boolean_field_takes_no_integer() -> None:
    rejected("quant_conv", from_json, configs.ConvConfig, to_json(CONV) | {"quant_conv": 1})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "patch", "x"]), inner),
    max_leaves=6,
)
paths = st.sampled_from(["image_channels", "backbone", "backbone.kind", "backbone.encoder_widths", "likelihood.sigma"])


@given(paths, json_values)
def test_whatever_a_file_holds_the_result_is_a_config_or_a_value_error(path: str, value: Any) -> None:
    document = changed(path, value)
    try:
        config = from_json(configs.CodecConfig, document)
    except ValueError:
        return
    assert from_json(configs.CodecConfig, to_json(config)) == config


def test_dumps_sorts_keys_spends_no_spaces_and_refuses_what_is_not_json() -> None:
    assert dumps({"b": [1, 2], "a": {"y": 1.5, "x": None}}) == '{"a":{"x":null,"y":1.5},"b":[1,2]}'
    rejected("JSON", dumps, {"a": float("nan")})


def test_the_module_imports_without_torch() -> None:
    code = "import sys, latent_codec.model.config; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
