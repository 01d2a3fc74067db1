"""Work in threads and in batches: nothing is lost, nothing runs on, and little waits."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.pipeline import Summary, Threads, batches


@given(st.lists(st.integers(-5, 5)), st.integers(1, 3), st.none() | st.integers(1, 9))
def test_results_come_in_order_with_their_items_errors_too(items: list[int], workers: int, ahead: int | None) -> None:
    with Threads(workers) as threads:
        found = list(threads.map(lambda x: 60 // x, items, ahead))
    assert [item for item, _ in found] == items
    for item, future in found:
        assert future.exception() is None if item else isinstance(future.exception(), ZeroDivisionError)
        assert not item or future.result() == 60 // item


@given(st.integers(0, 20), st.integers(1, 3), st.integers(1, 9))
def test_no_more_than_a_few_are_begun_ahead(count: int, workers: int, ahead: int) -> None:
    begun: list[int] = []
    items = (begun.append(i) for i in range(count))
    with Threads(workers) as threads:
        for done, _ in enumerate(threads.map(str, items, ahead)):
            assert len(begun) <= done + ahead


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_begun_comes_out_before_what_the_items_raise(error: type[BaseException]) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise error

    found: list[str] = []
    with Threads(2) as threads, pytest.raises(error):
        for _, future in threads.map(str, items()):
            found.append(future.result())
    assert found == ["0", "1", "2"]


def test_threads_end_with_their_context_though_a_generator_lives_on() -> None:
    with pytest.raises(KeyboardInterrupt), Threads(2) as threads:
        alive = threads.map(str, range(100))
        next(alive)
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
    alive.close()  # pyright: ignore[reportAttributeAccessIssue]


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


def test_a_summary_says_what_there_is_to_say() -> None:
    summary = Summary(
        "encoded", found=10, done=2, skipped=3, elsewhere=4, bytes_in=10**6, bytes_out=10**5, pixels=10**6
    )
    summary.failures["a.png"] = "bad"
    text = str(summary)
    assert text.startswith("encoded 2 of 10 images, 3 skipped, 4 by other processes, 1 failed in 0.0 s (")
    assert text.endswith("1.00 MB in, 0.10 MB out, 0.800 bits per pixel")
    assert str(Summary("decoded", found=3, skipped=3)) == "decoded 0 of 3 images, 3 skipped in 0.0 s"
