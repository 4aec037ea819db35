"""Chapter 02's experiments: the identities that the chapter states hold for any seed."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from tiny import tiny_examples, tiny_model

from fichapters.ch02 import draw as figures
from fichapters.ch02 import lab as manifold
from fihelpers.filters import Cut, Damped, Exact
from fihelpers.influence import ceiling, fi, moments
from fihelpers.scores.class_gradients import class_gradients

BASE5 = (0.4, 0.25, 0.15, 0.12, 0.08)
WEIGHT = "model.layers.0.self_attn.o_proj.weight"
SEEDS = range(4)


def origin(dims: int = 2) -> torch.Tensor:
    return torch.zeros(dims, dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_family_starts_at_its_base_and_moves_on_a_sphere(seed: int) -> None:
    net = manifold.make_family(BASE5, 3, seed)
    here = manifold.local(net.log_probs, origin(3))
    torch.testing.assert_close(here.probs, torch.tensor(BASE5, dtype=torch.float64))
    torch.testing.assert_close(here.probs @ here.grads, origin(3))
    slopes = torch.func.jacrev(net.on_sphere)(origin(3))
    torch.testing.assert_close(slopes.T @ slopes, here.metric)
    far = torch.randn(20, 3, dtype=torch.float64)
    torch.testing.assert_close(net.on_sphere(far).norm(dim=-1), torch.full((20,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_becomes_the_metric_in_proportion_to_the_step(seed: int) -> None:
    net = manifold.make_family(manifold.BASE, 2, seed)
    table = manifold.kl_ratios(net, manifold.local(net.log_probs, origin()).metric, [1e-3, 1e-2])
    off = (table.ratio - 1).abs().groupby(table.step).max()
    assert off[1e-3] < 0.05 and off[1e-2] / off[1e-3] == pytest.approx(10, rel=0.3)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_length_is_the_same_twice_and_never_below_the_great_circle(seed: int) -> None:
    net = manifold.make_family(manifold.BASE, 2, seed)
    end = torch.tensor([0.5, 0.3], dtype=torch.float64)
    table = manifold.path_lengths(net, {str(h): manifold.bow(origin(), end, h) for h in (-0.5, 0, 0.5)})
    np.testing.assert_allclose(table["by the metric"], table["on the sphere"], rtol=1e-4)
    assert (table["on the sphere"] >= table["great circle"] * (1 - 1e-12)).all()
    np.testing.assert_allclose(table["f change"], table["f change"][0])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("base", [manifold.BASE, BASE5], ids=len)
def test_no_direction_beats_the_closed_form_and_the_best_reaches_it(
    base: tuple[float, ...], seed: int
) -> None:
    here = manifold.local(manifold.make_family(base, 2, seed).log_probs, origin())
    value = float(fi(here.grads, here.probs, over=0))
    ratios = manifold.direction_search(here, 3600).ratio
    assert value * (1 - 1e-2) <= ratios.max() <= value * (1 + 1e-9)
    if len(base) == 3:
        assert value == pytest.approx(float(ceiling(here.probs)), rel=1e-9)


def test_a_curve_starts_with_the_ratio_of_its_direction_whatever_its_bend() -> None:
    net = manifold.make_family(BASE5, 2, 0)
    here = manifold.local(net.log_probs, origin())
    v = torch.tensor([0.6, -0.8], dtype=torch.float64)
    bend = torch.tensor([2.0, 1.0], dtype=torch.float64)
    curves = manifold.curve_ratios(net, {"straight": (v, origin()), "bent": (v, bend)}, far=0.5)
    truth = float((v @ here.grads[here.predicted]) ** 2 / (v @ here.metric @ v))
    np.testing.assert_allclose(curves.groupby("curve").ratio.first(), truth, rtol=1e-2)


@pytest.mark.parametrize("seed", SEEDS)
def test_fi_is_the_same_in_all_coordinates_and_the_jacobian_norm_is_not(seed: int) -> None:
    table = manifold.invariance(manifold.make_family(BASE5, 2, seed), lam=0.01)
    assert (table["relative difference"] < 1e-5).all()
    assert table["Jacobian norm"].max() > 2 * table["Jacobian norm"].min()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_spectrum_adds_up_to_fi_under_every_filter(seed: int) -> None:
    scales = (1, 0.3, 0.1, 0.03)
    here = manifold.local(manifold.make_family(BASE5, 4, seed, scales).log_probs, origin(4))
    filters = [Exact(), Cut(0.1), Damped(1e-3)]
    table = manifold.spectrum(here, filters)
    for h in filters:
        total = float(table["leverage"] @ table[f"h {h}"])
        assert total == pytest.approx(float(manifold._quiet_fi(here.grads, here.probs, over=0, spectral=h)))


def test_damping_leads_from_exact_fi_to_the_squared_jacobian_norm() -> None:
    here = manifold.local(manifold.make_family(BASE5, 6, 3).log_probs, origin(6))
    path = manifold.damping_path(here, [1e-12, 1e9])
    first, last = path[path.lam == 1e-12], path[path.lam == 1e9]
    np.testing.assert_allclose(first.value, first.exact, rtol=1e-6)
    np.testing.assert_allclose(last.value, last.jacobian2, rtol=1e-6)
    agreement = manifold.rank_agreement(path)
    assert agreement.with_exact.iloc[0] == pytest.approx(1) == agreement.with_jacobian2.iloc[1]


@pytest.mark.parametrize("dims", [1, 3])
def test_only_the_package_keeps_below_the_ceiling(dims: int) -> None:
    summary = manifold.rounding_summary(manifold.rounding_cases(manifold.confident_cases(1000, 1, dims=dims)))
    assert summary.loc["fihelpers.fi", ["violations", "wrong"]].tolist() == [0, 0]
    assert summary.loc["pseudo-inverse of G", "violations"] > 10


def test_all_ways_agree_where_rounding_is_small() -> None:
    cases = manifold.confident_cases(200, 2)
    doubtful = cases.exact_probs[0] < 0.9
    assert doubtful.sum() > 10
    grads, probs = cases.exact_grads[:, doubtful], cases.exact_probs[:, doubtful]
    values = [way(grads, probs) for way in manifold.WAYS.values()]
    for other in values[:-1]:
        torch.testing.assert_close(other, values[-1], rtol=1e-6, atol=0)


def test_gradients_of_a_real_weight_are_those_of_autograd() -> None:
    question = manifold.ask(tiny_model("gpt2"), tiny_examples(1)[0])  # computes in float64 throughout
    name = "transformer.h.0.attn.c_proj.weight"
    probs, grads = manifold.weight_gradients(question, name)
    weight = question.model.network.get_parameter(name)
    truth = class_gradients(question.log_probs(), weight)
    torch.testing.assert_close(grads, truth, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(KeyError, match="no weight 'nothing'"):
        manifold.weight_gradients(question, "nothing")


def test_a_step_goes_its_length_and_is_taken_back() -> None:
    question = manifold.ask(tiny_model("llama"), tiny_examples(1)[0])
    weight = question.model.network.get_parameter(WEIGHT)
    before = weight.detach().clone()
    probs, grads = manifold.weight_gradients(question, WEIGHT)
    table = manifold.probes(question, WEIGHT, moments(grads, probs), fi(grads, probs), lengths=(1e-4, 1e-2))
    assert torch.equal(weight, before)
    off = (table["measured / predicted"] - 1).abs()
    assert (off[table["length ℓ"] == 1e-4] < 0.02).all()
    predicted = table["predicted |Δf|"] / table["length ℓ"]
    np.testing.assert_allclose(predicted**2, table["FI"])


def test_figures_draw_what_they_are_given() -> None:
    net = manifold.make_family(manifold.BASE, 2, 8)
    here = manifold.local(net.log_probs, origin())
    path = manifold.damping_path(here, [1e-3, 1.0])
    curves = {name: (torch.ones(2, dtype=torch.float64), origin()) for name in "abcd"}
    search = manifold.direction_search(here, 36)
    filters = [Exact(), Cut(1e-2), Damped(1e-3)]
    cases = manifold.rounding_cases(manifold.confident_cases(50, 0))
    drawn: list[Figure] = [
        figures.family(manifold.grid_lines(net, 1.0, 3)),
        figures.rings(manifold.rings(net, here.metric, 0.2)),
        figures.kl_ratios(manifold.kl_ratios(net, here.metric, [1e-2, 1e-1])),
        figures.curve_ratios(manifold.curve_ratios(net, curves, 0.5), 1.0),
        figures.direction_search({"K = 3": search}, {"K = 3": (1.0, 45.0, 90.0)}),
        figures.filters(manifold.gains(filters, 1e-8, 1.0), np.array([0.1])),
        *figures.damping_frames(path),
        figures.ceiling(manifold.ceiling_curve(), {"one": (0.5, 1.0), "other": (0.8, 0.25)}),
        figures.rounding(cases, manifold.TOLERANCE),
        figures.matrix({"FI": np.ones((3, 4))}, "a matrix"),
    ]
    for figure in drawn:
        figure.canvas.draw()
    assert len(path.groupby("lam")) == 2 == len(figures.damping_frames(path))


def test_rings_hold_their_lengths() -> None:
    net = manifold.make_family(manifold.BASE, 2, 8)
    metric = manifold.local(net.log_probs, origin()).metric.numpy()
    for name, ring in manifold.rings(net, torch.as_tensor(metric), 0.2).groupby("ring"):
        omega = ring[["omega_1", "omega_2"]].to_numpy()
        lengths = np.sqrt(np.einsum("ni,ij,nj->n", omega, metric, omega))
        spread = pd.Series(lengths if "information" in str(name) else np.linalg.norm(omega, axis=1))
        assert spread.std() < 1e-9
    assert math.isclose(manifold.angle_of(torch.tensor([-1.0, -1.0])), 45)


def test_every_measure_tells_a_sure_from_an_unsure_answer_and_none_tells_equal_ones() -> None:
    found = manifold.margins((0.9, 0.05, 0.05), (0.4, 0.3, 0.3), draws=400, seed=0)
    assert set(found) == {"exact", "jacobian", "snip"}
    assert all(low > 1 and low <= ratio <= high for ratio, low, high in found.values())
    assert manifold.margins((0.5, 0.25, 0.25), (0.5, 0.25, 0.25), draws=50, seed=0)["jacobian"] == (1, 1, 1)
