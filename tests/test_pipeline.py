"""Batches: nothing is lost, and little waits."""

from hypothesis import given
from hypothesis import strategies as st

from latent_codec.pipeline import batches


@given(st.lists(st.integers(0, 6)), st.integers(1, 4))
def test_batches_are_of_one_shape_and_hold_every_item_once_in_its_shapes_order(shapes: list[int], size: int) -> None:
    items = list(enumerate(shapes))
    found = list(batches(items, size, lambda item: item[1], alone=lambda item: item[1] == 6))
    assert sorted(item for batch in found for item in batch) == items
    assert all(len({shape for _, shape in batch}) == 1 and len(batch) <= size for batch in found)
    assert all(len(batch) == 1 for batch in found if batch[0][1] == 6)
    for shape in set(shapes):
        own = [item for batch in found for item in batch if item[1] == shape]
        assert own == sorted(own)
