"""How many CPU threads a process computes with: the one place that decides for all commands and chapters.

Two threads of one process wait for each other at each small operation. That costs little on a quiet machine;
beside another busy process it made a chapter many times slower, which one thread a process never is.
"""

import os

WAITING = "OMP_WAIT_POLICY"
VARIABLE = "OMP_NUM_THREADS"  # torch reads it when it is imported, and so do BLAS libraries


def threads_for(processes: int = 1, asked: int | None = None) -> int | None:
    """Return the threads of each of some processes side by side; None leaves torch all physical cores.

    What is asked for comes first, then the environment variable OMP_NUM_THREADS; else one thread where
    several processes compute. Raises ValueError for a number below one.
    """
    given = os.environ.get(VARIABLE) if asked is None else str(asked)
    if not given:
        return 1 if processes > 1 else None
    if not given.isdecimal() or int(given) < 1:
        place = VARIABLE if asked is None else "the number of threads"
        raise ValueError(f"{place} must be a whole number of at least 1, not {given!r}.")
    return int(given)


def patient() -> dict[str, str]:
    """The variable with which threads sleep while they wait for each other, unless it is set otherwise.

    By default they spin: beside one busy process two threads on two cores then take ten times as long and
    more, at each small operation; asleep they take less than half as long again. A process reads it as it
    starts.
    """
    return {WAITING: os.environ.get(WAITING, "passive")}


def use_threads(asked: int | None = None) -> None:
    """Let torch compute with the threads that :func:`threads_for` gives a process by itself."""
    threads = threads_for(asked=asked)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
