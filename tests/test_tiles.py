"""Measures tile by tile are those of `measures`, whatever the shapes, and NaN does not hide in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher
from tiny import tiny_examples, tiny_model

from fihelpers import influence
from fihelpers.filters import Cut, Damped, Exact
from fihelpers.influence import ceiling
from fihelpers.measures import MEASURES, DataFree, Elementwise, Influence, Measure
from fihelpers.scores.hooks import Factors
from fihelpers.scores.kernels import cpu as tiles
from fihelpers.scores.kernels.formulas import CUT, add_by_torch, formula, measure_of
from fihelpers.scores.weights import score_weights

MEASURED = [m for m in MEASURES.values() if not isinstance(m, DataFree)]


def factors_of(
    samples: int,
    tokens: int,
    out: int,
    width: int,
    directions: int = 4,
    start: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Factors:
    torch.manual_seed(samples + tokens)
    grads = torch.randn(directions, samples, tokens, out, dtype=dtype)
    grads[:, :, :start] = 0
    x = torch.randn(samples, tokens, width, dtype=dtype)
    top = ceiling(torch.softmax(torch.randn(4, samples, dtype=dtype), 0))
    return Factors("layer", list(grads), x, start, top, torch.arange(samples))


def added(
    factors: Factors, measures: list[Measure], shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out, width = factors.grads[0].shape[-1], factors.x.shape[-1]
    value = torch.linspace(-1, 1, out * width, dtype=factors.x.dtype).view(out, width)
    totals = torch.zeros(len(measures), out, width, dtype=factors.x.dtype)
    formulas = [f for f in map(formula, measures) if f is not None]
    assert len(formulas) == len(measures)
    return totals, tiles.add_measures(factors, value, shares, formulas, totals)


def by_torch(
    factors: Factors, measures: list[Measure], shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grads = torch.einsum("dbto,bti->dboi", torch.stack(list(factors.grads)), factors.x)
    others = any(m.reads_others for m in measures)
    turned = grads[:-1] if others else grads
    m = influence.moments_of_turned(turned.clone(), factors.ceiling, grads[-1] if others else None)
    value = torch.linspace(-1, 1, m.score[0].numel(), dtype=factors.x.dtype).view(m.score[0].shape)
    values = torch.stack([one.of_moments(m, one.given(value)) for one in measures])
    weighted = values * shares.to(values)[:, None, None]
    return weighted.sum(1), weighted.sum((-2, -1)).double()


def close(found: torch.Tensor, truth: torch.Tensor, rtol: float) -> None:
    for one, other in zip(found, truth, strict=True):
        assert (one - other).abs().max() <= rtol * other.abs().max()


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 3),
    tokens=st.integers(1, 19),
    out=st.integers(4, 14),
    width=st.sampled_from([1, 7, 31, 32, 33, 511, 512, 513, 1030]),
    start=st.integers(0, 18),
)
def test_every_measure_is_that_of_torch(samples: int, tokens: int, out: int, width: int, start: int) -> None:
    factors = factors_of(samples, tokens, out, width, start=min(start, tokens - 1))
    shares = torch.linspace(0.2, 1, samples)
    for found, truth in zip(
        added(factors, MEASURED, shares), by_torch(factors, MEASURED, shares), strict=True
    ):
        close(found, truth, 1e-11)


@pytest.mark.parametrize("directions", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_classes_in_both_precisions(directions: int, dtype: torch.dtype) -> None:
    factors, shares = factors_of(2, 5, 9, 20, directions, dtype=dtype), torch.ones(2)
    measures: list[Measure] = [Influence(Damped(1e-2)), MEASURES["SNIP"]]
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    for found, truth in zip(
        added(factors, measures, shares), by_torch(factors, measures, shares), strict=True
    ):
        close(found, truth, rtol)


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["grads", "x"])
@pytest.mark.parametrize("measure", MEASURED, ids=[m.name for m in MEASURED])
def test_what_is_not_finite_reaches_the_sums(measure: Measure, where: str, spoiled: float) -> None:
    factors = factors_of(2, 5, 6, 7, directions=4 if measure.reads_others else 3)
    for spoilt in [factors.x] if where == "x" else factors.grads:  # in all directions, as what overflows is
        spoilt[1, 2, 3] = spoiled
    _, sums = added(factors, [measure], torch.ones(2))
    assert sums[0, 0].isfinite() and not sums[0, 1].isfinite()


def test_threads_share_the_rows_without_changing_a_score() -> None:
    factors, shares = factors_of(2, 9, 23, 30), torch.ones(2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = added(factors, MEASURED, shares)
    finally:
        torch.set_num_threads(before)
    several = added(factors, MEASURED, shares)
    assert alone[0].equal(several[0])
    close(several[1], alone[1], 1e-12)


def test_no_gradient_no_influence() -> None:
    factors = factors_of(1, 4, 5, 6, start=4)
    totals, sums = added(factors, MEASURED, torch.ones(1))
    assert not totals.any() and not sums.any()


def test_what_is_not_known_is_left_to_torch() -> None:
    assert formula(Elementwise("SNIP", lambda m, v: m.score)) is None
    assert formula(Influence(Damped(1e-30))) is None
    assert formula(Influence(Exact(2.0))) is None
    assert formula(Influence(Damped(0))) == formula(Influence(Exact()))
    assert formula(Influence(Cut(0.1))) == (CUT, pytest.approx(0.01))


def test_a_formula_stands_for_its_measure() -> None:
    factors, shares = factors_of(2, 5, 6, 7), torch.linspace(0.2, 1, 2)
    value, formulas = torch.linspace(-1, 1, 42, dtype=torch.float64).view(6, 7), [*map(formula, MEASURED)]
    assert [measure_of(one) for one in formulas if one and one[0] != CUT] == [
        m for m, one in zip(MEASURED, formulas, strict=True) if one and one[0] != CUT
    ]
    totals = torch.zeros(len(MEASURED), 6, 7, dtype=torch.float64)
    sums = add_by_torch(factors, value, shares, [one for one in formulas if one], totals)
    for found, truth in zip((totals, sums), by_torch(factors, MEASURED, shares), strict=True):
        close(found, truth, 1e-12)


WITHOUT = """
import sys, warnings
sys.modules["numba"] = None
sys.path.insert(0, sys.argv[1])
import torch
from tiny import tiny_examples, tiny_model
from fihelpers.scores.weights import score_weights
model, examples = tiny_model("llama", torch.float32), tiny_examples(3)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    made = [score_weights(model, examples) for _ in range(2)]
said = [str(one.message) for one in said if "fihelpers[fast]" in str(one.message)]
assert len(said) == 1 and "the package numba is missing" in said[0] and "longer" in said[0], said
torch.save({name: dict(scores.values) for name, scores in made[1].items()}, sys.argv[2])
"""


def test_without_numba_scores_are_the_same_and_it_is_said_once(tmp_path: Path) -> None:
    kept = tmp_path / "scores.pt"
    command = [sys.executable, "-c", WITHOUT, str(Path(__file__).parent), str(kept)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(kept)
    scores = score_weights(tiny_model("llama", torch.float32), tiny_examples(3))
    assert found.keys() == scores.keys()
    for name, one in scores.items():
        largest = max(float(value.max()) for value in one.values.values())
        for key, value in one.values.items():
            assert (found[name][key] - value).abs().max() <= 1e-6 * largest, (name, key)


def test_where_no_folder_may_be_written_the_loops_are_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: Dispatcher) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(Dispatcher, "enable_caching", refuse)
    assert tiles._compiled()(lambda x: x + 1)(1) == 2
