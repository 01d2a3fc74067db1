"""Test that a summary adds up the time of stages."""

import threading

from latent_codec.folders.summary import Summary


def test_stages_are_timed_in_all_threads_and_when_they_fail() -> None:
    summary, meet = Summary("encoded"), threading.Barrier(3)

    def wait() -> None:
        with summary.timing("coding"):
            meet.wait(10)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        with summary.timing("network"):
            meet.wait(10)
            raise ValueError
    except ValueError:
        pass
    for thread in threads:
        thread.join(10)
    assert summary.stages.keys() == {"coding", "network"}
    assert all(seconds > 0 for seconds in summary.stages.values())
