"""The loop of every experiment: what it asks, keeps, pools and compares, and what makes it run again."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WriteChapter
from tiny import tiny_model

from fichapters.runs import run_chapter
from fihelpers.evaluate.questions import Evaluator
from fihelpers.evaluate.stats import crossed_difference, mean_interval, paired_difference, wilson
from fihelpers.identity import Unknown, identity
from fihelpers.perturb.sparsify import zeroed
from fihelpers.tasks import Example
from fihelpers.trials import Kept, Trials, collect

RNG = np.random.default_rng(0)
ANSWERS = RNG.integers(0, 2, (3, 2, 8))  # sets, measures, questions


def tries(k: int) -> Any:
    for place, measure in enumerate(("a", "b")):
        for rate in (0.1, 0.2):
            for subject in ("one", "two"):
                half = slice(0, 4) if subject == "one" else slice(4, 8)
                right = ANSWERS[k, place, half] * (rate < 0.15)
                labels = {"subject": subject, "measure": measure, "rate": rate}
                yield labels, {"correct": right, "log_prob": -1.0 - right}


def intact() -> dict[str, np.ndarray]:
    return {"correct": np.ones(4)}


@pytest.fixture(scope="module")
def trials() -> Trials:
    return collect({"one": intact, "two": intact}, tries, sets=3)


def test_means_and_intervals_are_over_sets_with_pooled_subjects(trials: Trials) -> None:
    table = trials.table("measure", "rate")
    assert list(zip(table.measure, table.rate, strict=True)) == [
        ("a", 0.1),
        ("a", 0.2),
        ("b", 0.1),
        ("b", 0.2),
    ]
    mean, low, high = mean_interval(ANSWERS[:, 0].mean(1))
    row = table.iloc[0]
    assert row.accuracy == pytest.approx(mean) and (row.sets, row.n) == (3, 8)
    assert [row.low, row.high] == pytest.approx([max(0, low), min(1, high)])
    assert row.log_prob == pytest.approx(-1 - ANSWERS[:, 0].mean())
    assert (table[table.rate == 0.2].accuracy == 0).all()
    assert trials.start().tolist() == [1] * 8 and trials.where(subject="one").start().tolist() == [1] * 4


def test_one_set_has_an_interval_over_its_questions() -> None:
    row = collect({"one": intact}, tries, sets=1).table("measure", "rate").iloc[0]
    assert [row.low, row.high] == pytest.approx(wilson(int(ANSWERS[0, 0].sum()), 8))


def test_differences_are_paired_question_by_question(trials: Trials) -> None:
    found = trials.compare([("a", "b"), ("b", "a")], "rate", seed=5)
    assert found.difference[0] == -found.difference[2]
    expected = crossed_difference(ANSWERS[:, 0], ANSWERS[:, 1], seed=5)
    assert tuple(found.loc[0, ["difference", "low", "high"]]) == expected and found.n[0] == 8
    assert (found[found.rate == 0.2][["difference", "low", "high"]] == 0).all(axis=None)
    assert set(found[found.rate == 0.2].verdict) == {"undecided"}
    one = collect({"x": intact}, tries).compare([("a", "b")], "rate", seed=5)
    assert tuple(one.loc[0, ["difference", "low", "high"]]) == paired_difference(*ANSWERS[0], seed=5)
    over = trials.compare([("a", "b")], "rate", over_sets=True).iloc[0]
    assert [over.difference, over.low, over.high] == pytest.approx(
        mean_interval((ANSWERS[:, 0] - ANSWERS[:, 1]).mean(1))
    )


def test_a_verdict_is_the_side_of_an_interval() -> None:
    def worse(k: int) -> Any:
        yield {"measure": "good"}, {"correct": np.ones(50)}
        yield {"measure": "bad"}, {"correct": np.arange(50) % 5 == 0}

    found = collect(intact, worse, sets=2).compare([("bad", "good"), ("good", "bad"), ("bad", "bad")])
    assert list(found.verdict) == ["below", "above", "undecided"]


def test_what_is_not_there_is_named(trials: Trials) -> None:
    with pytest.raises(ValueError, match="no trial has measure = 'c'; the labels are subject, measure, rate"):
        trials.answers(measure="c")
    with pytest.raises(ValueError, match="no trial has the labels layer"):
        trials.table("layer")
    with pytest.raises(ValueError, match="no answer has 'rouge1'; it has correct, log_prob"):
        trials.table("measure", value="rouge1")


def test_batches_are_pooled_and_asked_one_by_one() -> None:
    def of_batch(batch: list[int]) -> Any:
        yield {"measure": "sign"}, {"correct": np.array(batch) > 0}

    found = collect(lambda batch: {"correct": np.ones(len(batch))}, of_batch, sets=[[1, -1], [2, 3, -4]])
    assert found.answers().tolist() == [[1, 0, 1, 1, 0]] and len(found.start()) == 5


def test_batched_questions_stand_in_the_order_of_their_ids() -> None:
    def batch(ids: tuple[str, ...]) -> Any:
        yield {"measure": "a"}, {"id": list(ids), "correct": [float(name == "q1") for name in ids]}

    def asked(ids: tuple[str, ...]) -> dict[str, list[float]]:
        return {"correct": [1.0] * len(ids)}

    found = [collect(asked, batch, sets=sets) for sets in ([("q3", "q1"), ("q2",)], [("q2", "q1", "q3")])]
    for trials in found:
        assert trials.answers().tolist() == [[1, 0, 0]]
        assert trials.answers("id").tolist() == [["q1", "q2", "q3"]]
    assert found[0].rows().id.tolist() == ["q3", "q1", "q2"]


def test_trials_are_put_together_and_none_counts_twice(trials: Trials) -> None:
    light, both = trials.where(rate=0.1), trials.where(rate=0.1) + trials
    assert len(light) < len(both) == len(trials)
    a, b = (
        found.table("measure", "rate").set_index(["measure", "rate"]).sort_index() for found in (both, trials)
    )
    pd.testing.assert_frame_equal(a, b)
    rows = trials.rows()
    assert len(rows) == ANSWERS.size * 2 and set(rows) >= {"set", "measure", "rate", "subject", "log_prob"}


def test_a_finished_set_is_not_run_again_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    run: list[int] = []

    def stops(k: int) -> Any:
        run.append(k)
        if k == 1 and run.count(1) == 1:
            raise KeyboardInterrupt
        yield from tries(k)

    kept = Kept(tmp_path, "numbers", "about")
    wrapped = _Silent(stops)
    with pytest.raises(KeyboardInterrupt):
        collect({"one": intact, "two": intact}, wrapped, sets=3, kept=kept)
    assert len(list(tmp_path.iterdir())) == 1
    again = collect({"one": intact, "two": intact}, wrapped, sets=3, kept=kept)
    assert run == [0, 1, 1, 2]
    third = collect({"one": intact, "two": intact}, wrapped, sets=3, kept=kept)
    assert run == [0, 1, 1, 2]
    whole = collect({"one": intact, "two": intact}, tries, sets=3)
    for found in (again, third):
        pd.testing.assert_frame_equal(found.table("measure", "rate"), whole.table("measure", "rate"))


class _Silent:
    """Tries whose log does not count for what they are kept under."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, k: int) -> Any:
        return self.run(k)

    def identity(self) -> str:
        return "silent"


