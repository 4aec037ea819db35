"""The number of threads: what is asked for, the environment, and the rule."""

import os
import subprocess
import sys

import psutil
import pytest

from fihelpers.threads import VARIABLE, patient, threads_for

USED = (
    "from fihelpers.threads import use_threads; import torch; use_threads({}); print(torch.get_num_threads())"
)
SCORING = """
import sys, time
from fihelpers import load_task, open_model, score_weights

model, questions = open_model("mini-lm"), load_task("bundled", n=64).examples
for line in sys.stdin:
    start = time.perf_counter()
    score_weights(model, questions, ["FI exact", "Jacobian norm"])
    print(time.perf_counter() - start, flush=True)
"""


def test_what_is_asked_for_comes_before_the_environment_and_that_before_the_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert (threads_for(), threads_for(2), threads_for(12)) == (None, 1, 1)
    monkeypatch.setenv(VARIABLE, "3")
    assert (threads_for(), threads_for(2)) == (3, 3)
    assert threads_for(2, asked=4) == 4


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=rf"OMP_NUM_THREADS must be a whole number .* not '{value}'"):
        threads_for()
    with pytest.raises(ValueError, match=r"the number of threads must be .* not '0'"):
        threads_for(asked=0)


def test_torch_takes_them() -> None:
    environment = {**os.environ, VARIABLE: "2"}
    for asked, used in (("", "2"), ("1", "1")):
        command = [sys.executable, "-c", USED.format(asked)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == used


def test_threads_sleep_while_they_wait_unless_it_is_set_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert patient() == {"OMP_WAIT_POLICY": "passive"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert patient() == {"OMP_WAIT_POLICY": "active"}


def seconds_side_by_side(count: int) -> float:
    """What the slowest of so many processes takes for the same scores, one thread each, the best of three.

    Each time they start together, after once to compile and warm up.
    """
    environment = {**os.environ, VARIABLE: "1"}
    command = [sys.executable, "-c", SCORING]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(count)]
    slowest = []
    for _ in range(4):
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        slowest.append(max(float(process.stdout.readline()) for process in processes))
    for process in processes:
        process.communicate()
    return min(slowest[1:])


@pytest.mark.alone
@pytest.mark.skipif((psutil.cpu_count(logical=False) or 1) < 2, reason="needs two cores")
def test_two_scoring_processes_leave_each_other_their_core() -> None:
    """They share caches and memory, which costs a little; to wait for each other would cost a hundredfold."""
    assert seconds_side_by_side(2) < 2 * seconds_side_by_side(1)
