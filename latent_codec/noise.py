"""Draw counter-based random numbers: each is a hash of (seed, key, position).

There is no state, so results do not depend on batch, order, worker, rank or device. The hash is the finaliser of
SplitMix64 (Steele, Lea & Flood 2014) on wrapping 64-bit integers, which torch computes alike everywhere.
"""

import hashlib
import math

import torch

from latent_codec.precision import has_float64

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the odd integer nearest 2^64 / phi, as int64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_MASK = 2**64 - 1


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right logically, where torch's shift is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash int64 to int64 by a bijection whose output bits look independent of its input."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def _mix_integer(x: int) -> int:
    """Return `mix` of an integer modulo 2^64, as int64."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MIX[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MIX[1]) & _MASK
    return ((x ^ (x >> 31)) + 2**63) % 2**64 - 2**63


def fold(*keys: int | torch.Tensor) -> torch.Tensor:
    """Combine keys, integers or broadcastable int64 tensors, into one int64 key; their order matters.
    Integers stay integers until they meet a tensor: a copy to a device would wait for it."""
    state: int | torch.Tensor = 0
    for key in keys:
        mixed = mix(key) if isinstance(key, torch.Tensor) else _mix_integer(key)
        if isinstance(state, torch.Tensor) and isinstance(mixed, torch.Tensor):
            state = state.to(mixed.device)
        state = state ^ mixed
        state = mix(state) if isinstance(state, torch.Tensor) else _mix_integer(state)
    return state if isinstance(state, torch.Tensor) else torch.tensor(state)


def hashes(keys: torch.Tensor, n: int) -> torch.Tensor:
    """Return n hashes for each key, (*keys.shape, n) int64: SplitMix64's sequence from the state mix(key).
    The key is mixed first, because neighbouring states have overlapping or mirrored sequences."""
    return mix(mix(keys)[..., None] + torch.arange(n, device=keys.device) * _GOLDEN)


def text_key(text: str) -> int:
    """Return a 64-bit key for a name, the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(keys: torch.Tensor) -> torch.Tensor:
    """Return a float64 in [0, 1) for each int64 key, from the top 53 bits of its hash; on a device without float64, a
    float32 from the top 24 of them."""
    bits = mix(keys)
    return _shift(bits, 11).double() * 2.0**-53 if has_float64(keys.device) else _shift(bits, 40).float() * 2.0**-24


def uniforms(keys: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return float32 in [0, 1), (b, *shape) from keys (b,) int64: the top 24 bits of hashes, equal on all devices."""
    bits = _shift(hashes(keys, math.prod(shape)), 40)
    return (bits.float() * 2.0**-24).reshape(len(keys), *shape)


def below(limit: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return an int64 in [0, limit) for each key; `limit` is 1 to 2^53 and broadcasts to `keys`."""
    if not has_float64(keys.device):
        return below(limit.cpu(), keys.cpu()).to(keys.device)
    return (uniform(keys) * limit).long()  # 1 - 2^-53 times a limit never rounds up to it


def permutation(n: int, key: torch.Tensor) -> torch.Tensor:
    """Return a random order of range(n), (n,) int64, from a key of shape ()."""
    return torch.argsort(hashes(key, n), stable=True)


def normal(keys: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard normal noise (b, *shape) float32 (Box & Muller 1958); row i depends on keys[i] and `shape` alone.
    Logarithm and cosine are the device's own, so values agree between devices to float32 rounding, not to the bit."""
    count = math.prod(shape)
    bits = hashes(keys, (count + 1) // 2)  # (b, pairs); radius and angle take disjoint bits of one hash
    radius = (_shift(bits, 40) + 1).float() * 2.0**-24  # 24 bits in (0, 1], exact in float32
    angle = (bits & 0xFFFFFF).float() * (2.0**-24 * 2 * math.pi)
    radius = torch.sqrt(-2.0 * torch.log(radius))
    values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return values[:, :count].reshape(len(keys), *shape)