def defined(source: str, **names: Any) -> Any:
    """The function `f` of a notebook's cell."""
    space: dict[str, Any] = {"__name__": "__main__", **names}
    exec(source, space)
    return space["f"]


BASE = "SHARE = .1\ndef g(x):\n    return 2 * x\ndef f(k):\n    return g(k) * SHARE\n"


def test_code_and_values_that_a_function_uses_count_and_nothing_else_does() -> None:
    same = identity(defined(BASE))
    assert identity(defined(BASE.replace("    return 2", "    # twice\n\n    return 2"))) == same
    assert identity(defined(BASE + "OTHER = 3\ndef h():\n    return 1\n")) == same
    for old, new in [("2 * x", "3 * x"), (".1", ".2"), ("g(k) *", "g(k) +"), ("f(k)", "f(k, more=1)")]:
        assert identity(defined(BASE.replace(old, new))) != same


def test_what_has_no_hash_is_named_and_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = "def f(k):\n    return thing\n"
    with pytest.raises(Unknown, match="thing, of the type object"):
        identity(defined(source, thing=object()))
    space = {"thing": object(), "__name__": "__main__"}
    exec("def f(k):\n    thing\n    yield {'measure': 'a'}, {'correct': [1]}\n", space)
    found = collect(lambda: {"correct": [1]}, space["f"], kept=Kept(tmp_path, "x", ""))  # type: ignore[arg-type]
    assert len(found) == 1 and not list(tmp_path.iterdir())
    assert "“x” is not kept, since there is no hash of thing" in caplog.text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0), ("1", 1), ([1, 2], [2, 1]), ({"a": 1}, {"a": 2}), ((), []), (None, False),
        (np.arange(3), np.arange(3.0)), (torch.ones(2), torch.ones(3)), (Path("a"), "a"),
        (pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]})), (SimpleNamespace(a=1), SimpleNamespace(a=2)),
    ],
)  # fmt: skip
def test_different_values_have_different_hashes(one: object, other: object) -> None:
    assert identity(one) == identity(one) != identity(other)


