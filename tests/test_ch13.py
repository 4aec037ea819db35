"""Chapter 13: where an MLP ends, which weight lifts its output, ranks among many weights, what is kept."""

from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from opening import NOTEBOOKS
from tiny import tiny_examples, tiny_model

from fichapters.ch08.lab import matrix
from fichapters.ch13 import lab
from fihelpers.models.files import open_weights
from fihelpers.models.linear import linear_names
from fihelpers.perturb.sparsify import select
from fihelpers.scores.weights import score_weights

LESSON = "13_a_real_model"


def lesson(*names: str, **known: Any) -> dict[str, Any]:
    """Functions of the lesson's own cells."""
    found = {"torch": torch, "pd": pd, "lab": lab, "matrix": matrix, "select": select, **known}
    cells = [c.source for c in nbformat.read(NOTEBOOKS[LESSON], as_version=4).cells if c.cell_type == "code"]
    for source in cells:
        if any(f"def {name}(" in source for name in names) and "run.k" not in source:
            exec(compile(source, LESSON, "exec"), found)
    return found


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt_neox", "gpt2"])
def test_the_largest_output_is_the_sum_that_its_row_makes(kind: str) -> None:
    model = tiny_model(kind)
    found = lesson("spikes", model=model)["spikes"]("w1 w2 w3 w4")
    assert len(found) == 2  # a block each
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.no_grad(), lab.watching(model, lambda name, x, y: seen.__setitem__(name, (x, y))):
        model.last_logits(model.batches(["w1 w2 w3 w4"])[0])
    for row in found.itertuples():
        inputs, outputs = seen[row.name]
        assert outputs.shape[1] == model.network.config.hidden_size < inputs.shape[1]
        assert abs(row.output) == pytest.approx(float(outputs.abs().max()))
        token = int(outputs[:, row.row].abs().argmax())
        terms = matrix(model, row.name)[row.row] * inputs[token]
        assert row.term == pytest.approx(float(terms[row.column]))
        assert abs(row.term) == pytest.approx(float(terms.abs().max()))
        flat = model.network.get_parameter(row.name).detach().flatten()
        assert float(flat[row.place]) == pytest.approx(row.weight)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_model_with_fused_experts_is_refused_or_has_ends(kind: str) -> None:
    with pytest.raises(ValueError, match="the ends of its MLPs cannot be told"):
        lab.ends_of_mlps(tiny_model(kind).network)


def test_the_first_rows_are_the_highest_scores_and_their_ranks_count_up() -> None:
    model = tiny_model("llama")
    linear = linear_names(model.network)
    scores = score_weights(model, tiny_examples(4), ["SNIP", "magnitude"], only=linear)["SNIP"]
    cells = lesson("highest")
    top = cells["highest"](scores, 9)
    every = torch.cat([value.flatten() for value in scores.values.values()])
    assert np.allclose(top.score, every.sort(descending=True).values[:9])
    assert lab.ranks(scores, top).tolist() == [*range(1, 10)]
    chosen = cells["places"](top)
    assert sum(map(len, chosen.values())) == 9
    assert {n: set(at.tolist()) for n, at in chosen.items()} == {
        n: set(at.tolist()) for n, at in select(scores, 9 / scores.numel()).items() if len(at)
    }


def test_weights_with_equal_scores_share_a_rank() -> None:
    values = {"a": torch.tensor([[3.0, 1.0], [1.0, 0.0]]), "b": torch.tensor([1.0, 2.0])}
    scores: Any = type("Flat", (), {"values": values, "__getitem__": lambda self, name: values[name]})()
    rows = pd.DataFrame({"name": ["a", "a", "b", "a"], "place": [0, 1, 0, 3]})
    assert lab.ranks(scores, rows).tolist() == [1, 4, 4, 6]


def test_a_model_is_as_before_when_it_no_longer_holds_other_values() -> None:
    model = tiny_model("gpt2")
    before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    name = linear_names(model.network)[0]
    with pytest.raises(KeyError), lab.holding(model, {name: torch.zeros_like(before[name])}):
        assert not model.network.get_parameter(name).any()
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in model.network.named_parameters())


def test_kept_weights_stay_and_stretch_no_scale() -> None:
    rounded = lesson("rounded", ask_all=None, tested={}, Evaluator=None)["rounded"]
    W = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    W[2, 7] = 100.0
    plain, kept = rounded(W, 3, []), rounded(W, 3, [2 * 40 + 7])
    assert kept[2, 7] == 100 and torch.equal(kept[:2], plain[:2])
    rest = torch.arange(40) != 7
    assert (kept - W)[2, rest].square().sum() < 0.2 * (plain - W)[2, rest].square().sum()
    for row in kept:
        assert len(set(row.tolist())) <= 2**3 + 1
    assert not rounded(torch.zeros(2, 4), 2, []).any()


def test_the_fewest_weights_that_leave_no_more_than_guessing() -> None:
    table = pd.DataFrame(
        {"measure": ["a"] * 3 + ["b"] * 3, "count": [1, 10, 100] * 2, "n": 80,
         "accuracy": [0.8, 0.3, 0.2, 0.8, 0.7, 0.6]}
    )  # fmt: skip
    found = lab.fewest(table, 0.25).set_index("measure")
    assert found["count"]["a"] == 10 and np.isnan(found["count"]["b"])
    assert found.low["a"] <= 0.25 < found.low["b"] and found.accuracy["b"] == 0.6


def test_an_average_keeps_the_bases_values_where_it_is_told() -> None:
    base, *experts = (open_weights(name) for name in ("mini-lm", "mini-math", "mini-health"))
    name = next(n for n in base.layouts if "down_proj" in n)
    at = torch.tensor([3, 5])
    merged = lab.average(base, experts, {name: at})
    mean = (experts[0].read(name) + experts[1].read(name)) / 2
    assert torch.equal(merged[name].flatten()[at], base.read(name).flatten()[at])
    mean.view(-1)[at] = merged[name].flatten()[at]
    assert torch.equal(merged[name], mean) and set(merged) == set(base.layouts)
    rows = pd.DataFrame({"name": [name], "place": [3]})
    moved = lab.moved(base, experts, [name], rows)
    assert (moved.typical > 0).all() and (moved.n == 1).all()


def test_its_table_of_a_real_model_is_kept() -> None:
    folder = Path(lab.__file__).resolve().parents[3] / "data" / "results" / "real"
    spikes = pd.read_csv(folder / f"{LESSON}.spikes.csv")
    assert spikes.term.abs().is_monotonic_decreasing and len(spikes) > 4
