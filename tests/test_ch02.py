"""Chapter 02: what its cells derive holds, a change in them shows, and rounding spoils every way but ours."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from opening import NOTEBOOKS, settled
from tiny import tiny_examples, tiny_model
from torch.func import jacrev

from fichapters import results
from fichapters.ch02 import draw, lab
from fihelpers.answers import usual_answers
from fihelpers.influence import ceiling, fi
from fihelpers.scores.class_gradients import class_gradients

LESSON = "02_the_measure"
SEEDS = range(4)
Lesson = tuple[dict[str, Any], dict[str, pd.DataFrame]]


@cache
def lesson(old: str = "", new: str = "") -> Lesson:
    """The names and kept tables of the lesson under smoke, with a piece of its source written otherwise."""
    tables: dict[str, pd.DataFrame] = {}
    p = SimpleNamespace(**settled(LESSON, {}, "smoke"))
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = nbformat.read(NOTEBOOKS[LESSON], as_version=4).cells
    end = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))
    code = [cell.source for cell in cells[:end] if cell.cell_type == "code"][1:]
    assert old in "\n".join(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "begin", lambda name: SimpleNamespace(p=p, keep=tables.__setitem__))
        for source in code:
            exec(compile(source.replace(old, new) if old else source, LESSON, "exec"), names)
    return names, tables


def origin(dims: int = 2) -> torch.Tensor:
    return torch.zeros(dims, dtype=torch.float64)


def test_the_lesson_finds_what_it_says() -> None:
    names, tables = lesson()
    assert set(tables) == {"probes", "margins", "rounding", "invariance", "checks"}
    found = tables["checks"].value
    for k in ("K = 3", "K = 5"):
        assert 0.999 < found[f"{k}, best direction over FI"] <= 1 + 1e-9
    assert found["FI, largest relative change"] < 1e-6 and found["Jacobian norm, most over least"] > 1.01
    assert 0.9 < found["least measured over predicted"] <= found["most measured over predicted"] < 1.1
    assert 0.3 < found["share of saliency that is zero"] < 0.7
    torch.testing.assert_close(names["P"] @ names["s"], torch.zeros_like(names["s"][0]), rtol=0, atol=1e-15)
    assert float(names["gain"].max()) <= 1


def test_moving_a_weight_otherwise_shows_and_is_taken_back() -> None:
    names, tables = lesson()
    before = names["weight"].detach().clone()
    other, changed = lesson("lambda value: value + step", "lambda value: value + 2 * step")
    ratio = changed["probes"]["measured |Δf|"] / tables["probes"]["measured |Δf|"]
    assert (ratio > 1.2).all()  # f is not straight so far out, else it were 2
    assert torch.equal(other["weight"], before)
    assert changed["probes"]["predicted |Δf|"].equals(tables["probes"]["predicted |Δf|"])


def test_the_lessons_gradients_are_those_of_the_library() -> None:
    model, example = tiny_model("gpt2"), tiny_examples(1)[0]
    (batch,) = model.batches([example.prompt])
    log_p = usual_answers(model.tokenizer, [example]).log_probs(model.last_logits(batch))[0]
    weight = lab.weight_of(model, "transformer.h.0.attn.c_proj.weight")
    found = lesson()[0]["class_gradients"](log_p, weight)
    torch.testing.assert_close(found, class_gradients(log_p, weight).double())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("base", [lab.BASE, lab.BASE5], ids=len)
def test_closed_form_spectral_form_and_library_agree(base: tuple[float, ...], seed: int) -> None:
    names = lesson()[0]
    net = lab.make_family(base, 2, seed)
    P, s, G, df = names["of_pair"](net.log_probs)
    probs, grads = net.log_probs(origin()).exp(), jacrev(net.log_probs)(origin())
    torch.testing.assert_close(P, torch.tensor(base, dtype=torch.float64))
    metric = torch.einsum("k,ki,kj->ij", probs, grads, grads)
    for mine, truth in ((P, probs), (s, grads), (G, metric), (df, -grads[probs.argmax()])):
        torch.testing.assert_close(mine, truth)
    torch.testing.assert_close(P @ s, origin())
    mu, leverage = names["spectrum"](P, s)
    value = float(fi(s, P, over=0))
    assert float(leverage[mu > 1e-12 * mu.max()].sum()) == pytest.approx(value, rel=1e-6)
    assert float(df @ torch.linalg.pinv(G, hermitian=True) @ df) == pytest.approx(value, rel=1e-6)
    if len(base) == 3:
        assert value == pytest.approx(float(ceiling(P)), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_fi_is_the_same_in_all_coordinates_and_the_jacobian_norm_is_not(seed: int) -> None:
    table = lab.invariance(lab.make_family(lab.BASE5, 2, seed))
    assert len(table) == len(lab.COORDINATES) and (table["relative difference"] < 1e-5).all()
    assert table["Jacobian norm"].max() > 2 * table["Jacobian norm"].min()


@pytest.mark.parametrize("dims", [1, 3])
def test_only_the_package_keeps_below_the_ceiling(dims: int) -> None:
    table = lab.rounding(lab.confident_cases(1000, 1, dims=dims))
    assert table.loc["fihelpers.fi", ["violations", "wrong"]].tolist() == [0, 0]
    assert table.loc["pseudo-inverse of G", "violations"] > 10
    assert (table.low <= table.violations).all() and (table.violations <= table.high).all()


def test_all_ways_agree_where_rounding_is_small() -> None:
    cases = lab.confident_cases(200, 2)
    doubtful = cases.exact_probs[0] < 0.9
    assert doubtful.sum() > 10
    grads, probs = cases.exact_grads[:, doubtful], cases.exact_probs[:, doubtful]
    values = [way(grads, probs) for way in lab.WAYS.values()]
    for other in values[:-1]:
        torch.testing.assert_close(other, values[-1], rtol=1e-6, atol=0)


def test_every_measure_tells_a_sure_from_an_unsure_answer() -> None:
    found = lab.margins(draws=400, seed=0)
    assert list(found.index) == ["ceiling", "FI exact", "Jacobian norm", "SNIP"]
    drawn = found.drop("ceiling")
    assert (drawn.low > 1).all() and (drawn.low <= drawn.value).all() and (drawn.value <= drawn.high).all()
    assert found.value["ceiling"] == pytest.approx(17.5)


def test_figures_draw_what_they_are_given() -> None:
    steps = torch.linspace(-1, 1, 5)
    curves = torch.stack([steps, -steps, steps**2], -1)
    one = (torch.rand(36), 1.0, torch.ones(2), -torch.ones(2))
    drawn: list[Figure] = [
        draw.tangents(steps, curves, torch.tensor([1.0, -1.0, 0.0]), ["a", "b", "c"], "a model"),
        draw.tangents(steps, curves, torch.tensor([1.0, -1.0, 0.0]), [], "a model"),
        draw.matrix({"FI": torch.rand(12), "other": torch.rand(12)}, (3, 4), "a matrix"),
        draw.matrix({"FI": torch.rand(12)}, (12,), "a vector"),
        draw.directions({"K = 3": one, "K = 5": one}),
    ]
    for figure in drawn:
        figure.canvas.draw()
