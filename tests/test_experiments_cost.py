"""The cost chapter: the count is the one that runs, ratios come out, nothing is timed for long."""

import math
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from opening import NOTEBOOKS, settled

from fichapters import peers
from fichapters.ch10 import draw, lab
from fichapters.peers import Questions, Size
from fichapters.style import WIDTH
from fihelpers.jobs.preflight import plan_scores
from fihelpers.models.language import open_model
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.scores import hooks, weights
from fihelpers.tasks import Example

LESSON = "10_cost"
SMALL = Size(hidden=32, inner=96, layers=2, heads=4, vocabulary=40)


def parameters(**given: object) -> SimpleNamespace:
    return SimpleNamespace(**settled(LESSON, given, "smoke"))


@pytest.fixture(scope="module")
def seeing() -> VisionModel:
    return open_vision_model("mini-vlm")


@pytest.fixture(scope="module")
def pictures() -> list[Example]:
    return lab.pictures(parameters())


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """What the notebook's own cells define: `in_turn` and `in_times_of`."""
    cells = nbformat.read(NOTEBOOKS[LESSON], as_version=4).cells
    names: dict[str, Any] = {}
    exec("import time\nfrom itertools import product\nfrom fichapters.ch10 import lab", names)
    exec(next(c.source for c in cells if "def in_turn(" in c.source), names)
    return names


def test_bad_settings_are_refused_in_a_sentence() -> None:
    lab.check(parameters())
    for given, words in (
        ({"SIZE": {"hidden": 30, "inner": 9, "layers": 1, "heads": 4}}, "SIZE needs layers"),
        ({"BATCHES": [1]}, "BATCH_ROUNDS needs a number"),
        ({"BATCHES": [1, 10_000]}, "fewer than the 10000"),
        ({"LARGE": "Llama-9"}, "LARGE knows no 'Llama-9'"),
        ({"HARDWARE": {"A100": [1, 2]}}, "HARDWARE needs of 'A100'"),
    ):
        with pytest.raises(ValueError, match=words):
            lab.check(parameters(**given))


@pytest.mark.parametrize("tokens", [9, 24])
def test_the_count_by_hand_is_that_of_torch_on_the_bundled_model(tokens: int) -> None:
    counted = lab.count_table(open_model("mini-lm"), tokens)
    assert list(counted.index) == list(lab.WORKS)
    assert np.allclose(counted["in full"], counted["by torch"], rtol=1e-12)


def test_the_count_by_hand_is_that_of_torch_on_another_shape() -> None:
    counted = lab.count_table(Size(48, 80, 3, 6, 50).model(), 7)
    assert np.allclose(counted["in full"], counted["by torch"], rtol=1e-12)
    assert counted["Jacobian norms"][lab.JACOBIAN] == 1


def test_the_linear_weights_are_those_of_the_network() -> None:
    model = SMALL.model()
    assert peers.linear(model.network.config) == sum(w.numel() for _, w in lab.layers(model, 3))


@pytest.mark.parametrize(("classes", "fi", "stored"), [(2, 3, 5), (4, 7, 9), (9, 17, 19)])
def test_leading_terms(classes: int, fi: int, stored: int) -> None:
    assert sum(peers.passes(lab.FI, classes)) == fi
    assert sum(peers.passes(lab.STORED, classes)) == stored
    assert (sum(peers.passes(lab.FORWARD)), sum(peers.passes(lab.JACOBIAN))) == (1, 3)


def test_deep_models_tend_to_the_leading_term() -> None:
    deep = lab.LARGE["Llama-2-7B"]
    unit = 2 * peers.linear(deep) * 64
    count = sum(lab.operations(deep, 64, lab.FI).values()) / unit
    assert math.isclose(peers.linear(deep) / 1e9, 6.476, rel_tol=1e-3)
    assert math.isclose(count, 7, rel_tol=0.05)


def test_written_out_gradients_give_the_same_and_leave_the_engine_as_it_was() -> None:
    before, questions = hooks.BLOCK, Questions.draw(SMALL.model(), 6, 1)
    in_tiles = peers.fi_of_weights(questions)
    whole = lab.fi_written_out(questions)
    assert before == hooks.BLOCK and "cpu" in weights.TILED
    for name, value in in_tiles.items():
        assert (value - whole[name]).abs().max() <= 1e-3 * value.abs().max()


def test_works_take_turns(written: dict[str, Any]) -> None:
    done: list[str] = []
    works = {"b": (lambda: done.append("b"), 1), "a": (lambda: done.append("a"), 2)}
    timings = list(written["in_turn"](works, 2))
    assert done == ["b", "a"] * 3  # a round to warm up is not among the timings
    assert [(t["work"], t["round"]) for t in timings] == [("b", 0), ("a", 0), ("b", 1), ("a", 1)]
    assert all(t["seconds"] > 0 for t in timings)


def test_ratios_are_of_one_round(written: dict[str, Any]) -> None:
    seconds = {"z": [2.0, 6.0, 5.0], "peer": [1.0, 2.0, 2.0], "a": [0.5, 1.0, 1.0]}
    lines = [(work, i, s) for work, found in seconds.items() for i, s in enumerate(found)]
    table = written["in_times_of"]("peer", pd.DataFrame(lines, columns=["work", "round", "seconds"]))
    assert list(table.index) == ["z", "a"]
    assert table.loc["z"].tolist() == [2.5, 2.0, 3.0, 3]


