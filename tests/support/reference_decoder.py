"""Decode `.lc` streams a second time: slowly, plainly, and as docs/bitstream.md alone says.

This imports nothing of latent_codec, torch or constriction, so that it shares none of their mistakes.
"""

import hashlib
import itertools
import json
import math
import struct
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

Array = np.ndarray
START = (1 << 32) + 0x4C430D0A
GOLDEN = 0x9E3779B97F4A7C15
WORD = 2**64 - 1


class RefusalError(Exception):
    """Refuses what is not a sound stream of this model."""


def refuse_if(wrong: object, reason: str) -> None:
    if wrong:
        raise RefusalError(reason)


class Header(NamedTuple):
    version: int
    stream_id: bytes
    width: int
    height: int
    orientation: int
    flags: int
    background: bytes
    step: int
    seed: int | None


class Model(NamedTuple):
    config: dict[str, Any]
    priors: dict[str, Any]
    tensors: dict[str, Array]
    model_id: str

    @property
    def factor(self) -> int:
        backbone = self.config["backbone"]
        return backbone["patch"] if "patch" in backbone else 2 ** (len(backbone["widths"]) - 1)

    @property
    def codes(self) -> int | None:
        """Return the size of the codebook, if there is one."""
        bottleneck = self.config["bottleneck"]
        return {"vq": bottleneck.get("codes"), "fsq": math.prod(bottleneck.get("levels", []))}.get(bottleneck["kind"])

    @property
    def centred(self) -> bool:
        """Return whether the context prior is centred."""
        return self.priors["context"].get("centred", False)

    @property
    def levels(self) -> list[int]:
        """Return the level of each group of the context prior."""
        found = list(self.priors["context"].get("levels", []))
        return found + [0] * (len(self.priors["context"]["groups"]) - len(found))

    @property
    def version(self) -> int:
        """Return the format version of streams under the context prior."""
        return 4 if self.nested else 3 if any(self.levels) else 2 if self.centred else 1

    @property
    def nested(self) -> bool:
        """Return whether a stream may hold the first groups alone."""
        return self.priors["context"].get("nested", False)

    def tables(self, kind: str) -> "Tables":
        return Tables(*(self.tensors[f"prior.{kind}.{name}"] for name in ("counts", "sizes", "first")))

    def stream_id(self, kind: str) -> bytes:
        digest = hashlib.sha256(self.model_id.encode())
        for name in sorted(self.tensors):
            if name == "prior.base" or name.startswith(f"prior.{kind}."):
                digest.update(_label(name, self.tensors[name]) + self.tensors[name].tobytes())
        return digest.digest()[:8]


def _label(name: str, tensor: Array) -> bytes:
    return f'["{name}",[{",".join(str(n) for n in tensor.shape)}]]'.encode()


