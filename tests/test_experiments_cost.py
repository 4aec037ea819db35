"""The cost chapter: the count is the one that runs, ratios and fits come out, nothing is timed for long."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from fichapters.bench import Questions, Size, fi_of_weights
from fichapters.ch04.lab import load_pictures
from fichapters.ch10 import draw, lab
from fichapters.style import WIDTH
from fihelpers.models.language import open_model
from fihelpers.models.vision import VisionModel, open_vision_model
from fihelpers.scores import hooks, weights
from fihelpers.tasks import Example

SMALL = Size(hidden=32, inner=96, layers=2, heads=4, vocabulary=40)
SHAPE = lab.Shape(hidden=32, inner=96, layers=2, heads=4, kv_heads=2, vocabulary=40)


@pytest.fixture(scope="module")
def seeing() -> VisionModel:
    return open_vision_model("mini-vlm")


@pytest.fixture(scope="module")
def pictures() -> list[Example]:
    return load_pictures("bundled-images", ["action"], 2, 0)[0]


@pytest.fixture
def timings() -> pd.DataFrame:
    seconds = {"FI": [2.0, 6.0, 5.0], "Jacobian norm": [1.0, 2.0, 2.0], lab.PRODUCT: [0.5, 1.0, 1.0]}
    return lab._frame(seconds)


@pytest.mark.parametrize("tokens", [9, 24])
def test_the_count_by_hand_is_that_of_torch_on_the_bundled_model(tokens: int) -> None:
    checked = lab.check_count(open_model("mini-lm"), tokens)
    assert list(checked.index) == list(lab.WORKS)
    assert (checked["by hand"] == checked["by torch"]).all()


def test_the_count_by_hand_is_that_of_torch_on_another_shape() -> None:
    checked = lab.check_count(Size(48, 80, 3, 6, 50).model(), 7)
    assert (checked["by hand"] == checked["by torch"]).all()


def test_the_shape_is_that_of_the_network() -> None:
    model = SMALL.model()
    assert lab.Shape.of(model) == SHAPE
    assert SHAPE.linear == sum(w.numel() for w in lab._matrices(model))
    whole = sum(w.numel() for w in model.network.parameters())
    assert 0.9 * whole < SHAPE.parameters < whole


@pytest.mark.parametrize(("classes", "fi", "stored"), [(2, 3, 5), (4, 7, 9), (9, 17, 19)])
def test_leading_terms(classes: int, fi: int, stored: int) -> None:
    assert lab.units(lab.FI, classes) == fi
    assert lab.units(lab.STORED, classes) == stored
    assert (lab.units(lab.FORWARD, classes), lab.units(lab.JACOBIAN, classes)) == (1, 3)


def test_long_prompts_of_deep_models_tend_to_the_leading_term() -> None:
    deep = lab.Shape(4096, 11008, 1000, 32, 32, 100)
    table = lab.count_table(deep, 2)
    fi = table.loc[lab.FI, ["forward", "back to the inputs", "back to the weights"]].sum()
    assert math.isclose(fi, 7, rel_tol=0.2) and fi < 7
    assert table.loc[lab.FORWARD, "forward"] == 1
    names = ["forward", "back to the inputs", "back to the weights", "attention", "output head"]
    assert np.allclose(table[names].sum(axis=1), table.together)


def test_bytes_of_written_out_gradients() -> None:
    assert lab.written_out(SHAPE, 4) == 12 * SHAPE.linear
    assert lab.tile_bytes(5) - lab.tile_bytes(4) == 4 * 4 * 512
    assert lab.combination(5) - lab.combination(4) == 2


def test_ratios_are_of_one_round(timings: pd.DataFrame) -> None:
    assert lab.ratios(timings, "FI", "Jacobian norm") == (2.5, 2.0, 3.0)
    table = lab.ratio_table(timings, "Jacobian norm")
    assert table.loc["Jacobian norm", ["ratio", "low", "high"]].tolist() == [1, 1, 1]
    assert table.loc["FI", "seconds"] == 5 and table.loc["FI", "n"] == 3


def test_floor_is_the_count_at_the_rate_of_products(timings: pd.DataFrame) -> None:
    table = lab.over_floor(timings, SHAPE, 16)
    units = sum(lab.operations(SHAPE, 16, lab.FI).values()) / (2 * SHAPE.linear * 16)
    assert table.loc["FI", "floor"] == units
    assert math.isclose(table.loc["FI", "ratio"], 5 / units)
    assert lab.PRODUCT not in table.index


def test_exponent_and_line_of_made_up_times() -> None:
    lines = [(lab.FI, x, r, 0.1 * (1 + r) * x**0.9) for r in range(3) for x in (1, 2, 4, 8)]
    swept = pd.DataFrame(lines, columns=["work", "value", "round", "seconds"])
    mean, low, high = lab.exponent(swept, lab.FI)
    assert np.allclose([mean, low, high], 0.9)
    line = lab.straight(swept.assign(seconds=3.0 + 2 * swept.value))
    assert np.allclose([line["intercept"], line["slope"], line["r2"]], [3, 2, 1])


def test_what_claims_rest_on_has_a_line_for_every_setting() -> None:
    steps = pd.DataFrame({"worst": [3e-3, 1e-3, 2e-3], "pixels": 4})
    cost = {"m": ((1.2, 1.1, 1.3), 7)}
    weights, pixels = {"w": ((2.4, 2.0, 3.0), 6)}, {("FI exact", "p"): ((4.0, 3.0, 5.0), 5)}
    table = lab.claimed_ratios(weights, pixels, {"c": 2.0}, steps, cost)
    assert table.of.tolist() == ["pixels", "weights", "operations", "differences", "cost"]
    assert table.measure[0] == "FI exact" and table.n.tolist() == [5, 6, 1, 4, 7]
    assert table.loc[3, ["value", "low", "high"]].tolist() == [2e-3, 1e-3, 3e-3]


@pytest.mark.parametrize(("rounds", "skipped"), [(2, 0), (5, 0), (6, 0), (8, 0), (9, 1), (15, 3), (20, 5)])
def test_the_interval_of_rounds_holds_the_median_at_95_percent(rounds: int, skipped: int) -> None:
    value, low, high = lab.middle([float(x) for x in reversed(range(rounds))])
    assert (value, low, high) == ((rounds - 1) / 2, skipped, rounds - 1 - skipped)
    missed = 2 * sum(math.comb(rounds, k) for k in range(skipped + 1)) / 2**rounds
    assert missed <= 0.05 or rounds < 6


def test_written_out_gradients_give_the_same_and_leave_the_engine_as_it_was() -> None:
    before, questions = hooks.BLOCK, Questions.draw(SMALL.model(), 6, 1)
    in_tiles = fi_of_weights(questions, 1)
    written = lab.fi_written_out(questions)
    assert before == hooks.BLOCK and "cpu" in weights.TILED
    for name, value in in_tiles.items():
        assert (value - written[name]).abs().max() <= 1e-3 * value.abs().max()


def test_works_and_sweeps_are_timed_in_every_round() -> None:
    long = lab.long_prompts(SMALL, 6, 1, 2)
    short = lab.short_prompts(SMALL, 5, 4, 2)
    assert {lab.PRODUCT, lab.WRITTEN, *lab.WORKS} == set(long.work)
    assert {lab.JACOBIAN, lab.FI, lab.ONE_BY_ONE, lab.STORED, lab.VMAP} == set(short.work)
    swept = [
        lab.sweep_classes(SMALL, [2, 5], 6, 1, 2),
        lab.sweep_tokens(SMALL, [4, 8], 1, 2),
        lab.sweep_prompts(SMALL, [1, 2], 4, 2),
        lab.sweep_batches(SMALL, [1, 2], 4, 2),
        lab.sweep_sizes([[32, 1], [64, 2]], 4, 1, 2),
    ]
    for found in (long, short, *swept):
        assert (found.seconds > 0).all() and set(found["round"]) == {0, 1}
    table = lab.sweep_table(pd.concat(swept))
    assert (table.n == 2).all() and table.of.nunique() == 5
    assert (table.low <= table.seconds).all() and (table.seconds <= table.high).all()
    assert lab.between(swept[3], 1, 2)[1] > 0
    figures = [
        draw.sweeps(table, ["linear weights N"]),
        draw.over_floor(lab.over_floor(long, SHAPE, 6)),
        draw.ratio_dots({"long": lab.ratio_table(long, lab.JACOBIAN)}, {lab.FI: 2.0}, "Jacobian norm"),
        draw.parts(lab.count_table(SHAPE, 6), "a small model"),
    ]
    for figure in figures:
        _fits(figure)


def test_pixels_take_as_many_passes_as_classes(seeing: VisionModel, pictures: list[Example]) -> None:
    count = lab.count_pixels(seeing, pictures[0])
    k = len(pictures[0].options)
    assert count[lab.FORWARD] < count[lab.JACOBIAN] < count[lab.FI]
    assert math.isclose(count[lab.FI] / count[lab.JACOBIAN], k / 2, rel_tol=0.05)


def test_pixels_are_timed_beside_their_peers(seeing: VisionModel, pictures: list[Example]) -> None:
    timed = lab.time_pixels(seeing, pictures, [1], [1])
    names = ["FI exact", "FI cut 0.001", "FI damped 0.0001"]
    assert set(timed.work) == {lab.PIXEL_JACOBIAN, lab.SALIENCY, lab.GRADIENTS, *names}
    _fits(draw.pixel_dots({1: lab.ratio_table(timed, lab.PIXEL_JACOBIAN)}, 2.0, lab.paper_ratio()))
    with pytest.raises(ValueError, match="3 pictures are needed"):
        lab.time_pixels(seeing, pictures, [3], [1])


def test_fi_without_gradients(pictures: list[Example]) -> None:
    exact = open_vision_model("mini-vlm", dtype="float64")
    found = lab.by_differences(exact, pictures[0], 3, [4, 8])
    assert (found.worst < 0.01).all()
    assert (found.passes[0], found.passes_all[0]) == (18, 2 * 3 * 112 * 112)


def test_bytes_and_seconds_are_foreseen_and_measured() -> None:
    table = lab.foreseen(SMALL, 6, 1)
    assert set(table.index) == {(run, what) for run in lab.RUNS for what in ("memory, MB", "time, s")}
    assert (table[["predicted", "measured", "ratio"]] > 0).all(axis=None)
    memory = table.xs("memory, MB", level="what")
    assert (memory.over_least >= 1).all()
    assert memory.predicted["FI and two moments"] > memory.predicted["FI, at once"]
    _fits(draw.foreseen_bars(table))


def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="memory and time could not be measured: "):
        lab.foreseen(Size(hidden=0), 4, 1)


def test_agreement_of_layers_is_drawn() -> None:
    table = pd.DataFrame({"overlap": [0.2, 0.8], "spearman": [0.5, math.nan]})
    _fits(draw.agreement_dots({"exact": table, "damped": table}))


def test_the_top_share_is_that_of_a_full_sort() -> None:
    timings, exact, tied = lab.pick_top(20_000, 0.013, 1, 0)
    assert exact and tied > 1 and set(timings.work) == {"two passes", "topk", "full sort"}


def test_large_models_are_reckoned() -> None:
    made = lab.large_models({"card": [500, 2000, 80]}, 0.5, 200)
    assert set(made.columns).isdisjoint(lab.readable_large(made).columns.drop("devices"))  # all have units
    table = made.set_index("model")
    seven, seventy = table.loc["Llama-2-7B"], table.loc["Llama-2-70B"]
    assert math.isclose(seven.linear, 6.476, rel_tol=1e-3)
    assert 0.9 < seven.operations / (14 * 6.476e9 * 200 / 1e12) < 1.1
    assert seven.over == 0 and seven.devices == 1
    assert seventy.over > 300 and seventy.devices == math.ceil(seventy.gigabytes / 80)
    faster = lab.large_models({"card": [1000, 2000, 80]}, 0.5, 200).set_index("model")
    assert math.isclose(faster.seconds["Qwen2-7B"], table.seconds["Qwen2-7B"] / 2)


def test_the_machine_is_named_by_its_size_alone() -> None:
    found = lab.machine_now()
    assert set(found) == {"cores", "threads", "load"}
    assert found["threads"] == torch.get_num_threads()


def _fits(figure: Figure) -> None:
    assert figure.get_size_inches()[0] <= WIDTH
    figure.canvas.draw()
