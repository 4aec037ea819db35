"""Scores of weights as a job: by one process or many, with checkpoints from which a killed run goes on.

    python -m fihelpers score MODEL TASK --out scores.safetensors
    torchrun --nproc_per_node 4 -m fihelpers score MODEL TASK --out scores.safetensors

The batches of the calibration set are dealt out to the processes, each sums its own, and the sums are added
up. A checkpoint is the state of one process between two batches, so a run that is taken up again adds the
same numbers in the same order as one that never stopped (block by block or at once, they differ by rounding).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from fihelpers.answers import Answers, usual_answers
from fihelpers.data import package_sha256
from fihelpers.filters import EXACT, Spectral
from fihelpers.jobs.preflight import Estimate, plan_scores, prompt_lengths
from fihelpers.measures import Measure, find_measure
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.scores.hooks import named_parameters
from fihelpers.scores.store import provenance, save_tensors
from fihelpers.scores.weights import Totals, accumulate
from fihelpers.tasks import Task

CHECKPOINT_EVERY = 300.0  # seconds
LETTERS, LIKELIEST = 4, 9  # classes that `usual_answers` makes of lettered questions and of plain text
PATIENCE = timedelta(
    days=1
)  # how long a process that is done waits for the others; a dead one is seen at once

Settings = dict[str, str]


@dataclass(frozen=True)
class Processes:
    """This process among those that share a job."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add_up(self, total: torch.Tensor) -> None:
        """Replace this process's total by the sum of all, for which each waits."""
        if self.count > 1:
            dist.all_reduce(total)


ALONE = Processes()


@contextmanager
def processes(device: torch.device, n: int) -> Iterator[Processes]:
    """The processes that torchrun started for n examples, joined by gloo, and by nccl where each has a GPU.

    Without torchrun there is one. Raises ValueError for more processes than examples.
    """
    count = _count()
    if count > n:
        raise ValueError(f"{count} processes are too many for n = {n}; start {n} or fewer, or raise n.")
    if count == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun's restarts share a store, in which the addresses of the processes that died still stand
    attempt = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        yield Processes(rank, count)
    finally:
        dist.destroy_process_group()


