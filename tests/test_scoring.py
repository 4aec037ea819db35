"""Scores as a job: many processes, checkpoints, kills, full disks. What is killed has its own process."""

import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_examples, tiny_model

from fihelpers.__main__ import main
from fihelpers.filters import Cut, Damped, Exact, spectral_of
from fihelpers.jobs import preflight
from fihelpers.jobs import score as scoring
from fihelpers.jobs.preflight import plan_scores
from fihelpers.jobs.score import Processes, score_task
from fihelpers.models.language import LanguageModel, check_placed, open_model
from fihelpers.scores import hooks, weights
from fihelpers.scores.store import Scores
from fihelpers.scores.weights import score_weights
from fihelpers.tasks import Task, load_task
from fihelpers.tasks.base import make_task

ROOT = Path(__file__).resolve().parent.parent
N = 9
DAMPED = Damped(1e-4)
MEASURES = ["FI", "SNIP", "magnitude"]
ARGUMENTS = ["-n", str(N), "--measures", *MEASURES, "--spectral", "damped 1e-4", "--checkpoint-every", "0"]


def tiny_task(n: int = N) -> Task:
    return make_task("tiny", "tiny", "val", tiny_examples(n), None, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a file of contexts, for commands."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model("llama")
    model.network.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    (folder / "contexts.txt").write_text("".join(f"{e.prompt}\n" for e in tiny_examples(N)))
    return folder


def read(out: Path, measure: str = "FI-damped-0.0001") -> Scores:
    return Scores.load(out.with_name(f"{out.stem}.{measure}.safetensors"))


def equal(a: Scores, b: Scores) -> bool:
    return a.metadata == b.metadata and all(a[name].equal(b[name]) for name in a.values)


def farthest(a: Scores, b: Scores) -> float:
    """Largest difference, as a share of the largest score."""
    top = max(float(v.max()) for v in a.values.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a.values) / top


def command(saved: Path, out: Path, dtype: str = "float64") -> list[str]:
    places = [str(saved / "model"), str(saved / "contexts.txt"), "--out", str(out)]
    return ["score", *places, "--dtype", dtype, *ARGUMENTS, "--batch-size", "1"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments)


# Kills its own process, of the given rank, where its checkpoint of that number is about to take its name.
VICTIM = """
import json
import os
import signal
import sys
from pathlib import Path

from fihelpers.__main__ import main
from fihelpers.scores import store

rank, number, marker, arguments = json.loads(sys.argv[1])
real, written = os.replace, 0


def replace(source, target):
    global written
    written += 1
    if written == number and os.environ.get("RANK", "0") == rank and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)


store.os.replace = replace
sys.exit(main(arguments))
"""


@pytest.fixture
def victim(tmp_path: Path) -> Any:
    """Makes the arguments of a process that kills itself, once."""
    (tmp_path / "victim.py").write_text(VICTIM)
    numbers = itertools.count()

    def arguments(number: int, command: list[str], rank: str = "0") -> list[str]:
        marker = str(tmp_path / f"killed.{next(numbers)}")
        return [str(tmp_path / "victim.py"), json.dumps([rank, number, marker, command])]

    return arguments


def stop_after(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever adds up batches breaks off after this many."""
    real = scoring.accumulate

    def breaking(*arguments: Any, **options: Any) -> Iterator[int]:
        for done in real(*arguments, **options):
            yield done
            if done == number:
                raise InterruptedError("broken off")

    monkeypatch.setattr(scoring, "accumulate", breaking)


def test_one_process_writes_the_scores_of_the_library(tmp_path: Path) -> None:
    model, task, out = tiny_model("llama"), tiny_task(), tmp_path / "scores.safetensors"
    measures = [*MEASURES, "squared score"]
    truth = score_weights(model, task.examples, measures, DAMPED, batch_size=3)
    paths = score_task(model, task, out, measures, DAMPED, batch_size=4)
    assert [path.name for path in paths] == [
        "scores.FI-damped-0.0001.safetensors",
        "scores.SNIP.safetensors",
        "scores.magnitude.safetensors",
        "scores.squared-score.safetensors",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path in paths:
        scores = Scores.load(path)
        assert equal(scores, truth[scores.metadata["measure"]])
    assert score_task(model, task, out, ["FI"], DAMPED, batch_size=4) == [out]
    assert equal(Scores.load(out), truth["FI damped 0.0001"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_batches_and_blocks_do_not_change_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    """As for the number of processes, below; the scores of pieces are not those of the whole by accident."""
    model, task = tiny_model("llama"), tiny_task()
    model.network.to(dtype)
    score_task(model, task, tmp_path / "whole", ["FI"], DAMPED, batch_size=N)
    truth = Scores.load(tmp_path / "whole")
    assert max(float(v.max()) for v in truth.values.values()) > 0.1
    ways: list[dict[str, Any]] = [
        {"batch_size": 1},
        {"batch_size": 4},
        {"batch_size": 4, "save_memory": True},
        {"batch_size": N, "checkpoint_every": 0},
    ]
    for block, tiled in ((hooks.BLOCK, {"cpu"}), (hooks.BLOCK, set()), (64, set())):
        monkeypatch.setattr(hooks, "BLOCK", block)
        monkeypatch.setattr(weights, "TILED", tiled)
        for number, way in enumerate(ways):
            out = tmp_path / f"{block}.{len(tiled)}.{number}"
            score_task(model, task, out, ["FI"], DAMPED, **way)
            assert farthest(truth, Scores.load(out)) < tolerance


def test_two_processes_give_the_scores_of_one(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.safetensors"
    done = torchrun("-m", "fihelpers", *command(saved, out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(path) for path in sorted(tmp_path.glob("scores.*"))]
    compare_with_library(saved, out, "float64", 1e-10)


def compare_with_library(saved: Path, out: Path, dtype: str, tolerance: float) -> None:
    """The scores of some processes against those of one, in other batches (method 1b.8)."""
    model, task = open_model(saved / "model", dtype=dtype), load_task(saved / "contexts.txt", n=N)
    for name, truth in score_weights(model, task.examples, MEASURES, DAMPED, batch_size=4).items():
        ours = read(out, name.replace(" ", "-"))
        assert farthest(truth, ours) < tolerance
        assert {**ours.metadata, "per_example": ""} == {**truth.metadata, "per_example": ""}
        assert json.loads(ours.metadata["per_example"]) == pytest.approx(
            json.loads(truth.metadata["per_example"]), rel=1e-3
        )


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    saved: Path, tmp_path: Path, victim: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert main(command(saved, whole)) == 0
    done = run(*victim(4, command(saved, out)))
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "killed.safetensors.checkpoint"
    left = sorted(path.name for path in folder.iterdir())
    assert left[-1] == "0-of-1.safetensors" and len(left) == 2  # and the fourth, which has no name yet
    assert not list(tmp_path.glob("killed.*.safetensors"))
    assert main(command(saved, out)) == 0
    assert "going on after 3 of 9 batches" in capsys.readouterr().err
    for measure in ("FI-damped-0.0001", "SNIP", "magnitude"):
        assert equal(read(out, measure), read(whole, measure))
    assert not folder.exists()


def test_a_killed_process_ends_all_and_nothing_is_lost(saved: Path, tmp_path: Path, victim: Any) -> None:
    out = tmp_path / "scores.safetensors"
    arguments = command(saved, out, "float32")
    done = torchrun(*victim(2, arguments, rank="1"))
    assert done.returncode == 1
    assert "the same command goes on from" in done.stderr and "SIGKILL" in done.stderr
    assert not list(tmp_path.glob("scores.*.safetensors"))
    # once more, killed again later on, and now torchrun starts the processes again
    done = torchrun("--max-restarts", "1", *victim(2, arguments, rank="1"))
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    compare_with_library(saved, out, "float32", 1e-3)
    assert not list(tmp_path.glob("*.checkpoint"))


def test_a_run_told_to_stop_ends_its_batch_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, out = tiny_model("llama"), tiny_task(), tmp_path / "scores.safetensors"
    real, before = scoring.accumulate, signal.getsignal(signal.SIGTERM)

    def told(*arguments: Any, **options: Any) -> Iterator[int]:
        for done in real(*arguments, **options):
            if done == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield done

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "accumulate", told)
        with pytest.raises(
            RuntimeError, match=r"stopped after 4 of 9 batches; the same command goes on from .*checkpoint\."
        ):
            score_task(model, task, out, batch_size=1)
    assert signal.getsignal(signal.SIGTERM) == before and not out.exists()
    score_task(model, task, out, batch_size=1)
    score_task(model, task, tmp_path / "whole.safetensors", batch_size=1)
    assert equal(Scores.load(out), Scores.load(tmp_path / "whole.safetensors"))


@contextmanager
def full_disk() -> Iterator[None]:
    """The operating system stops every write half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, task, out = tiny_model("llama"), tiny_task(), tmp_path / "scores.safetensors"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(InterruptedError):
            score_task(model, task, out, batch_size=1, checkpoint_every=0)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk(), pytest.raises(OSError, match=r"scores.safetensors could not be written .*; make room"):
        score_task(model, task, out, batch_size=1, checkpoint_every=0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "no checkpoint" in line]
    assert len(lines) == 7
    assert "after 3 batches, the earlier one stays: " in lines[0] and lines[0].count("make room") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    score_task(model, task, out, batch_size=1, checkpoint_every=0)
    score_task(model, task, tmp_path / "whole.safetensors", batch_size=1)
    assert equal(Scores.load(out), Scores.load(tmp_path / "whole.safetensors"))
    with full_disk():
        stop_after(1, monkeypatch)
        with pytest.raises(InterruptedError):
            score_task(model, task, tmp_path / "new.safetensors", batch_size=1, checkpoint_every=0)
    assert "there is no earlier one" in capsys.readouterr().err
    assert not list(tmp_path.glob("new.safetensors.checkpoint/*"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, out = tiny_model("llama"), tiny_task(), tmp_path / "scores.safetensors"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(InterruptedError):
            score_task(model, task, out, batch_size=1, checkpoint_every=0)
    other = LanguageModel(model.network, model.tokenizer, "other", None, "1" * 64)
    for key, call in {
        "model 0000000000000000, not 1111111111111111": (other, task, out, ["FI"]),
        "measures": (model, task, out, ["SNIP"]),
        "task": (model, tiny_task(N - 1), out, ["FI"]),
    }.items():
        with pytest.raises(ValueError, match=rf"is of another run \({key}.*or remove it"):
            score_task(*call, batch_size=1)
    with pytest.raises(ValueError, match=r"of another run \(batch size 1, not 9\)"):
        score_task(model, task, out)
    monkeypatch.setattr(scoring, "_agree", lambda *arguments: None)
    with pytest.raises(ValueError, match=r"0-of-1.safetensors is of another run \(processes 1, not 2\)"):
        score_task(model, task, out, batch_size=1, team=Processes(1, 2))
    (path,) = (tmp_path / "scores.safetensors.checkpoint").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"0-of-1.safetensors is damaged \(.*; remove it"):
        score_task(model, task, out, batch_size=1)
    assert not out.exists()


def test_processes_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list[Any], own: Any) -> None:
        found[:] = [own, {**own, "model": "2"}]

    monkeypatch.setattr(scoring.dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"process 1 has another model than process 0 \('2', not '1'\)"):
        scoring._agree({"task": "0", "model": "1"}, Processes(0, 2))


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 40))
def test_batches_are_dealt_out_evenly(n: int, count: int, at_most: int) -> None:
    size = scoring._even(n, count, at_most)
    batches = -(-n // size)
    assert 1 <= size <= at_most
    rounds = -(-batches // count)
    assert rounds == -(-n // (count * at_most))  # as few as with the largest batches


def test_every_example_is_in_one_process(saved: Path) -> None:
    model, task = tiny_model("llama"), tiny_task(7)
    shares = [scoring._own_contexts(model, task, 2, Processes(rank, 5)) for rank in range(5)]
    assert [len(share) for share in shares] == [1, 1, 1, 1, 0]
    index = torch.cat([batch.index for share in shares for batch, _ in share])
    assert sorted(index.tolist()) == list(range(7))


def test_a_process_without_a_batch_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = tiny_model("llama"), tiny_task(5)
    sums: list[list[torch.Tensor]] = []
    monkeypatch.setattr(scoring, "_agree", lambda *arguments: None)
    monkeypatch.setattr(Processes, "add_up", lambda _, total: sums[-1].append(total))
    for rank in range(1, 4):  # the first one writes, the others do not
        sums.append([])
        score_task(model, task, tmp_path / "scores.safetensors", ["SNIP"], team=Processes(rank, 4))
    assert not any(total.any() for total in sums[2])
    assert all(any(total.any() for total in of) for of in sums[:2])
    assert not list(tmp_path.iterdir())


def test_a_model_behind_a_device_map_gives_the_same_scores(saved: Path, tmp_path: Path) -> None:
    task = load_task(saved / "contexts.txt", n=N)
    truth = score_weights(open_model(saved / "model", dtype="float64"), task.examples, ["FI"])["FI exact"]
    mapped = open_model(saved / "model", dtype="float64", device_map={"": "cpu"})
    assert equal(score_weights(mapped, task.examples, ["FI"])["FI exact"], truth)
    dispatch_model(mapped.network, {"": "cpu"}, force_hooks=True)  # with accelerate's hooks on every module
    assert equal(score_weights(mapped, task.examples, ["FI"])["FI exact"], truth)
    out = tmp_path / "mapped.safetensors"
    arguments = [str(saved / "model"), str(saved / "contexts.txt"), "--out", str(out), "--dtype", "float64"]
    assert main(["score", *arguments, "--device-map", "auto"]) == 0
    assert equal(Scores.load(out), truth)


def with_free_memory(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(size)))


def test_what_is_foreseen_is_printed_and_decides_the_way(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways: list[bool] = []
    real = scoring.accumulate

    def noted(*arguments: Any, **options: Any) -> Iterator[int]:
        ways.append(options["save_memory"])
        return real(*arguments, **options)

    monkeypatch.setattr(scoring, "accumulate", noted)
    places = ["score", str(saved / "model"), str(saved / "contexts.txt"), "--dtype", "float64", "--out"]
    settings = {"measures": ["FI"], "classes": 9, "dtype": "float64", "every": True}
    plans = [
        plan_scores(saved / "model", lengths=[6] * N, batch_size=N, save_memory=save, **settings)
        for save in (False, True)
    ]
    between = sum(plan.memory_bytes for plan in plans) / 2
    for name, free, flags, way in (
        ("whole", 1e12, [], "at once"),
        ("asked", 1e12, ["--save-memory"], "block by block (2 blocks)"),
        ("forced", between, [], "block by block (2 blocks)"),
    ):
        with_free_memory(free, monkeypatch)
        assert main([*places, str(tmp_path / name), *flags]) == 0
        told = capsys.readouterr()
        assert f"parameters, {way}\n  time: about " in told.err and told.out == f"{tmp_path / name}\n"
    assert ways == [False, True, True]
    assert farthest(Scores.load(tmp_path / "whole"), Scores.load(tmp_path / "forced")) < 1e-10


def test_a_run_that_does_not_fit_is_refused_before_the_model_is_opened(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(saved / "model"), str(saved / "contexts.txt"), "--out", str(tmp_path / "out.safetensors")]
    monkeypatch.setattr("fihelpers.models.language.open_network", None)  # opening would fail
    settings = {"measures": ["FI"], "classes": 9, "every": True}
    whole = plan_scores(saved / "model", lengths=[6] * N, save_memory=True, **settings).memory_bytes
    single = plan_scores(saved / "model", lengths=[6] * N, save_memory=True, batch_size=1, **settings)
    for free, remedy in (
        (single.memory_bytes + 1, r"with batch_size=1 and save_memory=True it needs .* and fits\."),
        (10, r"even with .*bfloat16.* it needs .* MB: choose a smaller model or a larger machine\."),
    ):
        assert free < whole
        with_free_memory(free, monkeypatch)
        assert main(["score", *places]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(r"needs .* MB of memory, .* MB more than the .* MB that are free; " + remedy, line)
    assert not list(tmp_path.iterdir())


def test_all_processes_take_the_way_of_the_first(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(saved / "contexts.txt", n=N)
    sent: list[Any] = []

    def broadcast(found: list[Any], **others: Any) -> None:
        sent.append(found[0])
        if not isinstance(sent[0], RuntimeError):
            found[0] = sent[0]

    monkeypatch.setattr(scoring.dist, "broadcast_object_list", broadcast)
    out = tmp_path / "out"
    first = scoring.foresee(str(saved / "model"), task, out, team=Processes(0, 2))
    assert scoring.foresee(str(saved / "model"), task, out, team=Processes(1, 2)) is first
    assert first.path == "at once, in 2 processes"
    alone = scoring.foresee(str(saved / "model"), task, out)
    held = [plan.parts["memory"]["weights"] for plan in (first, alone)]
    assert held[0] == 2 * held[1]  # each process has the model
    sent.clear()
    with_free_memory(10, monkeypatch)
    for rank in (0, 1):
        with pytest.raises(MemoryError, match="choose a smaller model"):
            scoring.foresee(str(saved / "model"), task, out, team=Processes(rank, 2))


def test_a_model_that_does_not_fit_is_refused(saved: Path) -> None:
    model = open_model(saved / "model")
    check_placed(model.network, "tiny")
    cpu_offload(model.network, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'tiny' does not fit: .* GB of its .* GB found no room"):
        check_placed(model.network, "tiny")


def test_bad_counts_of_processes_are_named(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    places = [str(saved / "model"), str(saved / "contexts.txt"), "--out", str(tmp_path / "out.safetensors")]
    assert main(["score", *places, "-n", "2"]) == 1
    assert capsys.readouterr().err == (
        "fihelpers: 3 processes are too many for n = 2; start 2 or fewer, or raise n.\n"
    )
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(ValueError, match=r"3 processes are too many for n = 2; start 2 or fewer"),
        scoring.processes(torch.device("cpu"), 2),
    ):
        pass
    with pytest.raises(ValueError, match="start one process"):
        scoring.own_device("cuda", "auto")
    assert scoring.own_device("cuda") == "cuda:2" and scoring.own_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spectral", "cuts"], "unknown filter 'cuts'"),
        (["--spectral", "damped -1"], "unknown filter 'damped -1'"),
        (["--measures", "Fi"], "Unknown measure 'Fi'"),
        (["--batch-size", "0"], "the batch size must be at least 1, got 0."),
        (["-n", "99"], "has 9 examples, fewer than the 99 asked for"),
    ],
)
def test_bad_input_is_one_sentence(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = [str(saved / "model"), str(saved / "contexts.txt"), "--out", str(tmp_path / "out.safetensors")]
    assert main(["score", *places, *arguments]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("fihelpers: ")]
    assert message in line
    assert not list(tmp_path.iterdir())


def test_fi_with_any_filter_is_scored(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    names = ["FI damped 0.01", "FI cut 1e-1", "SNIP"]
    places = [str(saved / "model"), str(saved / "contexts.txt"), "--out", str(out)]
    assert main(["score", *places, "-n", "2", "--measures", *names]) == 0
    one = tmp_path / "one.safetensors"
    assert main(["score", *places[:2], "--out", str(one), "-n", "2", "--spectral", "damped 0.01"]) == 0
    found = Scores.load(tmp_path / "out.FI-damped-0.01.safetensors")
    assert found.metadata["measure"] == "FI damped 0.01"
    for name, values in Scores.load(one).values.items():
        assert torch.allclose(found[name], values)
    assert Scores.load(tmp_path / "out.FI-cut-0.1.safetensors").metadata["measure"] == "FI cut 0.1"


def test_an_unknown_measure_is_said_before_a_task_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    places = ["no/model", "no/task", "--out", str(tmp_path / "out.safetensors")]
    assert main(["score", *places, "--measures", "FI", "FI damped -1"]) == 1
    assert "Unknown measure 'FI damped -1': unknown filter 'damped -1'" in capsys.readouterr().err


@pytest.mark.parametrize("spectral", [Exact(), Exact(1e-6), Cut(1e-3), Damped(1e-4)])
def test_a_filter_is_read_as_it_prints(spectral: Any) -> None:
    assert spectral_of(str(spectral)) == spectral
    with pytest.raises(ValueError, match="unknown filter 'exact 1 2'"):
        spectral_of("exact 1 2")
