"""Pieces of work timed in turn, and the table of how they compare."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Missing:
    """A piece of work that this machine cannot measure, and why."""

    work: str
    why: str


@dataclass(frozen=True)
class Row:
    """A line of the table: how the seconds of a piece of work, one sample, compare with a peer's.

    ratio is work / peer, or peer / work where `faster`; low and high are its extremes over the rounds. A row
    of memory holds bytes: what is needed at the least, and the peak as a ratio of it. note: what else was
    counted.
    """

    work: str
    peer: str
    seconds: float
    peer_seconds: float
    ratio: float
    low: float
    high: float
    goal: float | None
    floor: float | None
    faster: bool = False
    peak_bytes: int | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.ratio >= self.goal if self.faster else self.ratio <= self.goal


def in_turn(works: Mapping[str, Work], samples: Mapping[str, int], rounds: int) -> dict[str, list[float]]:
    """Seconds a sample of each piece of work, all of them once in every round, after a round to warm up.

    A GPU is waited for before and after.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            _wait()
            start = time.perf_counter()
            work()
            _wait()
            if number:
                seconds[name].append((time.perf_counter() - start) / samples[name])
    return seconds


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def row(
    work: str,
    seconds: Mapping[str, Sequence[float]],
    ours: str,
    peer: str,
    goal: float | None,
    floor: float | None,
    faster: bool = False,
) -> Row:
    """The row of two pieces of work that `in_turn` has timed."""
    pairs = list(zip(seconds[ours], seconds[peer], strict=True))
    ratios = [b / a if faster else a / b for a, b in pairs]
    mine, its = (statistics.median(seconds[name]) for name in (ours, peer))
    middle = statistics.median(ratios)
    return Row(work, peer, mine, its, middle, min(ratios), max(ratios), goal, floor, faster)


def machine() -> dict[str, str | int | float]:
    """What the numbers were measured on, and how busy it was."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load": round(load, 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Row | Missing]) -> str:
    """The rows as text: seconds a sample, ratio with its extremes, goal, floor and peak memory."""
    head = ("work", "beside", "seconds", "its seconds", "ratio", "goal", "floor", "peak MB", "goal met")
    lines = [head, *(_cells(r) for r in rows if isinstance(r, Row))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"{r.work}: {r.note}" for r in rows if isinstance(r, Row) and r.note]
    text += [f"{r.work}: not measured: {r.why}" for r in rows if isinstance(r, Missing)]
    return "\n".join(text)


def _cells(r: Row) -> tuple[str, ...]:
    sign = ">=" if r.faster else "<="
    return (
        r.work,
        r.peer,
        f"{r.seconds:.3f}",
        f"{r.peer_seconds:.3f}" if r.peer_seconds else "",
        f"{r.ratio:.2f} ({r.low:.2f} to {r.high:.2f})",
        "" if r.goal is None else f"{sign} {r.goal:g}",
        "" if r.floor is None else f"{r.floor:.2f}",
        "" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.0f}",
        {True: "yes", False: "no", None: ""}[r.met],
    )