def own_device(name: str, device_map: str | None = None) -> str:
    """The device of this process: of plain "cuda" each process of a machine takes its own GPU.

    Raises ValueError for a device map in several processes, as it gives one of them all the GPUs.
    """
    if device_map and _count() > 1:
        raise ValueError(f"--device-map {device_map} spreads one model over all GPUs; start one process.")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def foresee(
    model_name: str,
    task: Task,
    out: Path,
    measures: Sequence[str] = ("FI",),
    spectral: Spectral = EXACT,
    *,
    revision: str | None = None,
    batch_size: int = 16,
    team: Processes = ALONE,
    **settings: Any,
) -> Estimate:
    """What `score_task` will need and which way it is to take, before the model is opened or downloaded.

    settings: as for `plan_scores`. The first process estimates for all. Raises MemoryError or OSError where
    the run does not fit, with how much is missing and what would fit, and what `estimate_scores` raises.
    """
    found: list[Estimate | Exception] = [RuntimeError("process 0 made no estimate.")]
    if team.first:
        try:
            lengths = prompt_lengths(model_name, [example.prompt for example in task], revision)
            found[0] = plan_scores(
                model_name,
                measures=[find_measure(name, spectral) for name in measures],
                revision=revision,
                batch_size=_even(len(task), team.count, batch_size),
                lengths=lengths,
                classes=LETTERS if task.examples[0].options else LIKELIEST,
                every=True,
                processes=team.count,
                out=out.parent,
                **settings,
            ).check()
        except Exception as error:  # the others wait, and end with the same words
            found[0] = error
    if team.count > 1:
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def score_task(
    model: LanguageModel,
    task: Task,
    out: Path,
    measures: Sequence[str] = ("FI",),
    spectral: Spectral = EXACT,
    *,
    batch_size: int = 16,
    save_memory: bool = False,
    checkpoint_every: float = CHECKPOINT_EVERY,
    team: Processes = ALONE,
) -> list[Path]:
    """Score every weight as `score_weights` does, and write each measure's `Scores`; returns their paths.

    measures: names as in `find_measure`, "FI" with the filter `spectral`. One goes
    to `out`, of several each to its own file beside it: scores.safetensors becomes scores.SNIP.safetensors.
    save_memory: go through the model block by block; the scores are the same but for rounding.
    checkpoint_every: seconds between checkpoints (0: one after every batch) in the folder `out`.checkpoint,
    from which the same call goes on; they go once the scores are written.

    Raises ValueError for bad input or a checkpoint of another run, RuntimeError where another process is lost
    or the job is told to stop, OSError where the scores cannot be written; the checkpoints stay.
    """
    if any(example.image for example in task):
        raise ValueError(f"task {task.name!r} asks about images; weights are scored on text.")
    classes = usual_answers(model.tokenizer, task.examples)
    chosen = {m.name: m for m in (find_measure(name, spectral) for name in measures)}
    size = _even(len(task), team.count, batch_size)
    kept = Checkpoint(out, _settings(model, task, chosen, classes, size, team), checkpoint_every, team)
    with _told_of_losses(kept):
        _agree(kept.settings, team)
    totals = Totals(chosen, named_parameters(model.network, None), len(task))
    _add_up(model, _own_contexts(model, task, size, team), totals, classes, kept, save_memory)
    paths = _paths(out, list(chosen))
    with _told_of_losses(kept):
        for total in totals.tensors().values():
            team.add_up(total)
    if team.first:
        about = provenance(model, task.examples) | {"classes": str(classes)}
        for name, scores in totals.scores(about).items():
            scores.save(paths[name])
    with _told_of_losses(kept):  # who waits here knows that the scores are written, or that they are not
        team.add_up(torch.zeros(1))
    kept.remove()
    return list(paths.values())


@dataclass
class Checkpoint:
    """The totals of one process after a number of batches, on disk in the folder `out`.checkpoint."""

    out: Path
    settings: Settings
    every: float
    team: Processes
    written: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.checkpoint")

    @property
    def path(self) -> Path:
        return self.folder / f"{self.team.rank}-of-{self.team.count}.safetensors"

    @property
    def due(self) -> bool:
        return time.monotonic() - self.written >= self.every

    def load(self, totals: Totals) -> int:
        """Take up what is there; returns how many batches it holds, 0 where there is none.

        Raises ValueError for a checkpoint of another run, and for a damaged one.
        """
        for half in self.folder.glob(f".{self.path.name}.*"):  # of a run that was killed while it wrote
            shutil.rmtree(half, ignore_errors=True)
        for other in sorted(self.folder.glob("*-of-*.safetensors")):
            self._refuse(other, "processes", other.stem.partition("-of-")[2], str(self.team.count))
        if not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                was = json.loads(metadata["settings"])
                for key, now in self.settings.items():
                    self._refuse(self.path, key, was.get(key, ""), now)
                for name, total in totals.tensors().items():
                    total.copy_(file.get_tensor(name))
                return int(metadata["done"])
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint {self.path} is damaged ({error}); remove it.") from error

    def save(self, totals: Totals, done: int) -> None:
        """Replace the checkpoint; where that fails say so and keep the earlier one, as the work can go on."""
        metadata = {"settings": json.dumps(self.settings), "done": str(done)}
        try:
            save_tensors(self.path, totals.tensors(), metadata)
        except OSError as error:
            earlier = "the earlier one stays" if self.path.is_file() else "there is no earlier one"
            print(f"fihelpers: no checkpoint after {done} batches, {earlier}: {error}", file=sys.stderr)
        self.written = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # it goes with the last process's checkpoint
            self.folder.rmdir()

    def hint(self) -> str:
        """What to do after a stop, in the words of what is there."""
        if self.path.is_file():
            return f"the same command goes on from {self.folder}."
        return "there was no checkpoint yet, so the same command starts anew."

    def _refuse(self, path: Path, key: str, was: str, now: str) -> None:
        if was != now:
            raise ValueError(
                f"{path} is of another run ({key} {was}, not {now}); repeat that run's settings, choose "
                "another --out, or remove it."
            )


