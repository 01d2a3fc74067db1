"""What a command says at its end."""

import threading

from latent_codec.folders.summary import Summary


def test_it_says_what_there_is_to_say() -> None:
    summary = Summary(
        "encoded", found=10, done=2, skipped=3, elsewhere=4, bytes_in=10**6, bytes_out=10**5, pixels=10**6, seconds=0.5
    )
    summary.failures["a.png"] = "bad"
    summary.stages |= {"writing": 0.25, "decode": 1.0}
    assert str(summary) == (
        "encoded 2 of 10 images, 3 skipped, 4 by other processes, 1 failed in 0.5 s (4.0 images/s); "
        "1.00 MB in (2.00 MB/s), 0.10 MB out (0.20 MB/s), ratio 10.00, 0.800 bits per pixel\n"
        "time in stages, side by side: decode 1.0 s, writing 0.2 s"
    )
    assert str(Summary("decoded", found=3, skipped=3)) == "decoded 0 of 3 images, 3 skipped in 0.0 s"


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
