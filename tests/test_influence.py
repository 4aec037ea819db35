"""FI against its definition, its bounds and its invariances (method 1, 1a, 1b)."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fihelpers import eigen, influence
from fihelpers.filters import Cut, Damped, Exact, Spectral
from fihelpers.influence import (
    SaturationWarning,
    ceiling,
    decompose,
    fi,
    fi_from_gram,
    gram,
    moments_of_others,
    moments_of_turned,
    saturated,
    turned_classes,
)

FILTERS = [Exact(), Cut(1e-3), Damped(1e-6), Damped(1e-2)]


def case(k: int, p: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Consistent class gradients (K, n, p), sum_y P(y) s_y = 0, and probabilities (K, n)."""
    g = torch.Generator().manual_seed(seed)
    probs = torch.softmax(torch.randn(k, n, generator=g, dtype=torch.float64), 0)
    grads = torch.randn(k, n, p, generator=g, dtype=torch.float64)
    grads = grads - (probs[..., None] * grads).sum(0)
    return grads.to(dtype), probs.to(dtype)


def by_definition(grads: Tensor, probs: Tensor, lam: float = 0.0) -> Tensor:
    """grad^T pinv(G + lam I) grad, written out."""
    metric = torch.einsum("kn,knp,knq->npq", probs, grads, grads)
    metric = metric + lam * torch.eye(metric.shape[-1], dtype=metric.dtype)
    own = grads.gather(0, probs.argmax(0)[None, :, None].expand(1, *grads.shape[1:]))[0]
    return torch.einsum("np,npq,nq->n", own, torch.linalg.pinv(metric, rtol=1e-12, hermitian=True), own)


def quiet_fi(*args, **options) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        return fi(*args, **options)


def quiet_fi_from_gram(*args, **options) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        return fi_from_gram(*args, **options)


