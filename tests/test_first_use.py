"""What a first experiment imports comes from the package itself, and importing it costs nothing."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import fihelpers
from fihelpers.answers import letters

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "pandas", "numpy", "numba", "matplotlib", "dask", "nbformat"}


def test_every_name_is_the_one_of_its_module() -> None:
    assert fihelpers.__all__ == sorted(fihelpers.__all__) and set(fihelpers.__all__) <= set(dir(fihelpers))
    for name in fihelpers.__all__:
        found = getattr(fihelpers, name)
        assert found.__name__ == name and found.__module__.startswith("fihelpers.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fihelpers.nothing  # noqa: B018


def test_a_first_experiment_needs_no_other_import() -> None:
    from fihelpers import Evaluator, load_task, open_model, score_weights, select, zeroed

    model, questions = open_model("mini-lm"), load_task("bundled", n=8).examples
    ask = Evaluator(model, questions, letters(model.tokenizer))
    scores = score_weights(model, questions, ["Jacobian norm"])["Jacobian norm"]
    before = ask()
    with zeroed(model, select(scores, 0.2)):
        damaged = ask()
    assert damaged.log_prob.mean() < before.log_prob.mean() == ask().log_prob.mean()


def seconds(*command: str) -> float:
    """Of a process, the best of three."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT)
        taken.append(time.perf_counter() - start)
    return min(taken)


@pytest.mark.alone
def test_the_package_is_imported_and_helps_at_once() -> None:
    assert seconds("-c", "import fihelpers") < 0.3
    assert seconds("-m", "fihelpers", "--help") < 0.5


@pytest.mark.parametrize(
    "program",
    [
        "import fihelpers; dir(fihelpers)",
        "from fihelpers.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_neither_loads_a_heavy_library(program: str) -> None:
    code = f"{program}\nimport sys\nprint('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not HEAVY & set(done.stdout.rpartition("loaded:")[2].split())