@pytest.mark.parametrize(("rounds", "skipped"), [(2, 0), (5, 0), (6, 0), (8, 0), (9, 1), (15, 3), (20, 5)])
def test_the_interval_of_rounds_holds_the_median_at_95_percent(rounds: int, skipped: int) -> None:
    value, low, high = lab.middle([float(x) for x in reversed(range(rounds))])
    assert (value, low, high) == ((rounds - 1) / 2, skipped, rounds - 1 - skipped)
    missed = 2 * sum(math.comb(rounds, k) for k in range(skipped + 1)) / 2**rounds
    assert missed <= 0.05 or rounds < 6


def test_growth_stands_beside_the_count() -> None:
    model = SMALL.model()
    works = [("classes K", 2, 6, 2), ("classes K", 5, 6, 5)]
    lines = [(work, r, 1.0 + r) for r in range(3) for work in works]
    table = lab.growth_table(pd.DataFrame(lines, columns=["work", "round", "seconds"]), model)
    assert table.iloc[0, :6].tolist() == ["classes K", 2, 2.0, 1.0, 3.0, 3]
    assert table.operations[1] == sum(lab.operations(model.network.config, 6, lab.FI, 5).values())
    _fits(draw.growth(table, "small"))


def test_figures_hold_what_was_measured_counted_and_published() -> None:
    table = lab.middles(pd.DataFrame({"FI exact": [1.5, 1.7], "Captum saliency": [1.3, 1.4]}))
    figure = draw.dots({"batch 1": table}, {"FI exact": 2.0}, lab.JACOBIAN, "mini", lab.paper_ratios())
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "measured",
        "by the count",
        "published",
    }
    _fits(figure)


def test_pixels_take_as_many_passes_as_classes(seeing: VisionModel, pictures: list[Example]) -> None:
    count = lab.count_pixels(seeing, pictures[0])
    assert {"FI exact", "FI cut 0.001", "FI damped 0.0001", lab.GRADIENTS} == set(count)
    assert math.isclose(count["FI exact"], len(pictures[0].options) / 2, rel_tol=0.05)


def test_fi_without_gradients(pictures: list[Example]) -> None:
    exact = open_vision_model("mini-vlm", dtype="float64")
    found = lab.by_differences(exact, pictures[0], 3, [4, 8])
    assert (found.worst < 0.01).all()
    assert (found.passes[0], found.passes_all[0]) == (18, 2 * 3 * 112 * 112)


def test_bytes_and_seconds_are_foreseen_and_measured() -> None:
    table = lab.foreseen(SMALL.model(), 6, 1)
    assert set(table.index) == {(run, what) for run in lab.RUNS for what in ("memory, MB", "time, s")}
    assert (table[["predicted", "measured", "ratio"]] > 0).all(axis=None)
    memory = table.xs("memory, MB", level="what")
    assert (memory.over_least >= 1).all()
    assert memory.predicted["FI, at once"] >= memory.predicted["FI, block by block"]


def test_a_large_model_is_foreseen_from_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fihelpers.jobs.preflight.measure_rate", lambda *given, **settings: 1e-12)
    with lab.described("Llama-2-7B") as folder:
        asked: dict[str, Any] = {"measures": ["FI"], "batch_size": 1, "save_memory": True}
        plan = plan_scores(folder, lengths=[8], dtype="bfloat16", **asked)
    found = lab.gigabytes(plan)
    assert "Llama-2-7B" in plan.what and not folder.exists()
    assert math.isclose(found["weights"], 2 * plan.parameters / 1e9)
    assert math.isclose(found["scores at work"], 4 * peers.linear(lab.LARGE["Llama-2-7B"]) / 1e9)
    assert math.isclose(found["together"], plan.memory_bytes / 1e9)


def test_what_claims_rest_on_has_a_line_for_every_setting() -> None:
    steps = pd.DataFrame({"worst": [3e-3, 1e-3, 2e-3], "pixels": 4})
    columns = {"ratio": 4.0, "low": 3.0, "high": 5.0, "n": 6}
    pixels = pd.DataFrame(columns, index=["Captum saliency", "FI exact"])
    works = pd.DataFrame(columns, index=[lab.FI, lab.STORED])
    counted = pd.DataFrame({"in full": {lab.FI: 8.0, lab.JACOBIAN: 4.0}})
    places = pd.MultiIndex.from_tuples([("FI, block by block", "memory, MB")])
    foreseen = pd.DataFrame({"over_least": [1.25]}, index=places)
    given = ({"batch 1": pixels}, {"long": works}, {lab.GRADIENTS: 2.5}, counted, steps, works, foreseen)
    table = lab.claimed_ratios(parameters(), *given)
    assert table.of.tolist() == ["pixels", "weights", *["operations"] * 2, "differences", *["cost"] * 3]
    assert table.measure[0] == "FI exact" and table.n.tolist() == [6, 6, 1, 1, 4, 1, 6, 1]
    assert table.value.tolist() == [4, 4, 2.5, 2, 2e-3, 8, 0.5, 1.25]
    assert table.loc[4, ["low", "high"]].tolist() == [1e-3, 3e-3]
    # of a model that is named; the bundled one of pictures has its own run
    own = lab.claimed_ratios(parameters(MODEL="a"), *given)
    assert own.of.tolist() == ["weights", "operations", *["cost"] * 3]
    shown = lab.beside(pd.concat([table.assign(model="none"), own.assign(model="a\nb")]))
    assert shown.shape == (5, 2) and (shown["a, b"] == shown["none"]).all()
    assert shown.loc["time over the Jacobian norm, one by one", "a, b"] == "4.00 (3.00 to 5.00)"


def _fits(figure: Figure) -> None:
    assert figure.get_size_inches()[0] <= WIDTH
    figure.canvas.draw()
