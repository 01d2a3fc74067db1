"""Model files: what is written comes back, and anything else is refused by name."""

import dataclasses
import json
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from latent_codec.errors import UserError
from latent_codec.model import file
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig
from latent_codec.model.file import LatentStatistics, model_id
from latent_codec.prior.priors import PREFIX, to_tensors
from latent_codec.storage.json_config import dumps, from_json, to_json
from latent_codec.storage.tensors import KEY

HALF_MAX = 65504


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()[KEY])


def refusal(path: Path) -> str:
    """Return the one sentence that says why the file cannot be loaded."""
    with pytest.raises(UserError) as caught:
        Codec.load(path)
    sentence = str(caught.value)
    assert sentence.startswith(str(path)) and len(sentence.splitlines()) == 1
    return sentence


class Rewrite:
    """Writes the tiny model's file with other tensors or another header, and returns why it cannot be loaded."""

    def __init__(self, source: Path, path: Path) -> None:
        self.path, self.tensors, self.header = path, load_file(source), header(source)

    def tensors_refused(self, tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, self.path, metadata={KEY: dumps(self.header)})
        return refusal(self.path)

    def header_refused(self, **changes: Any) -> str:
        """Refuse a header with other fields; `...` deletes one."""
        return self.text_refused(json.dumps({k: v for k, v in (self.header | changes).items() if v is not ...}))

    def text_refused(self, text: str) -> str:
        save_file(self.tensors, self.path, metadata={KEY: text})
        return refusal(self.path)


@pytest.fixture
def rewrite(model_file: Path, tmp_path: Path) -> Rewrite:
    return Rewrite(model_file, tmp_path / "m.safetensors")


@pytest.mark.parametrize("half", [False, True])
def test_what_is_written_is_what_is_read(codec: Codec, tmp_path: Path, half: bool) -> None:
    path = tmp_path / "m.safetensors"
    codec.save(path, half=half)
    found = file.read(path)
    assert found.config == codec.config
    assert found.statistics == codec.statistics
    assert found.provenance == codec.provenance
    assert found.tensors.keys() == codec.state_dict().keys()
    for name, tensor in codec.state_dict().items():
        assert found.tensors[name].dtype == torch.float32
        assert torch.equal(found.tensors[name], tensor.half().float() if half else tensor)
    stored = {name: tensor.dtype for name, tensor in load_file(path).items()}
    assert {stored[name] for name in codec.state_dict()} == {torch.float16 if half else torch.float32}
    assert codec.priors is not None and found.priors is not None
    after = to_tensors(found.priors)
    assert after.keys() == to_tensors(codec.priors).keys() == stored.keys() - codec.state_dict().keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in to_tensors(codec.priors).items())


def test_statistics_come_back_without_what_is_not_known(codec: Codec, tmp_path: Path) -> None:
    assert codec.statistics is not None
    for statistics in (dataclasses.replace(codec.statistics, posterior_std=None), None):
        codec.statistics = statistics
        codec.save(tmp_path / "m.safetensors")
        assert file.read(tmp_path / "m.safetensors").statistics == statistics


@pytest.mark.usefixtures("umask_027")
def test_a_model_file_has_the_users_umask(codec: Codec, tmp_path: Path) -> None:
    codec.save(tmp_path / "m.safetensors")
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o640


def test_the_id_counts_values_not_the_width_they_are_stored_in(codec: Codec, tmp_path: Path) -> None:
    codec.save(tmp_path / "half.safetensors", half=True)
    half = Codec.load(tmp_path / "half.safetensors")
    half.save(tmp_path / "wide.safetensors")
    half.save(tmp_path / "half again.safetensors", half=True)
    again = (Codec.load(tmp_path / f"{name}.safetensors").model_id for name in ("wide", "half again"))
    assert {half.model_id, *again} == {half.model_id}
    assert half.model_id != codec.model_id  # rounding changed the values


