"""Noise is a pure function of (key, position), and looks independent wherever a caller could notice.

All inputs are fixed, so a statistical bound either holds always or never.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec import noise

N = 200_000
KS_LIMIT = 1.95 / math.sqrt(N)  # a true null exceeds this once in a thousand
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's increment
TEXT_KEY_A = -8527827105697740802
int64 = st.integers(-(2**63), 2**63 - 1)
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
every_key_set = pytest.mark.parametrize("keys", ["consecutive", "folded", "one bit apart"])


def kolmogorov_smirnov(cdf_at_samples: torch.Tensor) -> float:
    """Return the largest distance between the empirical distribution and that of `cdf_at_samples`."""
    u = cdf_at_samples.double().flatten().sort().values
    steps = torch.arange(len(u) + 1, dtype=torch.float64) / len(u)
    return torch.maximum((steps[1:] - u).amax(), (u - steps[:-1]).amax()).item()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item())


def assert_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    limit = 4 / math.sqrt(a.numel())
    assert correlation(a, b) < limit and correlation(a.square(), b.square()) < limit


def chi_square_excess(counts: torch.Tensor) -> float:
    """Return how many standard deviations the chi-square statistic of counts exceeds its mean under uniformity."""
    expected = counts.sum().double() / counts.numel()
    freedom = counts.numel() - 1
    return (((counts - expected).square() / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


def key_set(name: str, n: int) -> torch.Tensor:
    keys = torch.arange(n)
    return {"consecutive": keys, "folded": noise.fold(7, keys), "one bit apart": keys << 40}[name]


def test_mix_is_the_published_splitmix64_sequence() -> None:
    states = [(1234567 + i * GOLDEN + 2**63) % 2**64 - 2**63 for i in range(3)]
    found = [h % 2**64 for h in noise.mix(torch.tensor(states)).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(int64, min_size=1, max_size=4))
def test_integers_modulo_two_to_the_64_and_tensors_fold_alike_and_order_and_length_matter(keys: list[int]) -> None:
    folded, tensors = noise.fold(*keys), [torch.tensor(k) for k in keys]
    assert folded.shape == () and folded.dtype == torch.int64
    for mixed in (tensors, [*keys[:-1], tensors[-1]], [tensors[0], *keys[1:]]):
        assert torch.equal(noise.fold(*mixed), folded)
    for multiple in (-(2**80), 2**64):
        assert torch.equal(noise.fold(keys[0] + multiple, *keys[1:]), folded)
    assert not torch.equal(folded, noise.fold(*keys, 0))
    if keys != keys[::-1]:
        assert not torch.equal(folded, noise.fold(*keys[::-1]))


def test_fold_broadcasts_on_its_tensors_device_and_has_no_collisions_on_a_grid_of_small_keys() -> None:
    grid = noise.fold(0, torch.arange(300)[:, None], torch.arange(300))
    assert grid.shape == (300, 300) and len(grid.unique()) == 300 * 300
    assert torch.equal(grid[17, 4], noise.fold(0, 17, 4))
    keys = torch.zeros(4, dtype=torch.int64, device="meta")
    assert {noise.fold(5, keys, *after).device.type for after in ([], [3], [3, keys[0]])} == {"meta"}


@given(st.binary(max_size=20))
def test_text_keys_are_the_same_for_ever_and_fit_int64_for_any_file_name(name: bytes) -> None:
    assert noise.text_key("a.jpg") == TEXT_KEY_A != noise.text_key("A.jpg")
    assert -(2**63) <= noise.text_key(name.decode("utf-8", "surrogateescape")) < 2**63


@given(st.lists(int64, max_size=6), st.data(), shapes | st.sampled_from([(16, 33, 37), (3,), (0, 3)]))
def test_normal_does_not_depend_on_the_batch(keys: list[int], data: st.DataObject, shape: tuple[int, ...]) -> None:
    order = data.draw(st.permutations(range(len(keys))))
    batch = torch.tensor(keys, dtype=torch.int64)
    whole = noise.normal(batch, shape)
    assert whole.shape == (len(keys), *shape) and whole.dtype == torch.float32
    assert all(torch.equal(whole[i], noise.normal(batch[i : i + 1], shape)[0]) for i in range(len(keys)))
    assert torch.equal(whole[order], noise.normal(batch[order], shape))


def test_normal_does_not_depend_on_the_number_of_threads() -> None:
    keys, before, found = noise.fold(2, torch.arange(5)), torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(noise.normal(keys, (16, 61, 67)))  # large enough to be split between threads
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("shape", [(N,), (400,), (1,)])
@every_key_set
def test_normal_is_standard_normal(shape: tuple[int, ...], keys: str) -> None:
    x = noise.normal(key_set(keys, N // math.prod(shape)), shape).double().flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean().item() - moment) < 4 * math.sqrt(variance / N)
    assert kolmogorov_smirnov(0.5 * torch.special.erfc(-x / math.sqrt(2))) < KS_LIMIT and x.isfinite().all()


@every_key_set
def test_normals_of_neighbouring_keys_and_positions_are_uncorrelated(keys: str) -> None:
    rows = noise.normal(key_set(keys, 200), (1000,))
    for lag in (1, 2, 64):
        assert_uncorrelated(rows[:-lag], rows[lag:])
    for lag in (1, 2, 3, 8, 64, 500):  # position i and i + 500 are the cosine and sine of one hash
        assert_uncorrelated(rows[:, :-lag], rows[:, lag:])


def test_normals_of_keys_an_increment_apart_do_not_overlap() -> None:
    # Were keys not mixed first, one SplitMix64 sequence would be the other's shifted by one.
    rows = noise.normal(torch.arange(200) * GOLDEN, (1000,))
    for shift in (-1, 0, 1):
        assert correlation(rows[:-1].roll(shift, dims=1)[:, 1:-1], rows[1:, 1:-1]) < 4 / math.sqrt(199 * 998)


@pytest.mark.parametrize("zoom", [1, 16, 1024])
def test_the_two_normals_of_one_hash_have_independent_radius_and_angle(zoom: int) -> None:
    x, y = noise.normal(torch.arange(2), (N,)).double().chunk(2, dim=1)
    radius = torch.exp(-0.5 * (x.square() + y.square())).clamp(0, 1 - 1e-9)  # uniform, if x and y are normal
    angle = (torch.atan2(y, x) / (2 * math.pi)).remainder(1.0).clamp(0, 1 - 1e-9)
    cell = (radius * zoom % 1 * 16).long() * 16 + (angle * 16).long()  # coarse bits of the radius, or finer ones
    assert chi_square_excess(torch.bincount(cell.flatten(), minlength=256)) < 4
    assert correlation(radius, angle) < 4 / math.sqrt(N)


@every_key_set
def test_uniform_is_uniform_in_the_half_open_interval(keys: str) -> None:
    u = noise.uniform(key_set(keys, N))
    assert u.dtype == torch.float64 and u.amin().item() >= 0 and u.amax().item() < 1
    assert kolmogorov_smirnov(u) < KS_LIMIT and correlation(u[1:], u[:-1]) < 4 / math.sqrt(N)


@given(st.lists(st.tuples(st.integers(1, 2**53), int64), min_size=1, max_size=20))
def test_below_is_in_range_even_at_the_largest_hash(pairs: list[tuple[int, int]]) -> None:
    limit, keys = torch.tensor(pairs).unbind(1)
    found = noise.below(limit, keys)
    assert found.dtype == torch.int64 and ((found >= 0) & (found < limit)).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "mix", lambda keys: torch.full_like(keys, -1))  # all bits set
        assert torch.equal(noise.below(limit, keys), limit - 1)


@pytest.mark.parametrize("limit", [1, 2, 7, 256])
def test_below_is_uniform(limit: int) -> None:
    counts = torch.bincount(noise.below(torch.tensor(limit), torch.arange(N)), minlength=limit)
    assert len(counts) == limit
    assert limit == 1 or chi_square_excess(counts) < 4


def shuffled(n: int, key: int) -> torch.Tensor:
    return noise.permutation(n, torch.tensor(key))


@given(st.integers(0, 200), int64)
def test_permutation_holds_each_index_once(n: int, key: int) -> None:
    assert torch.equal(shuffled(n, key).sort().values, torch.arange(n))


@pytest.mark.parametrize("flip", [1, 2, 3, 1 << 20, 1 << 62])
def test_permutations_of_neighbouring_keys_are_unrelated(flip: int) -> None:
    a, b = shuffled(5000, 5), shuffled(5000, 5 ^ flip)
    assert correlation(a, b) < 4 / math.sqrt(5000)
    for difference in (a ^ b, (a - b) % 5000):  # a mirrored order would show as one frequent value
        assert torch.bincount(difference).amax().item() < 12


def test_permutation_places_each_index_uniformly() -> None:
    places = torch.stack([shuffled(12, key) for key in range(3000)])  # (3000, 12)
    assert chi_square_excess(torch.stack([torch.bincount(column, minlength=12) for column in places.T])) < 4