def test_a_model_is_its_weights_as_they_are_now() -> None:
    model, twin = tiny_model("qwen2"), tiny_model("qwen2")
    examples = [Example("1", "s", "w1 w2", (), None, "w1")]
    ask = Evaluator(model, examples)
    before = identity(model), identity(ask)
    assert identity(twin) == before[0] and identity(Evaluator(twin, examples)) == before[1]
    name = next(iter(dict(model.network.named_parameters())))
    with zeroed(model, {name: torch.tensor([0])}):
        assert identity(model) != before[0] and identity(ask) != before[1]
    assert (identity(model), identity(ask)) == before


def test_a_pair_is_compared_on_the_questions_of_both() -> None:
    def batch(ids: str) -> Any:
        for measure, asked in (("a", ids), ("b", ids[:2])):
            yield {"measure": measure}, {"id": list(asked), "correct": [c in "xz" for c in asked]}

    found = collect(None, batch, sets=["zyx", "wv"])
    assert not found.intact
    assert found.where(measure="a").answers("id").tolist() == [list("vwxyz")]
    row = found.compare([("a", "b")]).iloc[0]
    assert row.n == 4 and row.difference == 0  # v, w, y and z
    assert found.compare([("a", "a")]).n[0] == 5


LESSON = """
from fihelpers.trials import collect

def ask():
    return {"correct": [1, 1, 1, 0]}

def tries(k):
    with open("ran", "a") as file:
        file.write(f"{k} ")
    answers = [0, 1, 1, 0]  # perturb
    yield {"measure": "a"}, {"correct": answers}

trials = collect(ask, tries, sets=2, kept=run.kept("zeroing"))
table = trials.table("measure")
run.keep("zeroing", table)
print("accuracy", table.accuracy[0])
"""


def test_a_changed_figure_and_sentence_rerun_nothing_in_another_process(
    write_chapter: WriteChapter, tmp_path: Path
) -> None:
    """What a changed perturbation does is tested on the lessons, in one process."""
    out = tmp_path / "runs"

    def accuracy(notebook: Path) -> float:
        run_chapter(notebook, "smoke", {}, out)
        return float(pd.read_csv(out / "01_tiny.zeroing.csv").accuracy[0])

    assert accuracy(write_chapter(LESSON)) == 0.5
    assert Path("ran").read_text() == "0 1 "
    changed = write_chapter(LESSON.replace('print("accuracy"', 'print("Accuracy is"'), "print('a figure')")
    content = nbformat.read(changed, as_version=4)
    content.cells[0].source = "# Tiny\n\nAnother sentence."
    nbformat.write(content, changed)
    assert accuracy(changed) == 0.5 and Path("ran").read_text() == "0 1 "
    assert "Accuracy is" in json.dumps(nbformat.read(out / "01_tiny.ipynb", as_version=4))


def test_a_table_is_made_once_and_comes_back_as_it_was(tmp_path: Path) -> None:
    made: list[int] = []

    def make(n: int) -> pd.DataFrame:
        made.append(n)
        values = np.array([1 / 3, np.nan, 1e-20 / 3])[:n]
        table = {
            "a": values,
            "b": ["x", "01", ""][:n],
            "c": [True, False, True][:n],
            "d": np.arange(n, dtype=np.int32),
        }
        return pd.DataFrame(table, index=pd.Index(range(1, n + 1), name="place"))

    kept = Kept(tmp_path, "table", "about")
    make_it = _Silent(make)
    for n in (3, 3, 2, 3):
        pd.testing.assert_frame_equal(kept.frame(make_it, n), make(n), check_exact=True)
        made.pop()
    assert made == [3, 2]