def test_the_id_does_not_depend_on_order_memory_format_statistics_or_provenance(codec: Codec, tmp_path: Path) -> None:
    expected = codec.model_id
    backwards = dict(reversed(codec.state_dict().items()))
    codec.statistics, codec.provenance = None, {"other": 1}
    assert model_id(codec.config, backwards) == codec.to(memory_format=torch.channels_last).model_id == expected


def test_the_id_changes_with_any_tensors_value(codec: Codec) -> None:
    state = codec.state_dict()
    ids = {codec.model_id}
    for name, tensor in state.items():
        for place in (0, -1):
            changed = tensor.clone()
            changed.view(-1)[place] += 1e-3
            ids.add(model_id(codec.config, state | {name: changed}))
    assert len(ids) == 1 + 2 * len(state)


def test_the_id_changes_with_a_tensors_name_or_shape(codec: Codec) -> None:
    zeros = [{"a": torch.zeros(2, 3)}, {"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(6)}]
    assert len({model_id(codec.config, tensors) for tensors in zeros}) == 4


def other_values(value: Any) -> Iterator[Any]:
    """Yield copies of a config's JSON with one leaf changed."""
    if isinstance(value, dict):
        for key in value.keys() - {"kind"}:
            for other in other_values(value[key]):
                yield value | {key: other}
    elif isinstance(value, list):
        yield [*value, 1]
        for i, item in enumerate(value):
            for other in other_values(item):
                yield [*value[:i], other, *value[i + 1 :]]
    else:
        yield "learned" if value == "fixed" else value + 1


def test_the_id_changes_with_any_config_field(codec: Codec) -> None:
    others = [from_json(CodecConfig, value) for value in other_values(to_json(codec.config))]
    assert len(others) > 15
    tensors = {"a": torch.zeros(1)}
    assert len({model_id(config, tensors) for config in (codec.config, *others)}) == 1 + len(others)


def test_a_missing_extra_or_misshaped_tensor_is_refused_by_name(rewrite: Rewrite) -> None:
    tensors = rewrite.tensors
    assert "unknown: stranger" in rewrite.tensors_refused(tensors | {"stranger": torch.zeros(1)})
    of_prior = [name for name in sorted(tensors) if name.startswith(PREFIX)]
    for name in [*(tensors.keys() - of_prior), *of_prior]:
        sentence = rewrite.tensors_refused({n: t for n, t in tensors.items() if n != name})
        assert name in sentence and "missing" in sentence
        sentence = rewrite.tensors_refused(tensors | {name: tensors[name][None].contiguous()})
        if name not in of_prior:  # of a prior's tensors the reason says what does not fit
            assert name in sentence and str(tuple(tensors[name].shape)) in sentence


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_that_is_not_finite_is_refused_by_name(rewrite: Rewrite, value: float, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in rewrite.tensors.items()}
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = value
    sentence = rewrite.tensors_refused(tensors)
    assert name in sentence and "not finite" in sentence


def test_a_tensor_that_is_not_finite_is_not_written(codec: Codec, tmp_path: Path) -> None:
    codec.state_dict()["backbone.linear.encoder.bias"][0] = float("nan")
    with pytest.raises(UserError, match=r"backbone\.linear\.encoder\.bias.*not finite"):
        codec.save(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_overflow_of_half_is_refused_by_name_and_leaves_the_old_file(codec: Codec, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    bias = codec.state_dict()["backbone.linear.encoder.bias"]
    bias[0] = HALF_MAX
    codec.save(path, half=True)
    before = path.read_bytes()
    bias[0] = HALF_MAX + 16
    with pytest.raises(UserError, match=r"backbone\.linear\.encoder\.bias exceeds .*65504.*--half"):
        codec.save(path, half=True)
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == before
    codec.save(path)
    assert Codec.load(path).state_dict()["backbone.linear.encoder.bias"][0] == HALF_MAX + 16


def test_trouble_while_writing_is_an_os_error(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("latent_codec.storage.tensors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        codec.save(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


class _Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_and_never_unpickled(tmp_path: Path, name: str, zipped: bool) -> None:
    path, trace = tmp_path / name, tmp_path / "it was unpickled"
    torch.save({"a": _Bomb(trace)}, path, _use_new_zipfile_serialization=zipped)
    assert "not a safetensors file" in refusal(path)
    path.write_bytes(pickle.dumps(_Bomb(trace)))
    assert "not a safetensors file" in refusal(path)
    assert not trace.exists()


def test_a_file_cut_off_anywhere_is_refused(model_file: Path, tmp_path: Path) -> None:
    data, path = model_file.read_bytes(), tmp_path / "m.safetensors"
    begin = 8 + int.from_bytes(data[:8], "little")  # where the tensors' bytes begin
    for size in (0, 1, 7, 8, 9, begin // 2, begin - 1, begin, begin + 1, (begin + len(data)) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert "not a safetensors file" in refusal(path)


def test_trailing_bytes_are_refused(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(model_file.read_bytes() + b"\0")
    assert "not a safetensors file" in refusal(tmp_path / "m.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_others_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", metadata=metadata)
    assert "not written by latent_codec" in refusal(tmp_path / "m.safetensors")


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_another_format_version_is_refused(rewrite: Rewrite, version: object) -> None:
    assert f"format version {version}" in rewrite.header_refused(format_version=version)


@pytest.mark.parametrize("text", ["{", "", "[]", "null", '"config"', "[" * 100_000, '{"format_version":1}', "{}"])
def test_a_header_that_is_no_json_object_of_ours_is_refused(rewrite: Rewrite, text: str) -> None:
    sentence = rewrite.text_refused(text)
    assert "damaged" in sentence or "format version None" in sentence


@pytest.mark.parametrize("field", ["config", "statistics", "provenance"])
def test_a_missing_header_field_is_refused_by_name(rewrite: Rewrite, field: str) -> None:
    assert f"'{field}' is missing" in rewrite.header_refused(**{field: ...})


STATISTICS = {
    "of too many channels": {"mean": [0.0] * 5, "std": [1.0] * 5, "posterior_std": [1.0] * 5},
    "of unequal lengths": {"mean": [0.0] * 3},
    "with a standard deviation of 0": {"std": [1.0, 1.0, 0.0, 1.0]},
    "that are NaN": {"std": [1.0, 1.0, float("nan"), 1.0]},
    "of words": {"mean": ["a", "b", "c", "d"]},
}


@pytest.mark.parametrize("change", STATISTICS.values(), ids=STATISTICS)
def test_statistics_that_cannot_scale_the_latents_are_refused(rewrite: Rewrite, change: dict[str, Any]) -> None:
    assert "damaged" in rewrite.header_refused(statistics=rewrite.header["statistics"] | change)


def test_a_provenance_that_is_no_object_and_an_unknown_config_field_are_refused_by_name(rewrite: Rewrite) -> None:
    assert "provenance" in rewrite.header_refused(provenance=[1])
    assert "novelty" in rewrite.header_refused(config=rewrite.header["config"] | {"novelty": 1})


CONFIGS = {
    "a patch of 0": {"patch": 0, "stem": 0},
    "a stem of 1": {"stem": 1},
    "no widths": {"encoder_widths": [], "encoder_depths": []},
    "a negative width": {"decoder_widths": [8, -8]},
    "a width that no memory holds": {"decoder_widths": [8, 2**40]},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_makes_no_model_is_refused(rewrite: Rewrite, change: dict[str, Any]) -> None:
    config = rewrite.header["config"]
    rewrite.header_refused(config=config | {"backbone": config["backbone"] | change})


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="no such model file"):
            file.read(path)


def test_statistics_need_one_positive_value_per_channel() -> None:
    good = LatentStatistics(source="s", images=1, mean=(0.0,), std=(1.0,), posterior_std=(1.0,))
    assert dataclasses.replace(good, posterior_std=None).posterior_std is None
    for change in ({"mean": (0.0, 0.0)}, {"std": ()}, {"std": (-1.0,)}, {"posterior_std": (0.0,)}):
        with pytest.raises(ValueError, match="std"):
            dataclasses.replace(good, **change)
