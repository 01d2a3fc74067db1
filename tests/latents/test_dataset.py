"""Check that draws are a function of (seed, epoch, path), one by one, in batches and in workers."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Subset

from latent_codec.errors import UserError
from latent_codec.latents.batches import BatchIndices, ShapeBatches
from latent_codec.latents.dataset import LatentBatch, Latents, LatentSample, Moments
from latent_codec.latents.format import latents_row, unplaced_entry
from latent_codec.model.codec import Codec
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal, text_key
from latent_codec.storage.tensors import KEY
from tests.support.errors import refused
from tests.support.latents import PATHS, damage, geometry, row_of, store, stored, write

MANY = (*(f"{'bac'[i % 3]}/{i}.png" for i in range(24)), "top.png")


@pytest.fixture
def latents(codec: Codec, tmp_path: Path) -> Latents:
    """Latents of two sizes."""
    store(tmp_path, codec, MANY, "float16")
    found = Latents(tmp_path, seed=5, normalize=True)
    assert len(set(found.shapes)) == 2
    return found


def drawn(latents: Latents, epoch: int) -> dict[str, torch.Tensor]:
    """Draw one by one; returns draws by path."""
    latents.set_epoch(epoch)
    return {sample.path: sample.z for sample in (latents[i] for i in range(len(latents)))}


def test_z_depends_on_seed_epoch_and_path_alone(codec: Codec, tmp_path: Path) -> None:
    store(tmp_path / "all", codec)
    store(tmp_path / "one", codec, ("b/ü.png",))
    many, alone = Latents(tmp_path / "all", seed=5), Latents(tmp_path / "one", seed=5)
    place = [e.path for e in many.entries].index("b/ü.png")
    for epoch in (0, 3):
        many.set_epoch(epoch)
        alone.set_epoch(epoch)
        torch.manual_seed(epoch)  # the global state plays no part
        _ = [many[i] for i in reversed(range(len(many)))]
        noise = normal(fold(5, epoch, text_key("b/ü.png"))[None], stored("b/ü.png").mean.shape[1:])
        expected = stored("b/ü.png").sample(noise)[0]
        assert torch.equal(many[place].z, expected) and torch.equal(alone[0].z, expected)
        assert (alone[0].path, alone[0].label) == ("b/ü.png", 0)


def test_other_seeds_epochs_and_paths_draw_other_noise(codec: Codec, tmp_path: Path) -> None:
    zero = DiagonalGaussian(torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16))
    entries = [unplaced_entry(path, geometry(128, 128), "") for path in ("a.jpg", "b.jpg")]
    write(tmp_path, codec, [latents_row(entry, zero, 0, "float32") for entry in entries])
    draws = []
    for seed in (0, 1):
        latents = Latents(tmp_path, seed=seed)
        for epoch in (0, 1):
            latents.set_epoch(epoch)
            draws += [latents[0].z.flatten(), latents[1].z.flatten()]
    correlation = torch.corrcoef(torch.stack(draws))  # (8, 8)
    assert (correlation - torch.eye(8)).abs().max() < 5 / 1024**0.5
    assert torch.stack(draws).std().sub(1).abs() < 0.05


def test_normalisation_uses_the_models_statistics_and_another_models_are_refused(codec: Codec, tmp_path: Path) -> None:
    raw, scaled = store(tmp_path, codec), Latents(tmp_path, normalize=True)
    assert codec.statistics is not None
    mean, std = (torch.tensor(v)[:, None, None] for v in (codec.statistics.mean, codec.statistics.std))
    for i in range(len(raw)):
        assert torch.allclose(scaled[i].z * std + mean, raw[i].z, atol=1e-5)
        assert torch.equal(scaled.posterior(i).mean, raw.posterior(i).mean)  # what is stored stays raw
    assert len(Latents(tmp_path, model_id=codec.model_id)) == len(PATHS)
    refused(f"{codec.model_id[:12]}.*000000000000.*--model", Latents, tmp_path, model_id="0" * 64)
    codec.statistics = None
    store(tmp_path, codec)
    refused("no latent statistics; export", Latents, tmp_path, normalize=True)


def test_classes_are_sorted_and_labels_their_numbers(latents: Latents) -> None:
    assert latents.classes == ("a", "b", "c")
    expected = [-1 if entry.label is None else "abc".index(entry.label) for entry in latents.entries]
    assert [sample.label for sample in latents] == latents.labels.tolist() == expected and -1 in expected


def test_batches_of_any_kind_hold_what_single_items_are(latents: Latents) -> None:
    expected = drawn(latents, 7)
    latents.set_epoch(0)
    for rows in ShapeBatches(latents.shapes, 4, seed=1):
        rows = rows._replace(epoch=7)
        batch, samples, moments = latents[rows], latents.__getitems__(rows), latents.moments(rows)
        assert isinstance(batch, LatentBatch) and isinstance(moments, Moments)
        paths = [latents.entries[i].path for i in rows.indices]
        assert batch.paths == moments.paths == [s.path for s in samples] == paths
        assert batch.labels.tolist() == [s.label for s in samples] == latents.labels[list(rows.indices)].tolist()
        assert moments.mean.dtype == moments.logvar.dtype == torch.float16
        assert torch.equal(latents.draw(moments.to("cpu")), batch.z)
        for path, z, sample in zip(batch.paths, batch.z, samples, strict=True):
            assert torch.equal(z, expected[path]) and torch.equal(sample.z, z)


def test_samples_of_different_sizes_are_fetched_in_their_order(latents: Latents) -> None:
    expected = drawn(latents, 2)
    indices = [5, 0, 24, 7, 5, 13]
    assert len({latents.shapes[i] for i in indices}) == 2
    samples = latents.__getitems__(indices)
    assert [s.path for s in samples] == [latents.entries[i].path for i in indices]
    assert all(torch.equal(s.z, expected[s.path]) for s in samples)
    with pytest.raises(UserError, match="its latents are"):
        latents.moments(BatchIndices((0, next(i for i in range(24) if latents.shapes[i] != latents.shapes[0])), 0))


def found_in(batches: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for batch in batches:
        yield from zip(batch[1], batch[0], strict=True)


LOADERS: dict[str, Any] = {
    "a loop": None,
    "one by one": {"batch_size": None},
    "one by one, shuffled by persistent workers": {
        "batch_size": None,
        "shuffle": True,
        "num_workers": 2,
        "persistent_workers": True,
    },
    "in batches": {"batch_size": 1, "shuffle": True},
    "in batches by workers": {"batch_size": 1, "num_workers": 2},
    "in batches by persistent workers": {"batch_size": 1, "num_workers": 2, "persistent_workers": True},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_each_pass_draws_anew_and_set_epoch_says_where_passes_go_on(latents: Latents, kind: str) -> None:
    expected = [drawn(latents, epoch) for epoch in range(6)]
    options, found = LOADERS[kind], latents
    latents.set_epoch(0)
    loader: Any = latents if options is None else DataLoader(latents, **options)
    for start, epochs in ((None, (0, 1, 2)), (4, (4, 5)), (1, (1, 2))):
        if start is not None:
            latents.set_epoch(start)
        for epoch in epochs:
            found = {
                path if isinstance(path, str) else path[0]: z if isinstance(path, str) else z[0]
                for z, path, _ in loader
            }
            assert set(found) == set(MANY)
            assert all(torch.equal(z, expected[epoch][path]) for path, z in found.items())
        assert latents.epoch == epochs[0] and torch.equal(latents[3].z, expected[epochs[0]][latents[3].path])
    alone = pickle.loads(pickle.dumps(latents))
    alone.set_epoch(5)
    assert latents.epoch == 1


def prepared(latents: Latents, processes: int, **options: Any) -> list[Any]:
    """Return the loader of docs/latents.md as accelerate prepares it for each of `processes`."""
    PartialState(cpu=True)
    loaders = (DataLoader(latents, batch_sampler=ShapeBatches(latents.shapes, 4, **options)) for _ in range(processes))
    return [
        prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False)
        for rank, loader in enumerate(loaders)
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_accelerate_divides_the_batches_once_and_tells_the_epoch(latents: Latents, world: int) -> None:
    expected = [drawn(latents, epoch) for epoch in range(3)]
    batches = ShapeBatches(latents.shapes, 4)
    loaders = prepared(latents, world)
    for epoch in (0, 1, 2):
        batches.set_epoch(epoch)
        whole = [tuple(latents.entries[i].path for i in rows.indices) for rows in batches]
        ranks = [[(tuple(paths), z) for z, paths, _ in loader] for loader in loaders]
        assert len({len(rank) for rank in ranks}) == 1
        found = [rank[i] for i in range(len(ranks[0])) for rank in ranks]
        assert [paths for paths, _ in found][: len(whole)] == whole
        assert [paths for paths, _ in found][len(whole) :] == whole[: len(found) - len(whole)]
        assert all(
            torch.equal(z, expected[epoch][p]) for paths, draws in found for p, z in zip(paths, draws, strict=True)
        )
    with pytest.raises(UserError, match=r"divides the batches among 2 ranks, and accelerate would .* leave out rank"):
        prepared(latents, 2, rank=1, world=2)


@pytest.mark.slow
def test_persistent_workers_draw_each_epochs_own_noise(latents: Latents) -> None:
    expected = {epoch: drawn(latents, epoch) for epoch in (0, 1)}
    latents.set_epoch(9)  # plays no part
    batches = ShapeBatches(latents.shapes, 4)
    options: Any = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "spawn"}
    loader = DataLoader(latents, sampler=batches, batch_size=None, **options)
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        found = dict(found_in(loader))
        assert set(found) == set(MANY)
        assert all(torch.equal(z, expected[epoch][path]) for path, z in found.items())


def test_the_loader_may_collate_the_batches(latents: Latents) -> None:
    expected = drawn(latents, 0)
    by_shape = DataLoader(latents, batch_sampler=ShapeBatches(latents.shapes, 4))
    assert all(torch.equal(z, expected[path]) for path, z in found_in(by_shape))
    same = [i for i, shape in enumerate(latents.shapes) if shape == latents.shapes[0]]
    for sample in DataLoader(Subset(latents, same), batch_size=3):
        assert isinstance(sample, LatentSample) and sample.z.ndim == 4
        assert all(torch.equal(z, expected[path]) for path, z in zip(sample.path, sample.z, strict=True))


def test_workers_hand_over_one_tensor_and_it_comes_out_the_same(latents: Latents) -> None:
    same = tuple(i for i, shape in enumerate(latents.shapes) if shape == latents.shapes[0])
    moments = latents.moments(BatchIndices(same, 1))
    halved = Moments(moments.mean[::2], moments.logvar[::2], moments.keys[::2], moments.paths[::2], moments.labels[::2])
    apart = Moments(moments.mean.clone(), moments.logvar.clone(), *moments[2:])
    swapped = Moments(moments.logvar, moments.mean, *moments[2:])
    for given in (moments, halved, apart, swapped, latents[BatchIndices(same, 1)]):
        assert sum(isinstance(part, torch.Tensor) for part in given.__reduce__()[1]) == 1
        copy = pickle.loads(pickle.dumps(given))
        assert type(copy) is type(given)
        for one, other in zip(given, copy, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    both = moments.__reduce__()[1][0]
    assert both.data_ptr() == moments.mean.data_ptr()  # not copied
    latents.set_epoch(3)
    copy = pickle.loads(pickle.dumps(latents))
    assert all(torch.equal(copy[i].z, latents[i].z) and copy[i][1:] == latents[i][1:] for i in range(len(latents)))


def test_a_damaged_row_is_named_in_a_batch(codec: Codec, tmp_path: Path) -> None:
    latents = store(tmp_path, codec, PATHS, "float16")
    path, row = damage(latents, 2), latents.entries[2].row
    same = tuple(i for i, shape in enumerate(latents.shapes) if shape == latents.shapes[2])
    with pytest.raises(UserError, match=rf"^{path}: row {row} of shard .* is damaged; encode the image again"):
        latents.moments(BatchIndices(same, 0))


SHARDS: dict[str, dict[str, torch.Tensor] | bytes | None] = {
    "without logvar": {"mean.2x2": torch.zeros(2, 4, 2, 2)},
    "of another size alone": {"mean.2x4": torch.zeros(2, 4, 2, 4), "logvar.2x4": torch.zeros(2, 4, 2, 4)},
    "with too few rows": {"mean.2x2": torch.zeros(0, 4, 2, 2), "logvar.2x2": torch.zeros(0, 4, 2, 2)},
    "of another size": {"mean.2x2": torch.zeros(2, 4, 2, 4), "logvar.2x2": torch.zeros(2, 4, 2, 4)},
    "of two sizes": {"mean.2x2": torch.zeros(2, 4, 2, 2), "logvar.2x2": torch.zeros(2, 5, 2, 2)},
    "of scalars": {"mean.2x2": torch.zeros(()), "logvar.2x2": torch.zeros(())},
    "of vectors": {"mean.2x2": torch.zeros(2), "logvar.2x2": torch.zeros(2)},
    "that is not finite": {"mean.2x2": torch.zeros(2, 4, 2, 2), "logvar.2x2": torch.full((2, 4, 2, 2), torch.inf)},
    "that is missing": None,
    "that is empty": b"",
    "that is text": b"text",
}


@pytest.mark.parametrize("content", SHARDS.values(), ids=SHARDS)
def test_a_shard_without_the_latent_is_refused_by_the_images_name(codec: Codec, tmp_path: Path, content: Any) -> None:
    latents = write(tmp_path, codec, [row_of("a.png", side=16)])
    shard = tmp_path / latents.entries[0].shard
    shard.unlink()
    if isinstance(content, dict):
        save_file(content, shard, metadata={KEY: "{}"})
    elif content is not None:
        shard.write_bytes(content)
    with pytest.raises(UserError, match=r"^a\.png: .*shard latents-name\.safetensors (cannot be read|is damaged)"):
        _ = latents[0]
