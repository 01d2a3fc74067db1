"""Noise is a pure function of (key, position) and looks independent wherever a caller could notice.

All inputs are fixed, so a statistical bound either holds always or never.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec import noise

N = 200_000
KS_LIMIT = 1.95 / math.sqrt(N)  # a true null exceeds this once in a thousand
CORRELATION_LIMIT = 4 / math.sqrt(N)
TEXT_KEY_A = -8527827105697740802

int64 = st.integers(-(2**63), 2**63 - 1)
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def kolmogorov_smirnov(cdf_at_samples: torch.Tensor) -> float:
    """The largest distance between the empirical distribution and the one that `cdf_at_samples` comes from."""
    u = cdf_at_samples.double().flatten().sort().values
    steps = torch.arange(len(u) + 1, dtype=torch.float64) / len(u)
    return torch.maximum((steps[1:] - u).amax(), (u - steps[:-1]).amax()).item()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item())


def chi_square_excess(counts: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic of counts lies above its mean under uniformity."""
    expected = counts.sum().double() / counts.numel()
    freedom = counts.numel() - 1
    return (((counts - expected).square() / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


def key_sets(n: int) -> dict[str, torch.Tensor]:
    return {
        "consecutive": torch.arange(n),
        "folded": noise.fold(7, torch.arange(n)),
        "one bit apart": torch.arange(n) << 40,
    }


def test_mix_is_the_published_splitmix64_sequence() -> None:
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + i * golden + 2**63) % 2**64 - 2**63 for i in range(3)]
    found = [h % 2**64 for h in noise.mix(torch.tensor(states)).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_mix_flips_each_output_bit_half_of_the_time_for_each_input_bit() -> None:
    x = noise.mix(torch.arange(2000))
    positions = torch.arange(64)
    for bit in range(64):
        flip = 1 << bit if bit < 63 else -(2**63)
        changed = noise.mix(x) ^ noise.mix(x ^ flip)
        share = ((changed[:, None] >> positions) & 1).double().mean(0)  # (64,)
        assert (share - 0.5).abs().amax().item() < 0.06  # 5 standard deviations


@given(st.lists(int64, min_size=1, max_size=4))
def test_fold_of_integers_equals_fold_of_tensors_and_notices_order_and_length(keys: list[int]) -> None:
    folded = noise.fold(*keys)
    assert torch.equal(folded, noise.fold(*(torch.tensor(k) for k in keys)))
    assert folded.shape == () and folded.dtype == torch.int64
    assert not torch.equal(folded, noise.fold(*keys, 0))
    if keys != keys[::-1]:
        assert not torch.equal(folded, noise.fold(*keys[::-1]))


@given(st.integers(-(2**80), 2**80))
def test_fold_takes_integers_modulo_two_to_the_64(key: int) -> None:
    assert torch.equal(noise.fold(key), noise.fold(key + 2**64))


def test_fold_broadcasts_and_has_no_collisions_on_a_grid_of_small_keys() -> None:
    grid = noise.fold(0, torch.arange(300)[:, None], torch.arange(300))
    assert grid.shape == (300, 300)
    assert len(grid.unique()) == 300 * 300
    assert torch.equal(grid[17, 4], noise.fold(0, 17, 4))


@pytest.mark.parametrize("after", [[], [3], [3, torch.tensor(1)]])
def test_fold_stays_on_the_device_of_its_tensors(after: list[int | torch.Tensor]) -> None:
    keys = torch.zeros(4, dtype=torch.int64, device="meta")
    after = [k.to("meta") if isinstance(k, torch.Tensor) else k for k in after]
    assert noise.fold(5, keys, *after).device.type == "meta"


def test_text_key_is_the_same_number_for_ever() -> None:
    assert noise.text_key("a.jpg") == TEXT_KEY_A
    assert noise.text_key("A.jpg") != TEXT_KEY_A


@given(st.binary(max_size=20))
def test_text_key_takes_any_file_name_and_fits_int64(name: bytes) -> None:
    key = noise.text_key(name.decode("utf-8", "surrogateescape"))
    assert -(2**63) <= key < 2**63


@given(st.lists(int64, min_size=1, max_size=6), st.data(), shapes)
def test_normal_does_not_depend_on_the_batch(keys: list[int], data: st.DataObject, shape: tuple[int, ...]) -> None:
    split = data.draw(st.integers(0, len(keys)))
    order = data.draw(st.permutations(range(len(keys))))
    batch = torch.tensor(keys)
    whole = noise.normal(batch, shape)
    assert whole.shape == (len(keys), *shape) and whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat([noise.normal(batch[:split], shape), noise.normal(batch[split:], shape)]))
    assert torch.equal(whole[list(order)], noise.normal(batch[list(order)], shape))