def read_model(path: Path) -> Model:
    with safe_open(path, "numpy") as file:
        text = file.metadata()["latent_codec"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle is no mapping)
    about = json.loads(text)
    config = json.dumps(about["config"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert f'"config":{config},' in text  # just as it stands in the file
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        if not name.startswith("prior."):
            digest.update(_label(name, tensors[name]) + tensors[name].astype("<f4").tobytes())
    return Model(about["config"], about["priors"], tensors, digest.hexdigest())


def read_stream(data: bytes, max_pixels: int = 2**27) -> tuple[Header, bytes]:
    magic = b"\x89LC\r\n\x1a\n"
    refuse_if(not data or data[:7] != magic[: len(data)], "magic")
    refuse_if(len(data) < 47, "cut header")
    fields = struct.unpack("<7sB8sIIBB3sHQI", data[:43])
    _, version, stream_id, width, height, orientation, flags, background, step, seed, length = fields
    payload, crcs = data[47 : 47 + length], (data[43:47], data[47 + length :])
    refuse_if(crcs[0] != struct.pack("<I", zlib.crc32(data[:43])), "header checksum")
    refuse_if(version not in (1, 2, 3, 4), "version")
    refuse_if(width * height > max_pixels, "pixels")
    refuse_if(len(data) != 51 + length, "length")
    refuse_if(crcs[1] != struct.pack("<I", zlib.crc32(payload)), "payload checksum")
    refuse_if(
        (flags > 15 and version < 4) or (seed and not flags & 4) or (any(background) and not flags & 2) or step < 16,
        "values",
    )
    refuse_if(not width or not height or not 1 <= orientation <= 8, "geometry")
    seed = seed if flags & 4 else None
    return Header(version, stream_id, width, height, orientation, flags, background, step, seed), payload


class Ans:
    """The state of the entropy decoder."""

    def __init__(self, payload: bytes) -> None:
        refuse_if(len(payload) % 4 or len(payload) < 8, "words")
        self.words = list(struct.unpack(f"<{len(payload) // 4}I", payload))
        refuse_if(not self.words[-1], "last word")
        self.x = self.words.pop() << 32 | self.words.pop()

    def symbol(self, cumulative: list[int]) -> int:
        """Return the next symbol under a table given by the sums of its frequencies, from 0 to 2^24."""
        q = self.x & 0xFFFFFF
        s = bisect_right(cumulative, q) - 1
        self.x = (self.x >> 24) * (cumulative[s + 1] - cumulative[s]) + q - cumulative[s]
        if self.x < 2**32:
            refuse_if(not self.words, "ran out")
            self.x = self.x << 32 | self.words.pop()
        return s

    def finish(self) -> None:
        refuse_if(self.words or self.x != START, "end state")


class Writer:
    """The state of the entropy encoder."""

    def __init__(self) -> None:
        self.x, self.words = START, []

    def symbol(self, cumulative: list[int], s: int) -> None:
        frequency = cumulative[s + 1] - cumulative[s]
        if self.x >= frequency << 40:
            self.words.append(self.x & 0xFFFFFFFF)
            self.x >>= 32
        self.x = (self.x // frequency << 24) + cumulative[s] + self.x % frequency

    def payload(self) -> bytes:
        words = [*self.words, self.x & 0xFFFFFFFF, self.x >> 32]
        return struct.pack(f"<{len(words)}I", *words)


UNIFORM = list(range(0, 2**24 + 1, 256))


class Tables:
    def __init__(self, counts: Array, sizes: Array, first: Array) -> None:
        parts = np.split(counts.astype(np.int64), np.cumsum(sizes)[:-1])
        self.cumulative = [[0, *np.cumsum(part).tolist()] for part in parts]
        self.first = [int(n) for n in first]

    def read(self, ans: Ans, tables: list[int]) -> list[int]:
        """Return the coded integers of a pass, given the table of each position in the pass' own order."""
        values: list[int | None] = [None] * len(tables)
        for _, i in sorted((table, i) for i, table in enumerate(tables)):
            cumulative = self.cumulative[tables[i]]
            s = ans.symbol(cumulative)
            if s < len(cumulative) - 2:  # else it is the escape
                values[i] = self.first[tables[i]] + s
        return [self._escaped(ans, t) if value is None else value for t, value in zip(tables, values, strict=True)]

    def _escaped(self, ans: Ans, table: int) -> int:
        value = ans.symbol(UNIFORM) - 2**15
        refuse_if(0 <= value - self.first[table] < len(self.cumulative[table]) - 2, "escape")
        return value

    def write(self, writer: Writer, values: list[int], tables: list[int]) -> None:
        """Invert `read`; an encoder takes the passes backwards."""
        order = [i for _, i in sorted((table, i) for i, table in enumerate(tables))]
        symbols = [v - self.first[t] for v, t in zip(values, tables, strict=True)]
        escapes = [len(self.cumulative[t]) - 2 for t in tables]
        symbols = [s if 0 <= s < e else e for s, e in zip(symbols, escapes, strict=True)]
        for i in reversed(range(len(tables))):
            if symbols[i] == escapes[i]:
                writer.symbol(UNIFORM, values[i] + 2**15)
        for i in reversed(order):
            writer.symbol(self.cumulative[tables[i]], symbols[i])


def octave(step: int) -> int:
    return ((step**16).bit_length() - 160) // 2


def mix(x: int) -> int:
    x = (x + GOLDEN) & WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def dither(seed: int | None, shape: tuple[int, int, int]) -> Array:
    if seed is None:
        return np.zeros(shape, np.int64)
    k = mix(mix(mix(seed)))
    values = [2 * (mix((k + i * GOLDEN) & WORD) >> 48) + 1 - 2**16 for i in range(math.prod(shape))]
    return np.array(values, np.int64).reshape(shape)


class Decoded(NamedTuple):
    values: Array  # (z, h, w) int64, the nearest whole steps
    latents: Array  # (z, h, w) float32


def decode(data: bytes, model: Model, max_pixels: int = 2**27) -> Decoded:
    """Decode a stream; raise `RefusalError` for what no decoder may accept."""
    header, payload = read_stream(data, max_pixels)
    kind = "context" if header.flags & 8 else "factorized"
    refuse_if(kind == "context" and model.priors["context"] is None, "no such prior")
    refuse_if(header.stream_id != model.stream_id(kind), "stream id")
    refuse_if(header.version != (model.version if kind == "context" else 1), "another version")
    refuse_if(model.codes is not None and (header.step != 1024 or header.seed is not None), "no step")
    channels = all_channels = model.config["latent_channels"] if model.codes is None else 1
    if header.version == 4:
        groups = model.priors["context"]["groups"]
        refuse_if(header.flags >> 4 > len(groups), "groups")
        channels = sum(groups[: header.flags >> 4])
    shape = channels, -(-header.height // model.factor), -(-header.width // model.factor)
    refuse_if(math.prod(shape) * -math.log2(1 - 2**-10) > 8 * len(payload), "too short")
    ans, tables = Ans(payload), model.tables(kind)
    if model.codes is not None:
        return _indices(ans, tables, model, shape)
    fine = _context(ans, tables, model, header, shape) if kind == "context" else _factorized(ans, tables, header, shape)
    ans.finish()
    fine = np.concatenate([fine, np.zeros((all_channels - channels, *shape[1:]), np.int64)])
    values = (fine + 2**16) // 2**17
    refuse_if(np.abs(values).max() > 16383, "magnitude")
    size = model.tensors["prior.base"].astype(np.float64) * header.step
    return Decoded(values, (fine.astype(np.float64) * size[:, None, None] * 2.0**-27).astype(np.float32))


def _indices(ans: Ans, tables: Tables, model: Model, shape: tuple[int, int, int]) -> Decoded:
    values = np.array(tables.read(ans, [0] * math.prod(shape)), np.int64).reshape(shape)
    ans.finish()
    refuse_if(values.min() < 0 or values.max() >= model.codes, "no such code")
    if model.config["bottleneck"]["kind"] == "vq":
        return Decoded(values, model.tensors["bottleneck.codebook"][values[0]].transpose(2, 0, 1).astype(np.float32))
    latents, rest = [], values[0]
    for levels in model.config["bottleneck"]["levels"]:
        latents.append(((2 * (rest % levels) - (levels - 1)) / (levels - 1)).astype(np.float32))
        rest = rest // levels
    return Decoded(values, np.stack(latents))


def _factorized(ans: Ans, tables: Tables, header: Header, shape: tuple[int, int, int]) -> Array:
    z, h, w = shape
    level = (min(max(octave(header.step), -16), 40) + 16) // 2
    found = tables.read(ans, [level * z + c for c in range(z) for _ in range(h * w)])
    return np.array(found, np.int64).reshape(shape) * 2**17 + dither(header.seed, shape)


def _context(ans: Ans, tables: Tables, model: Model, header: Header, shape: tuple[int, int, int]) -> Array:
    d, fine = dither(header.seed, shape), np.zeros(shape, np.int64)
    for number, (group, _, _) in enumerate(passes(model)):
        if sum(model.priors["context"]["groups"][:group]) >= len(fine):
            break
        predicted = predict(model, number, fine, d, header.step, header.seed is not None)
        for p, rest in zip(predicted, tables.read(ans, [p.table for p in predicted]), strict=True):
            fine[p.place] = (p.centre + rest) * 2**17 + p.offset
    return fine


class Prediction(NamedTuple):
    place: tuple[int, int, int]  # channel, row, column
    offset: int
    centre: int
    table: int


def passes(model: Model) -> list[tuple[int, int, str]]:
    """Return the group, stride and kind of each pass."""
    found: list[tuple[int, int, str]] = []
    for group, level in enumerate(model.levels):
        if level:
            found.append((group, 2**level, "whole"))
            for k in range(level - 1, -1, -1):
                found += [(group, 2**k, "centres"), (group, 2**k, "odd")]
        else:
            found += [(group, 1, "even"), (group, 1, "odd")]
    return found


def belongs(kind: str, y: int, x: int) -> bool:
    """Return whether a pass decodes the position at row y and column x of its grid."""
    return {"whole": True, "centres": y % 2 == x % 2 == 1, "even": (y + x) % 2 == 0, "odd": (y + x) % 2 == 1}[kind]


def predict(model: Model, number: int, fine: Array, d: Array, step: int, dithered: bool) -> list[Prediction]:
    """Predict the values of a pass; `fine` is 0 where nothing is decoded yet, `d` all 0 without dither."""
    order, gain, width_offset = (
        [int(n) for n in model.tensors[f"prior.context.{name}"]] for name in ("order", "gain", "width_offset")
    )
    groups, (group, stride, kind) = model.priors["context"]["groups"], passes(model)[number]
    start = sum(groups[:group])
    stop = start + groups[group]
    seen = 1 if group else stride
    channels = order[: stop if kind in ("odd", "centres") else start]
    outputs = network(model, number, inputs(channels, fine[:, ::seen, ::seen], gain, step, dithered))
    found: list[Prediction] = []
    for j, row, column in itertools.product(range(stop - start), *map(range, fine.shape[1:])):
        if row % stride == column % stride == 0 and belongs(kind, row // stride, column // stride):
            c = order[start + j]
            scale = step * gain[c]
            located, wide = (int(outputs[k, row // seen, column // seen]) for k in (j, stop - start + j))
            eighths = (located * 2**36 - 8 * int(d[c, row, column]) * scale + scale * 2**16) // (scale * 2**17)
            eighths, offset = min(max(eighths, -131064), 131064), int(d[c, row, column])
            if model.centred and not dithered:
                eighths, offset = 0, eighths * 2**14
            centre = (eighths + 4) >> 3
            i = min(max(wide - octave(step) + width_offset[c], 0), 88)
            table = 8 * i + eighths - 8 * centre + 4 if i < 56 else i + 392
            found.append(Prediction((c, row, column), offset, centre, table))
    return found


def inputs(channels: list[int], fine: Array, gain: list[int], step: int, dithered: bool) -> Array:
    _, h, w = fine.shape
    planes = np.zeros((len(channels) + 4, h, w), np.int64)
    for plane, c in enumerate(channels):
        planes[plane] = (fine[c] * (step * gain[c]) + 2**35) >> 36
    n = len(channels)
    planes[n] = 32
    planes[n + 1] = [[32 * ((y + x) % 2 == 0) for x in range(w)] for y in range(h)]
    planes[n + 2] = 4 * octave(step)
    planes[n + 3] = 32 * dithered
    return np.clip(planes, -127, 127)


def network(model: Model, number: int, x: Array) -> Array:
    for i in range(4):
        weight, bias, shift = (
            model.tensors[f"prior.context.passes.{number}.layers.{i}.{name}"].astype(np.int64)
            for name in ("weight", "bias", "shift")
        )
        y = _layer(weight, bias, shift, x, taps=9 if i < 2 else 1)
        x = np.clip(y, 0, 127) if i < 3 else y
    return x


def _layer(weight: Array, bias: Array, shift: Array, x: Array, taps: int) -> Array:
    """Apply a layer to (planes, h, w), in int64 throughout."""
    planes, h, w = x.shape
    padded = np.zeros((planes, h + 2, w + 2), np.int64)
    padded[:, 1:-1, 1:-1] = x
    y = np.zeros((len(weight), h, w), np.int64) + (bias + 2 ** (shift - 1))[:, None, None]
    for p, tap in itertools.product(range(planes), range(taps)):
        i, j = divmod(tap, 3) if taps == 9 else (1, 1)
        y += weight[:, taps * p + tap, None, None] * padded[p, i : i + h, j : j + w]
    return y >> shift[:, None, None]