@pytest.mark.parametrize("k", range(2, 9))
@pytest.mark.parametrize("p", range(1, 9))
def test_fi_is_the_definition(k: int, p: int) -> None:
    grads, probs = case(k, p, 50, seed=k * 10 + p)
    truth = by_definition(grads, probs)
    torch.testing.assert_close(quiet_fi(grads, probs, over=1), truth, rtol=1e-8, atol=1e-8)
    by_gram = quiet_fi_from_gram(gram(grads, 1), probs, dtype=torch.float64)
    torch.testing.assert_close(by_gram, truth, rtol=1e-8, atol=1e-8)
    damped = by_definition(grads, probs, lam=0.3)
    torch.testing.assert_close(
        quiet_fi(grads, probs, over=1, spectral=Damped(0.3)), damped, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_single_elements_agree_with_groups_of_one(k: int) -> None:
    grads, probs = case(k, 5, 20, seed=k)
    for spectral in FILTERS:
        single = quiet_fi(grads, probs, spectral=spectral)
        grouped = quiet_fi(grads[..., None], probs, over=2, spectral=spectral)
        torch.testing.assert_close(single, grouped, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spectral", FILTERS, ids=str)
@pytest.mark.parametrize("p", [1, 2, 3, 8])
@pytest.mark.parametrize("k", [2, 3, 4, 5, 12])
def test_fi_keeps_below_its_ceiling_without_clamping(k, p, spectral, dtype) -> None:
    """10,000 cases for each setting: P(y_hat) from .3 to 1 - 1e-7, gradients from 1e-7 to 1e4."""
    n = 10_000
    g = torch.Generator().manual_seed(k * 100 + p)
    sure = (1 - 10 ** (-7 * torch.rand(n, generator=g, dtype=torch.float64))).clamp(0.3, 1 - 1e-7)
    rest = torch.softmax(3 * torch.randn(k - 1, n, generator=g, dtype=torch.float64), 0) * (1 - sure)
    probs = torch.cat([sure[None], rest])
    size = 10 ** (11 * torch.rand(n, 1, generator=g, dtype=torch.float64) - 7)
    grads = torch.randn(k, n, p, generator=g, dtype=torch.float64) * size
    grads = (grads - (probs[..., None] * grads).sum(0)).to(dtype)
    top = ceiling(probs.to(dtype), 0)
    values = quiet_fi(grads, probs.to(dtype), over=1, predicted=0, spectral=spectral)
    assert torch.isfinite(values).all() and (values >= 0).all()
    assert (values <= top * (1 + 1e-5)).all(), float((values / top).nan_to_num().max())
    assert (values > 0).any()  # the bound is not kept by being zero


@pytest.mark.parametrize(("k", "p"), [(2, 1), (3, 2), (4, 3), (4, 7), (6, 5)])
def test_full_rank_reaches_the_ceiling(k: int, p: int) -> None:
    grads, probs = case(k, p, 100, seed=1)
    values = quiet_fi(grads, probs, over=1)
    torch.testing.assert_close(values, ceiling(probs), rtol=1e-8, atol=0)
    assert saturated(values, probs).all()


def test_two_classes_give_every_perturbation_the_same_value() -> None:
    grads, probs = case(2, 40, 1, seed=3)
    values = quiet_fi(grads[:, 0], probs[:, 0])
    torch.testing.assert_close(values, values[0].expand_as(values), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("k", "p"), [(4, 2), (4, 3), (6, 3), (9, 4)])
def test_exact_fi_is_invariant_under_invertible_maps(k: int, p: int) -> None:
    grads, probs = case(k, p, 60, seed=5)
    change = torch.randn(p, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change = change + 3 * torch.eye(p, dtype=torch.float64)
    before = quiet_fi(grads, probs, over=1)
    torch.testing.assert_close(quiet_fi(grads @ change, probs, over=1), before, rtol=1e-7, atol=1e-9)
    damped = quiet_fi(grads @ change, probs, over=1, spectral=Damped(1.0))
    assert not torch.allclose(damped, quiet_fi(grads, probs, over=1, spectral=Damped(1.0)))


def test_exact_fi_of_single_elements_ignores_scale_down_to_the_smallest_gradients() -> None:
    grads, probs = case(4, 30, 1, seed=7, dtype=torch.float32)
    before = fi(grads[:, 0], probs[:, 0])
    torch.testing.assert_close(fi(grads[:, 0] * 1e-15, probs[:, 0]), before, rtol=1e-4, atol=0)


@pytest.mark.parametrize("p", [1, 3, 6])
def test_heavy_damping_is_the_squared_jacobian(p: int) -> None:
    grads, probs = case(4, p, 30, seed=11)
    own = grads.gather(0, probs.argmax(0)[None, :, None].expand(1, 30, p))[0]
    lam = 1e9
    torch.testing.assert_close(
        lam * quiet_fi(grads, probs, over=1, spectral=Damped(lam)), own.square().sum(-1), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        quiet_fi(grads, probs, over=1, spectral=Damped(1e-13)),
        quiet_fi(grads, probs, over=1),
        rtol=1e-6,
        atol=0,
    )


def test_filters_pass_what_their_docstrings_say() -> None:
    grads = torch.tensor([[1e-3], [-1e-3]], dtype=torch.float64)
    probs = torch.tensor([0.5, 0.5], dtype=torch.float64)  # G = 1e-6, so its singular value is 1e-3
    assert fi(grads, probs, spectral=Exact()) == 1
    assert fi(grads, probs, spectral=Cut(0.9e-3)) == 1
    assert fi(grads, probs, spectral=Cut(1.1e-3)) == 0
    assert float(fi(grads, probs, spectral=Damped(1e-6))) == pytest.approx(0.5)
    assert fi(torch.zeros_like(grads), probs) == 0


def test_exact_drops_directions_below_rtol_of_the_group() -> None:
    probs = torch.full((3,), 1 / 3, dtype=torch.float64)
    grads = torch.tensor([[2.0, 0.0], [-1.0, 1e-4], [-1.0, -1e-4]], dtype=torch.float64)  # mu ratio 3.3e-9
    # class 1 leans half on the weak direction, which the coarser cut takes away
    assert float(fi(grads, probs, over=0, predicted=1, spectral=Exact(1e-10))) == pytest.approx(2)
    assert float(fi(grads, probs, over=0, predicted=1, spectral=Exact(1e-8))) == pytest.approx(0.5)


@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_change_is_fi_times_length(k: int, p: int, seed: int) -> None:
    grads, probs = case(k, p, 4, seed)
    delta = torch.randn(4, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = decompose(grads, probs, delta)
    torch.testing.assert_close(parts.change2, parts.fi * parts.length2, rtol=1e-9, atol=1e-12)
    # for a group it is an inequality
    own = grads.gather(0, probs.argmax(0)[None, :, None].expand(1, 4, p))[0]
    change2 = (own * delta).sum(-1).square()
    length2 = (probs * (grads * delta).sum(-1).square()).sum(0)
    assert (change2 <= quiet_fi(grads, probs, over=1) * length2 * (1 + 1e-9) + 1e-12).all()


def test_predicted_row_is_not_read() -> None:
    grads, probs = case(5, 3, 10, seed=2)
    y = probs.argmax(0)
    spoilt = grads.clone()
    spoilt[y, torch.arange(10)] = 1e6
    for over in ((), 1):
        torch.testing.assert_close(quiet_fi(spoilt, probs, over=over), quiet_fi(grads, probs, over=over))


def test_gram_accumulates_over_a_group_too_large_to_hold() -> None:
    grads, probs = case(6, 40, 3, seed=9)
    halves = gram(grads[..., :17], 1) + gram(grads[..., 17:], 1)
    for spectral in FILTERS:
        whole = quiet_fi(grads, probs, over=1, spectral=spectral)
        parts = quiet_fi_from_gram(halves, probs, spectral=spectral, dtype=torch.float64)
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_shapes_of_an_image() -> None:
    g = torch.Generator().manual_seed(0)
    grads, probs = torch.randn(7, 2, 3, 5, 4, generator=g), torch.softmax(torch.randn(7, 2, generator=g), 0)
    assert fi(grads, probs).shape == (2, 3, 5, 4)
    assert fi(grads, probs, over=1).shape == (2, 5, 4)
    assert fi(grads, probs, over=-3).equal(fi(grads, probs, over=1))
    assert quiet_fi(grads, probs, over=(2, 3)).shape == (2, 3)
    one = fi(grads[:, 0], probs[:, 0], over=0)
    torch.testing.assert_close(fi(grads, probs, over=1)[0], one)


def test_a_saturated_map_warns() -> None:
    grads, probs = case(4, 3, 200, seed=4)
    with pytest.warns(SaturationWarning, match="ranks nothing"):
        fi(grads, probs, over=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fi(grads, probs)  # single elements of four classes are not saturated
        fi(grads, probs, over=1, spectral=Damped(1.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_is_refused(bad: float) -> None:
    grads, probs = case(4, 3, 2, seed=0)
    broken = grads.clone()
    broken[:, 0, 0] = bad
    for over in ((), 1):
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            fi(broken, probs, over=over)
    with pytest.raises(FloatingPointError, match="finite"):
        fi(grads, probs * bad)


def test_bad_arguments_are_named() -> None:
    grads, probs = case(4, 3, 2, seed=0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        fi(grads[:1], probs[:1])
    with pytest.raises(ValueError, match="does not start with"):
        fi(grads[:3], probs)
    with pytest.raises(ValueError, match="over="):
        fi(grads, probs, over=5)
    with pytest.raises(ValueError, match="belongs to one distribution"):
        fi(grads, probs, over=0)
    with pytest.raises(ValueError, match="between 0 and 3"):
        fi(grads, probs, predicted=4)
    with pytest.raises(ValueError, match="rtol"):
        Exact(-1)
    with pytest.raises(ValueError, match="lam"):
        Damped(float("nan"))


def hard_case(k: int, p: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients over eight orders of magnitude, groups close to singular, P(y_hat) up to 1 - 1e-7."""
    g = torch.Generator().manual_seed(seed)

    def spread(orders: float, *shape: int) -> Tensor:
        return 10 ** (orders * torch.rand(shape, generator=g, dtype=torch.float64))

    sure = (1 - spread(-7, n)).clamp(0.3, 1 - 1e-7)
    rest = torch.softmax(3 * torch.randn(k - 1, n, generator=g, dtype=torch.float64), 0) * (1 - sure)
    probs = torch.cat([sure[None], rest])
    grads = (
        torch.randn(k, n, p, generator=g, dtype=torch.float64)
        * spread(-4, n, p)
        @ torch.randn(p, p, generator=g, dtype=torch.float64)
    )
    grads = (grads - (probs[..., None] * grads).sum(0)) * spread(8, n, 1) * 1e-6
    return grads.float(), probs.float()


def by_eigenvalues(
    grads: Tensor, probs: Tensor, spectral: Spectral, low: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """FI of groups (K, n, p) by torch's eigenvalues, which are multiplied by `low` before the filter."""
    turned, others, chosen = influence._turned(grads, probs, (1,), None)
    root = others.sqrt()
    mu, vectors = torch.linalg.eigh(torch.einsum("knp,jnp->nkj", turned, turned))
    leverage = torch.einsum("nki,kn->in", vectors, root).square() / chosen
    mu = mu.T.clamp(min=0)
    gain = spectral.gain(mu * low, mu[-1:], dtype) * (mu > eigen.ROUNDING * mu[-1:])
    return (gain * leverage).sum(0)


@pytest.mark.parametrize("spectral", [*FILTERS, Cut(1e-4), Exact(1e-3), Damped(0), Damped(1e3)], ids=str)
@pytest.mark.parametrize("k", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("p", [1, 2, 3, 5, 40])
def test_what_a_factor_settles_is_what_eigenvalues_say(k: int, p: int, spectral: Spectral) -> None:
    grads, probs = hard_case(k, p, 1000, seed=k * 100 + p)
    found = quiet_fi(grads, probs, over=1, spectral=spectral).double()
    # where an eigenvalue lies on the edge of the filter, rounding may decide either way
    ends = torch.stack([by_eigenvalues(grads, probs, spectral, low) for low in (1 - 1e-3, 1 + 1e-3)])
    scale = 1e-5 * ends.amax(0)
    assert (found >= ends.amin(0) - scale).all()
    assert (found <= ends.amax(0) + scale).all()
    assert (found <= ceiling(probs) * (1 + 1e-6)).all()
    assert found.max() > 0


@pytest.mark.parametrize("k", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("p", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("lam", [1e-4, 1e-2, 1e3])
def test_damping_by_factor_is_damping_by_eigenvalues(k: int, p: int, lam: float) -> None:
    grads, probs = case(k, p, 200, seed=k * 100 + p)
    grads *= torch.logspace(-6, 2, 200, dtype=grads.dtype)[:, None]  # from almost nothing to beyond any lam
    expected = by_eigenvalues(grads, probs, Damped(lam), dtype=torch.float64)
    found = quiet_fi(grads, probs, over=1, spectral=Damped(lam))
    assert (found >= 0).all()
    assert (found <= ceiling(probs) * (1 + 1e-9)).all()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("k", "p"), [(2, 1), (3, 3), (4, 3), (6, 3), (4, 40)])
@pytest.mark.parametrize("spectral", FILTERS, ids=str)
def test_clear_groups_need_no_eigenvalues(
    k: int, p: int, spectral: Spectral, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads, probs = case(k, p, 50, seed=k * p)
    grads *= 10 / p**0.5
    expected = by_eigenvalues(grads, probs, spectral, dtype=torch.float64)
    monkeypatch.setattr(eigen, "by_eigenvalues", None)
    torch.testing.assert_close(quiet_fi(grads, probs, over=1, spectral=spectral), expected, rtol=1e-6, atol=0)


def test_groups_that_one_filter_leaves_to_the_eigenvalues_keep_their_places() -> None:
    grads, probs = case(4, 3, 60, seed=3)
    grads[:, ::3, 1:] = 0  # rank 1
    grads[:, 1::3] = 0
    found = quiet_fi(grads.reshape(4, 6, 10, 3), probs.reshape(4, 6, 10), over=2)
    alone = torch.stack([quiet_fi(grads[:, i], probs[:, i], over=0) for i in range(60)])
    torch.testing.assert_close(found.flatten(), alone, rtol=1e-9, atol=0)
    assert (alone[1::3] == 0).all()
    assert (alone[::3] < 0.99 * ceiling(probs)[::3]).sum() > 10


@pytest.mark.parametrize("k", [2, 3, 4, 9])
@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0, 300.0])
def test_turned_classes_give_the_moments_as_a_sum_of_squares(k, sharpness) -> None:
    generator = torch.Generator().manual_seed(k)
    logits = sharpness * torch.randn(5, k, generator=generator, dtype=torch.float64)
    logits.requires_grad_(True)
    log_p = logits.log_softmax(-1)
    p = log_p.detach().exp()
    y = p.argmax(-1, keepdim=True)
    index = torch.arange(k - 1).expand(5, -1)
    index = index + (index >= y)
    others, chosen = p.gather(1, index).T, p.gather(1, y)[:, 0]

    def of_each(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.autograd.grad(r.sum(), logits, retain_graph=True)[0] for r in rows.T])

    truth = moments_of_others(of_each(log_p.gather(1, index)), others, chosen)
    ours = moments_of_turned(
        of_each(turned_classes(log_p.gather(1, index), others, chosen)), truth.ceiling[:, 0]
    )
    for one, true in ((ours.score, truth.score), (ours.metric, truth.metric)):
        assert ((one - true).abs() <= 1e-12 * true.abs().amax(-1, keepdim=True)).all()
    assert (ours.score.square() <= ours.ceiling * ours.metric * (1 + 1e-12)).all()
