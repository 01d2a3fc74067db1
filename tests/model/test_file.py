"""Model files: what is written comes back, and anything else is refused by name."""

import dataclasses
import json
import math
import pickle
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from latent_codec.errors import UserError
from latent_codec.model import file
from latent_codec.model.codec import Codec
from latent_codec.model.file import model_id
from latent_codec.prior.priors import PREFIX, to_tensors
from latent_codec.storage.json_config import dumps
from latent_codec.storage.tensors import KEY
from tests.support.errors import refused

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

    def __call__(self, *, tensors: dict[str, torch.Tensor] | None = None, text: str | None = None) -> str:
        metadata = {KEY: dumps(self.header) if text is None else text}
        save_file(self.tensors if tensors is None else tensors, self.path, metadata=metadata)
        return refusal(self.path)


@pytest.fixture
def rewrite(model_file: Path, tmp_path: Path) -> Rewrite:
    return Rewrite(model_file, tmp_path / "m.safetensors")


@pytest.mark.parametrize("half", [False, True])
def test_what_is_written_is_what_is_read(codec: Codec, tmp_path: Path, half: bool) -> None:
    path = tmp_path / "m.safetensors"
    codec.save(path, half=half)
    found = file.read(path)
    assert found.config == codec.config and found.statistics == codec.statistics
    assert found.provenance == codec.provenance and found.tensors.keys() == codec.state_dict().keys()
    for name, tensor in codec.state_dict().items():
        assert found.tensors[name].dtype == torch.float32
        assert torch.equal(found.tensors[name], tensor.half().float() if half else tensor)
    stored = {name: tensor.dtype for name, tensor in load_file(path).items()}
    assert {stored[name] for name in codec.state_dict()} == {torch.float16 if half else torch.float32}
    assert codec.priors is not None and found.priors is not None
    after = to_tensors(found.priors)
    assert after.keys() == to_tensors(codec.priors).keys() == stored.keys() - codec.state_dict().keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in to_tensors(codec.priors).items())


@pytest.mark.usefixtures("umask_027")
def test_statistics_come_back_without_what_is_unknown_and_files_have_the_umask(codec: Codec, tmp_path: Path) -> None:
    assert codec.statistics is not None
    for statistics in (dataclasses.replace(codec.statistics, posterior_std=None), None):
        codec.statistics = statistics
        codec.save(tmp_path / "m.safetensors")
        assert file.read(tmp_path / "m.safetensors").statistics == statistics
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o640


def test_the_id_counts_values_not_the_width_they_are_stored_in(codec: Codec, tmp_path: Path) -> None:
    codec.save(tmp_path / "half.safetensors", half=True)
    half = Codec.load(tmp_path / "half.safetensors")
    half.save(tmp_path / "wide.safetensors")
    half.save(tmp_path / "half again.safetensors", half=True)
    again = (Codec.load(tmp_path / f"{name}.safetensors").model_id for name in ("wide", "half again"))
    assert {half.model_id, *again} == {half.model_id}
    assert half.model_id != codec.model_id  # rounding changed the values