def _even(n: int, count: int, at_most: int) -> int:
    """The batch size with which all processes have work in every round, as far as n allows."""
    if at_most < 1:
        raise ValueError(f"the batch size must be at least 1, got {at_most}.")
    rounds = math.ceil(n / (count * at_most))
    return math.ceil(n / (count * rounds))


def _settings(
    model: LanguageModel,
    task: Task,
    chosen: Mapping[str, Measure],
    classes: Answers,
    size: int,
    team: Processes,
) -> Settings:
    """All that decides the running totals, so that nothing else is ever added to them."""
    return {
        "model": model.sha256[:16],
        "dtype": str(model.network.dtype),
        "task": task.sha256[:16],
        "n": str(len(task)),
        "measures": json.dumps(list(chosen)),
        "classes": str(classes),
        "batch size": str(size),
        "processes": str(team.count),
        "package": package_sha256()[:16],
        "torch": version("torch"),
    }


def _agree(settings: Settings, team: Processes) -> None:
    """Raises ValueError where a process, of another machine perhaps, works on something else."""
    found: list[Settings] = [settings] * team.count
    if team.count > 1:
        dist.all_gather_object(found, settings)
    for rank, other in enumerate(found):
        for key, value in found[0].items():
            if other[key] != value:
                raise ValueError(
                    f"process {rank} has another {key} than process 0 ({other[key]!r}, not {value!r}); "
                    "start all with the same files and arguments."
                )


def _own_contexts(
    model: LanguageModel, task: Task, size: int, team: Processes
) -> list[tuple[Batch, torch.Tensor]]:
    """Every so-manieth batch of all; they are sorted by length, so each process gets short and long ones."""
    batches = model.batches([example.prompt for example in task], size)
    return [(batch, torch.ones(len(batch.index))) for batch in batches[team.rank :: team.count]]


def _add_up(
    model: LanguageModel,
    contexts: list[tuple[Batch, torch.Tensor]],
    totals: Totals,
    classes: Answers,
    kept: Checkpoint,
    save_memory: bool,
) -> None:
    """Add what is not yet in the totals, with checkpoints on the way.

    Where processes wait for each other there is one at the end too, as another may be lost meanwhile.
    """
    start = kept.load(totals)
    steps: Iterable[int] = ()
    if contexts:
        steps = accumulate(model, contexts, totals, classes, start, save_memory=save_memory)
    if start and kept.team.first:
        print(f"fihelpers: going on after {start} of {len(contexts)} batches", file=sys.stderr)
    several = kept.team.count > 1
    bar = tqdm(total=len(contexts), initial=start, desc="scoring", unit="batch", disable=not kept.team.first)
    with bar, _asked_to_stop() as asked:
        for done in steps:
            bar.update()
            if asked or kept.due or (several and done == len(contexts)):
                kept.save(totals, done)
            if asked and done < len(contexts):
                raise RuntimeError(f"stopped after {done} of {len(contexts)} batches; {kept.hint()}")


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Filled when SIGTERM comes, as torchrun sends where another process fails: the batch is ended first."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where no signal can be caught
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _told_of_losses(kept: Checkpoint) -> Iterator[None]:
    """A broken connection means that another process is gone; the library's message says less."""
    try:
        yield
    except RuntimeError as error:
        if kept.team.count == 1:
            raise
        raise RuntimeError(f"process {kept.team.rank} lost another process; {kept.hint()}") from error


def _paths(out: Path, names: list[str]) -> dict[str, Path]:
    if len(names) == 1:
        return {names[0]: out}
    return {name: out.with_name(f"{out.stem}.{name.replace(' ', '-')}{out.suffix}") for name in names}
