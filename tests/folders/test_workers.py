"""Test that threads and processes lose nothing, run on after nothing, and begin little ahead."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.errors import FatalError, UserError
from latent_codec.folders import read_images
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Processes, Threads
from latent_codec.inference.options import ComputeOptions
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of
from tests.support.errors import refused
from tests.support.folder import Kind, finish, make, small_units, start, wait_for


@given(st.lists(st.integers(-5, 5)), st.integers(1, 3), st.none() | st.integers(1, 9))
def test_results_and_errors_come_in_order_few_begun_ahead(items: list[int], workers: int, ahead: int | None) -> None:
    begun: list[int] = []
    with Threads(workers) as threads:
        found = threads.map(lambda x: 60 // x, (begun.append(i) or i for i in items), ahead)
        for done, (item, future) in enumerate(found):
            assert item == items[done] and len(begun) <= done + (ahead or 2 * workers)
            assert future.exception() is None if item else isinstance(future.exception(), ZeroDivisionError)
            assert not item or future.result() == 60 // item
    assert begun == items


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_begun_comes_out_before_what_the_items_raise(error: type[BaseException]) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise error

    found: list[str] = []
    with Threads(2) as threads, pytest.raises(error):
        found.extend(future.result() for _, future in threads.map(str, items()))
    assert found == ["0", "1", "2"]


def test_stages_are_timed_in_all_threads_and_when_they_fail() -> None:
    summary, meet = Summary("encoded"), threading.Barrier(3)

    def wait(stage: Any) -> None:
        with summary.timing(stage):
            meet.wait(10)
            raise ValueError

    with Threads(3) as threads:
        assert all(future.exception() for _, future in threads.map(wait, ["coding", "coding", "network"]))
    assert summary.stages.keys() == {"coding", "network"} and all(s > 0 for s in summary.stages.values())


def fail(reason: str) -> None:
    raise UserError(reason)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_do_what_they_are_called_for_and_a_killed_one_is_one_clear_error_for_all() -> None:
    with Processes(1) as processes:
        pid = processes.call(os.getpid)
        assert pid != os.getpid() == Processes(0).call(os.getpid)
        refused("a reason", processes.call, fail, "a reason")
        assert processes.call(os.getpid) == pid
        for work in (killed, os.getpid):
            with pytest.raises(FatalError, match=r"was killed, .* fewer --workers"):
                processes.call(work)


@pytest.mark.slow
def test_processes_end_with_their_context_and_with_their_parent(tmp_path: Path) -> None:
    with Processes(1) as processes:
        pid = processes.call(os.getpid)
    assert finish(start(tell_and_die, tmp_path / "pid")) == -signal.SIGKILL
    for number in (pid, int((tmp_path / "pid").read_text())):
        wait_for(lambda number=number: not is_alive(number))


def tell_and_die(told: Path) -> None:
    processes = Processes(1)
    told.write_text(f"{processes.call(os.getpid)}")
    killed()


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def padded_or_die(name: str, *args: Any) -> Any:
    return killed() if name == "5.png" else read_images.padded(name, *args)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latents", "streams"])
def test_a_killed_process_of_decoding_costs_nothing(codec: Codec, tmp_path: Path, draw: Draw, kind: Kind) -> None:
    for i in range(8):
        draw(tmp_path / "photos" / f"{i}.png", 24, 16, seed=i)
    (tmp_path / "photos" / "bad.png").write_text("no image")
    threads, processes = tmp_path / "threads", tmp_path / "processes"

    def run(folder: Path) -> Summary:
        compute = ComputeOptions(batch_size=2, workers=1, decode_in=folder.name)
        return make(kind, codec, tmp_path / "photos", folder, compute, small_units(2))

    expected = run(threads)
    call = Processes.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "call", lambda self, _, *args: call(self, padded_or_die, *args))
        with pytest.raises(FatalError, match="was killed"):
            run(processes)
    before = {name: data for name, data in files_of(processes).items() if name.endswith(("lc", "rs"))}
    assert before and before.items() < files_of(threads).items()
    summary = run(processes)
    assert summary.skipped and summary.failures == expected.failures and summary.failures.keys() == {"bad.png"}
    assert files_of(processes) == files_of(threads)