@pytest.mark.parametrize("shape", [(16, 33, 37), (3,), (1,), (2, 5)])
def test_normal_does_not_depend_on_the_batch_at_the_size_of_latents(shape: tuple[int, ...]) -> None:
    keys = noise.fold(1, torch.arange(9))
    whole = noise.normal(keys, shape)
    for i in range(9):
        assert torch.equal(whole[i : i + 1], noise.normal(keys[i : i + 1], shape))


def test_normal_of_no_keys_or_no_positions_is_empty() -> None:
    assert noise.normal(torch.zeros(0, dtype=torch.int64), (3, 2)).shape == (0, 3, 2)
    assert noise.normal(torch.arange(2), (0, 3)).shape == (2, 0, 3)


def test_normal_does_not_depend_on_the_number_of_threads(threads: None) -> None:
    keys = noise.fold(2, torch.arange(5))
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(noise.normal(keys, (16, 61, 67)))  # large enough to be split between threads
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("shape", [(N,), (400,), (1,)])
@pytest.mark.parametrize("keys", ["consecutive", "folded", "one bit apart"])
def test_normal_is_standard_normal(shape: tuple[int, ...], keys: str) -> None:
    x = noise.normal(key_sets(N // math.prod(shape))[keys], shape).double().flatten()
    assert abs(x.mean().item()) < 4 / math.sqrt(N)
    assert abs(x.square().mean().item() - 1) < 4 * math.sqrt(2 / N)
    assert abs(x.pow(3).mean().item()) < 4 * math.sqrt(15 / N)
    assert abs(x.pow(4).mean().item() - 3) < 4 * math.sqrt(96 / N)
    assert kolmogorov_smirnov(0.5 * torch.special.erfc(-x / math.sqrt(2))) < KS_LIMIT
    assert x.isfinite().all()


@pytest.mark.parametrize("keys", ["consecutive", "folded", "one bit apart"])
def test_normal_of_neighbouring_keys_is_uncorrelated(keys: str) -> None:
    rows = noise.normal(key_sets(200)[keys], (1000,))
    for step in (1, 2, 64):
        assert correlation(rows[:-step], rows[step:]) < 4 / math.sqrt(1000 * (200 - step))
        assert correlation(rows[:-step].square(), rows[step:].square()) < 4 / math.sqrt(1000 * (200 - step))


@pytest.mark.parametrize("step", [1, 2, 3, 8, 64, 500])
def test_normal_at_neighbouring_positions_is_uncorrelated(step: int) -> None:
    rows = noise.normal(torch.arange(200), (1000,))  # position i and i + 500 are the cosine and sine of one hash
    limit = 4 / math.sqrt(200 * (1000 - step))
    assert correlation(rows[:, :-step], rows[:, step:]) < limit
    assert correlation(rows[:, :-step].square(), rows[:, step:].square()) < limit


def test_normals_of_keys_a_golden_step_apart_do_not_overlap() -> None:
    """SplitMix64's own step: were keys not mixed first, one sequence would be the other's shifted by one."""
    golden = 0x9E3779B97F4A7C15 - 2**64
    rows = noise.normal(torch.arange(200) * golden, (1000,))
    for shift in (-1, 0, 1):
        inner = slice(1, -1)
        moved = rows[:-1].roll(shift, dims=1)[:, inner]
        assert correlation(moved, rows[1:, inner]) < 4 / math.sqrt(199 * 998)


@pytest.mark.parametrize("zoom", [1, 16, 1024])
def test_the_two_normals_of_one_hash_have_independent_radius_and_angle(zoom: int) -> None:
    x, y = noise.normal(torch.arange(2), (N,)).double().chunk(2, dim=1)
    radius = torch.exp(-0.5 * (x.square() + y.square())).clamp(0, 1 - 1e-9)  # uniform, if x and y are normal
    angle = (torch.atan2(y, x) / (2 * math.pi)).remainder(1.0).clamp(0, 1 - 1e-9)
    cell = (radius * zoom % 1 * 16).long() * 16 + (angle * 16).long()  # coarse bits of the radius, or finer ones
    assert chi_square_excess(torch.bincount(cell.flatten(), minlength=256)) < 4
    assert correlation(radius, angle) < CORRELATION_LIMIT


@pytest.mark.parametrize("keys", ["consecutive", "folded", "one bit apart"])
def test_uniform_is_uniform_in_the_half_open_interval(keys: str) -> None:
    u = noise.uniform(key_sets(N)[keys])
    assert u.dtype == torch.float64
    assert u.amin().item() >= 0 and u.amax().item() < 1
    assert kolmogorov_smirnov(u) < KS_LIMIT
    assert correlation(u[1:], u[:-1]) < CORRELATION_LIMIT


@given(st.lists(st.tuples(st.integers(1, 2**53), int64), min_size=1, max_size=20))
def test_below_is_in_range(pairs: list[tuple[int, int]]) -> None:
    limit, keys = torch.tensor(pairs).unbind(1)
    found = noise.below(limit, keys)
    assert found.dtype == torch.int64
    assert ((found >= 0) & (found < limit)).all()


@given(st.integers(1, 2**53))
def test_below_stays_below_at_the_largest_hash(limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "mix", lambda keys: torch.full_like(keys, -1))  # all bits set
        found = noise.below(torch.tensor(limit), torch.tensor([0]))
    assert found.item() == limit - 1


@pytest.mark.parametrize("limit", [1, 2, 7, 256])
def test_below_is_uniform(limit: int) -> None:
    counts = torch.bincount(noise.below(torch.tensor(limit), torch.arange(N)), minlength=limit)
    assert len(counts) == limit
    assert limit == 1 or chi_square_excess(counts) < 4


@given(st.integers(0, 200), int64)
def test_permutation_holds_each_index_once(n: int, key: int) -> None:
    assert torch.equal(noise.permutation(n, torch.tensor(key)).sort().values, torch.arange(n))


@pytest.mark.parametrize("flip", [1, 2, 3, 1 << 20, 1 << 62])
def test_permutations_of_neighbouring_keys_are_unrelated(flip: int) -> None:
    n = 5000
    a = noise.permutation(n, torch.tensor(5))
    b = noise.permutation(n, torch.tensor(5 ^ flip))
    assert correlation(a, b) < 4 / math.sqrt(n)
    xor = torch.bincount(a ^ b, minlength=8192)  # a mirrored order would show as one frequent value
    assert xor.amax().item() < 12
    shift = torch.bincount((a - b) % n, minlength=n)
    assert shift.amax().item() < 12


def test_permutation_places_each_index_uniformly() -> None:
    n = 12
    places = torch.stack([noise.permutation(n, torch.tensor(key)) for key in range(3000)])  # (3000, n)
    counts = torch.zeros(n, n, dtype=torch.int64)
    for position in range(n):
        counts[position] = torch.bincount(places[:, position], minlength=n)
    assert chi_square_excess(counts) < 4


@given(keys=st.lists(int64, min_size=1, max_size=4))
def test_integers_fold_as_tensors_do(keys: list[int]) -> None:
    tensors = [torch.tensor([key]) for key in keys]
    whole = noise.fold(*tensors)
    assert noise.fold(*keys).tolist() == whole[0].tolist()
    assert torch.equal(noise.fold(*keys[:-1], tensors[-1]), whole)
    assert torch.equal(noise.fold(tensors[0], *keys[1:]), whole)