def test_the_id_depends_on_the_config_and_on_names_shapes_and_values_of_tensors_alone(codec: Codec) -> None:
    state, ids = codec.state_dict(), {codec.model_id}
    codec.statistics, codec.provenance = None, {"other": 1}
    ids.add(model_id(codec.config, dict(reversed(state.items()))))
    ids.add(codec.to(memory_format=torch.channels_last).model_id)
    assert len(ids) == 1
    for name, tensor in state.items():
        for place in (0, -1):
            changed = tensor.clone()
            changed.view(-1)[place] += 1e-3
            ids.add(model_id(codec.config, state | {name: changed}))
    zeros = [{"a": torch.zeros(2, 3)}, {"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(6)}]
    ids |= {model_id(codec.config, tensors) for tensors in zeros}
    ids.add(model_id(dataclasses.replace(codec.config, classes=("a",)), state))
    assert len(ids) == 1 + 2 * len(state) + len(zeros) + 1


@pytest.mark.slow
def test_a_missing_extra_or_misshaped_tensor_is_refused_by_name(rewrite: Rewrite) -> None:
    assert "unknown: stranger" in rewrite(tensors=rewrite.tensors | {"stranger": torch.zeros(1)})
    kinds = {re.sub(r"\d+", "", name): name for name in rewrite.tensors if name.startswith(PREFIX)}
    for name in kinds.values():  # one of each layer's
        assert name in rewrite(tensors={n: t for n, t in rewrite.tensors.items() if n != name})
        rewrite(tensors=rewrite.tensors | {name: rewrite.tensors[name][None].contiguous()})
    del rewrite.header["priors"]
    own = {name: tensor for name, tensor in rewrite.tensors.items() if not name.startswith(PREFIX)}
    for name, tensor in own.items():
        sentence = rewrite(tensors={n: t for n, t in own.items() if n != name})
        assert name in sentence and "missing" in sentence
        sentence = rewrite(tensors=own | {name: tensor[None].contiguous()})
        assert name in sentence and str(tuple(tensor.shape)) in sentence


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_that_is_not_finite_is_refused_by_name(rewrite: Rewrite, value: float, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in rewrite.tensors.items()}
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = value
    sentence = rewrite(tensors=tensors)
    assert name in sentence and "not finite" in sentence


def test_values_that_cannot_be_stored_are_refused_by_name_and_leave_the_old_file(codec: Codec, tmp_path: Path) -> None:
    path, bias = tmp_path / "m.safetensors", codec.state_dict()["backbone.linear.encoder.bias"]
    bias[0] = HALF_MAX
    codec.save(path, half=True)
    before = path.read_bytes()
    for value, half, message in ((HALF_MAX + 16, True, r"exceeds .*65504.*--half"), (math.nan, False, "not finite")):
        bias[0] = value
        refused(rf"backbone\.linear\.encoder\.bias.*{message}", codec.save, path, half=half)
        assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == before
    bias[0] = HALF_MAX + 16
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
    """Makes a file when it is unpickled."""

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
    assert "not a safetensors file" in refusal(path) and not trace.exists()


def test_a_file_cut_off_anywhere_or_with_trailing_bytes_is_refused(model_file: Path, tmp_path: Path) -> None:
    data, path = model_file.read_bytes(), tmp_path / "m.safetensors"
    begin = 8 + int.from_bytes(data[:8], "little")  # where the tensors' bytes begin
    for size in (0, 1, 7, 8, 9, begin // 2, begin - 1, begin, begin + 1, (begin + len(data)) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert "not a safetensors file" in refusal(path)
    path.write_bytes(data + b"\0")
    assert "not a safetensors file" in refusal(path)


def test_what_is_no_model_file_of_ours_is_refused(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", metadata=metadata)
        assert "not written by latent_codec" in refusal(tmp_path / "m.safetensors")
    for path in (tmp_path / "none.safetensors", tmp_path):
        refused("no such model file", file.read, path)


@pytest.mark.parametrize("text", ["{", "", "[]", "null", '"config"', "[" * 100_000, '{"format_version":1}', "{}"])
def test_a_header_that_is_no_json_object_of_ours_is_refused(rewrite: Rewrite, text: str) -> None:
    sentence = rewrite(text=text)
    assert "damaged" in sentence or "format version None" in sentence


FIVE = dict.fromkeys(("mean", "std", "posterior_std"), [1.0] * 5)
NARROW = {"encoder_widths": [], "encoder_depths": []}
REFUSED = {
    **{f"version {v!r}": ("format_version", v, f"format version {v}") for v in (2, 0, None, "1")},
    **{f"no {field}": (field, ..., f"'{field}' is missing") for field in ("config", "statistics", "provenance")},
    "statistics of too many channels": ("statistics", FIVE, "statistics are of 5 channels, latents of 4"),
    "statistics of unequal lengths": ("statistics", {"mean": [0.0] * 3}, "one value for each channel"),
    "an infinite provenance": ("provenance", {"loss": math.inf}, "Infinity is no number"),
    "a deviation that float32 makes 0": ("statistics", {"std": [1.0, 1.0, 1e-60, 1.0]}, "must be positive"),
    "a mean that float32 makes infinite": ("statistics", {"mean": [0.0, 0.0, 1e60, 0.0]}, "must be finite"),
    "a standard deviation of 0": ("statistics", {"std": [1.0, 1.0, 0.0, 1.0]}, "must be positive"),
    "a posterior's of 0": ("statistics", {"posterior_std": [0.0] * 4}, "must be positive"),
    "statistics that are NaN": ("statistics", {"std": [1.0, 1.0, math.nan, 1.0]}, "damaged"),
    "statistics of words": ("statistics", {"mean": ["a", "b", "c", "d"]}, "damaged"),
    "a provenance that is no object": ("provenance", [1], "provenance"),
    "an unknown field": ("config", {"novelty": 1}, "novelty"),
    "a patch of 0": ("backbone", {"patch": 0, "stem": 0}, "no model"),
    "a stem of 1": ("backbone", {"stem": 1}, "no model"),
    "no widths": ("backbone", NARROW, "no model"),
    "a negative width": ("backbone", {"decoder_widths": [8, -8]}, "no model"),
    "a depth that the file has no tensors for": ("backbone", {"encoder_depths": [1, 10**9]}, "encoder_depths is 10"),
    "channels that the file has no numbers for": ("config", {"image_channels": 10**9}, "image_channels is 10"),
    "a width that no memory holds": ("backbone", {"decoder_widths": [8, 2**40]}, "no model"),
}


@pytest.mark.parametrize(("field", "value", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_header_that_makes_no_model_is_refused(rewrite: Rewrite, field: str, value: Any, reason: str) -> None:
    """An object's fields are changed, any other value is replaced, and `...` deletes it."""
    found = rewrite.header["config"] if field == "backbone" else rewrite.header
    found[field] = found[field] | value if isinstance(value, dict) else value
    if value is ...:
        del found[field]
    assert reason in rewrite(text=json.dumps(rewrite.header))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn])
def test_weights_of_other_types_are_refused(model_file: Path, tmp_path: Path, kind: torch.dtype) -> None:
    with safe_open(model_file, framework="pt") as found:
        tensors, metadata = {name: found.get_tensor(name) for name in found.keys()}, found.metadata()  # noqa: SIM118
    name = next(name for name in tensors if name.startswith("backbone."))
    save_file(
        tensors | {name: torch.zeros(tensors[name].shape).to(kind)}, tmp_path / "m.safetensors", metadata=metadata
    )
    assert f"tensor {name} has the type" in refusal(tmp_path / "m.safetensors")
