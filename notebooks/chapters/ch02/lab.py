"""Chapter 02: made-up networks of two inputs, FI in several coordinates, and rounding (method 1).

What the chapter derives stands in its own cells; here is what it is tried on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from fichapters.papers import published
from fihelpers.evaluate.stats import wilson
from fihelpers.filters import Exact
from fihelpers.influence import SaturationWarning, ceiling, fi
from fihelpers.measures import MEASURES
from fihelpers.models.language import LanguageModel
from fihelpers.scores.class_gradients import class_gradients

BASE = (0.55, 0.30, 0.15)  # P at omega = 0 of the network with three answers
BASE5 = (0.4, 0.25, 0.15, 0.12, 0.08)  # and of that with five
NETS = ((BASE, 2, 8), (BASE5, 2, 0))  # the two that the chapter searches: P, inputs, seed
RTOL = 1e-6  # the rank cut of float32, for every way to compute FI in the rounding experiment
RESAMPLES = 500  # of the bootstrap
TOLERANCE = 1e-5  # how far above its ceiling FI counts as a violation, relative


@dataclass(frozen=True)
class Family:
    """P(y | omega) of a network with one hidden layer, softmax(bias + outer tanh(inner omega + shift)).

    inner: (H, p); shift: (H,); outer: (K, H); bias: (K,). All in float64.
    """

    inner: Tensor
    shift: Tensor
    outer: Tensor
    bias: Tensor

    def log_probs(self, omega: Tensor) -> Tensor:
        """omega: (..., p). Returns log P of shape (..., K)."""
        hidden = torch.tanh(omega @ self.inner.T + self.shift)
        return torch.log_softmax(self.bias + hidden @ self.outer.T, -1)


def make_family(base: Sequence[float], dims: int, seed: int, hidden: int = 6) -> Family:
    """A random network of `dims` inputs omega with the probabilities `base` at omega = 0."""
    g = torch.Generator().manual_seed(seed)
    inner = torch.randn(hidden, dims, generator=g, dtype=torch.float64)
    shift = 0.5 * torch.randn(hidden, generator=g, dtype=torch.float64)
    outer = torch.randn(len(base), hidden, generator=g, dtype=torch.float64)
    bias = torch.tensor(base, dtype=torch.float64).log() - outer @ torch.tanh(shift)
    return Family(inner, shift, outer, bias)


def weight_of(model: LanguageModel, name: str) -> Tensor:
    """A parameter by its name. Raises KeyError for an unknown one."""
    named = dict(model.network.named_parameters())
    if name not in named:
        raise KeyError(f"the model {model.name!r} has no weight {name!r}; take a name from its state dict.")
    return named[name]


def probes(rows: Sequence[Sequence[Any]]) -> pd.DataFrame:
    """Weights that were moved: name, FI, |df|, information length, step, and the measured change of f.

    By FI's promise f changes by sqrt(FI) times the length; that, and the measured over it, join as columns.
    """
    columns = ["weight", "FI", "|∂f|", "length ℓ", "step / typical weight", "measured |Δf|"]
    table = pd.DataFrame(rows, columns=columns).set_index("weight").astype(float)
    table.insert(4, "predicted |Δf|", table["length ℓ"] * table["FI"] ** 0.5)
    return table.assign(**{"measured / predicted": table["measured |Δf|"] / table["predicted |Δf|"]})


# --- coordinates


def polar(nu: Tensor) -> Tensor:
    """omega from a radius and an angle about the point (-5, 0)."""
    r, theta = 5 + nu[0], nu[1]
    return torch.stack([r * theta.cos() - 5, r * theta.sin()])


def curved(nu: Tensor) -> Tensor:
    """omega from two numbers, neither of which enters as a straight line."""
    return torch.stack([3 * torch.sinh(nu[0]) + nu[1] + nu[1] ** 2, (torch.exp(4 * nu[1]) - 1) / 2])


def linear(rows: Sequence[Sequence[float]]) -> Callable[[Tensor], Tensor]:
    """The map nu -> matrix nu."""
    return torch.tensor(rows, dtype=torch.float64).matmul


COORDINATES: dict[str, Callable[[Tensor], Tensor]] = {
    "as given": lambda nu: nu,
    "other units (× 100, × 0.02)": linear([[100, 0], [0, 0.02]]),
    "rotated by 30°": linear([[0.75**0.5, -0.5], [0.5, 0.75**0.5]]),
    "sheared": linear([[1, 3], [0, 1]]),
    "polar": polar,
    "nonlinear": curved,
}


def invariance(family: Family) -> pd.DataFrame:
    """FI and the Jacobian norm of one network in several coordinates omega = phi(nu), phi(0) = 0.

    Index: coordinates. Columns: FI of the pair, its relative difference to the first row, Jacobian norm.
    """
    rows = {}
    for name, phi in COORDINATES.items():
        nu = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        log_p = family.log_probs(phi(nu))
        grads, probs = class_gradients(log_p, nu), log_p.detach().exp()
        rows[name] = (float(fi(grads, probs, over=0)), float(grads[probs.argmax()].norm()))
    table = pd.DataFrame.from_dict(rows, "index", columns=["FI", "Jacobian norm"]).rename_axis("coordinates")
    table.insert(1, "relative difference", (table["FI"] / table["FI"].iloc[0] - 1).abs())
    return table


# --- rounding


class Cases(NamedTuple):
    """Random cases: P (K, n) and class gradients (K, n, p) as float32 makes them, and the same in float64."""

    probs: Tensor
    grads: Tensor
    exact_probs: Tensor
    exact_grads: Tensor


def confident_cases(n: int, seed: int, classes: int = 4, dims: int = 3) -> Cases:
    """n random models of `dims` perturbations, P(y_hat) from .3 to 1 - 1e-7, y_hat being class 0.

    The logits' gradients are random; the class gradients are what the backward pass of log_softmax makes
    of them in float32.
    """
    g = torch.Generator().manual_seed(seed)
    sure = (1 - 10 ** (-7 * torch.rand(n, generator=g, dtype=torch.float64))).clamp(0.3, 1 - 1e-7)
    rest = torch.softmax(3 * torch.randn(classes - 1, n, generator=g, dtype=torch.float64), 0) * (1 - sure)
    logits = torch.cat([sure[None], rest]).log().float()
    slopes = torch.randn(classes, n, dims, generator=g)
    return Cases(*_log_softmax_grads(logits, slopes), *_log_softmax_grads(logits.double(), slopes.double()))


def _log_softmax_grads(logits: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """P (K, n) and d log P / d omega (K, n, p) for logits (K, n) with gradients slopes (K, n, p)."""
    leaf = logits.clone().requires_grad_(True)
    log_p = torch.log_softmax(leaf, 0)
    rows = class_gradients(log_p.sum(1), leaf)
    return log_p.detach().exp(), torch.stack([torch.einsum("kn,knp->np", row, slopes) for row in rows])


def by_pseudo_inverse(grads: Tensor, probs: Tensor) -> Tensor:
    """The textbook formula in the dtype of its input: s^T G^+ s with G = sum P s s^T. grads: (K, n, p)."""
    metric = torch.einsum("kn,kni,knj->nij", probs, grads, grads)
    inverse = torch.linalg.pinv(metric, rtol=RTOL, hermitian=True)
    return torch.einsum("ni,nij,nj->n", grads[0], inverse, grads[0])


def by_all_directions(grads: Tensor, probs: Tensor) -> Tensor:
    """The K x K problem of method 1a as it stands: every eigenvalue above the cut counts."""
    return _leverage(grads, probs, drop=0)


def by_centring(grads: Tensor, probs: Tensor) -> Tensor:
    """The K x K problem after subtracting sum P s, with the K-1 largest eigenvalues only."""
    return _leverage(grads - (probs[..., None] * grads).sum(0), probs, drop=1)


def _leverage(grads: Tensor, probs: Tensor, drop: int) -> Tensor:
    root = probs.sqrt()[..., None] * grads
    mu, vectors = torch.linalg.eigh(torch.einsum("kni,lni->nkl", root, root))
    counts = mu > RTOL * mu[:, -1:]
    counts[:, :drop] = False
    return (vectors[:, 0] ** 2 * counts).sum(-1) / probs[0]


def by_this_package(grads: Tensor, probs: Tensor) -> Tensor:
    """`fihelpers.influence.fi`, unwarned: that values reach their ceiling is what is looked for here."""
    with warnings.catch_warnings(action="ignore", category=SaturationWarning):
        return fi(grads, probs, over=1, predicted=0, spectral=Exact(RTOL))


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pseudo-inverse of G": by_pseudo_inverse,
    "K × K, all directions": by_all_directions,
    "K × K, centred, K − 1 directions": by_centring,
    "fihelpers.fi": by_this_package,
}


def rounding(cases: Cases) -> pd.DataFrame:
    """How often each way exceeds the ceiling, with a Wilson interval, and is more than 1 % wrong.

    Index: way. Columns: cases, violations, worst (largest FI / ceiling), wrong (beside the same computation
    in float64), low, high (of the violations).
    """
    top = ceiling(cases.probs, 0).double()
    truth = by_this_package(cases.exact_grads, cases.exact_probs).double()
    rows = []
    for name, way in WAYS.items():
        values = way(cases.grads, cases.probs).double()
        over, count = values / top, len(values)
        violations = int((over > 1 + TOLERANCE).sum())
        low, high = (count * end for end in wilson(violations, count))
        wrong = int(((values / truth - 1).abs() > 0.01).sum())
        rows.append((name, count, violations, float(over.max()), wrong, low, high))
    columns = ["way", "cases", "violations", "worst", "wrong", "low", "high"]
    return pd.DataFrame(rows, columns=columns).set_index("way")


# --- a sure and an unsure answer


def margins(draws: int, seed: int) -> pd.DataFrame:
    """How much larger each measure is for the paper's unsure answer than for its sure one, all else equal.

    Both are divided by their sums. `draws` single perturbations have random slopes of the logits, the same
    under both; the value for SNIP is drawn as well. Index: quantity. Columns: value, the ratio of the means,
    with its bootstrap interval low, high, and n.
    """
    pair = [torch.tensor(published(f"pair_{one}").values, dtype=torch.float64) for one in ("sure", "unsure")]
    pair = [probs / probs.sum() for probs in pair]
    rows = {"ceiling": (float(ceiling(pair[1]) / ceiling(pair[0])), None, None, len(pair))}
    g = torch.Generator().manual_seed(seed)
    slopes = torch.randn(len(pair[0]), draws, generator=g, dtype=torch.float64)
    value = torch.randn(draws, generator=g, dtype=torch.float64)
    pick = torch.randint(draws, (RESAMPLES, draws), generator=g)
    for name in ("FI exact", "Jacobian norm", "SNIP"):
        sure, unsure = (MEASURES[name](slopes - probs @ slopes, probs, value=value) for probs in pair)
        again = unsure[pick].mean(1) / sure[pick].mean(1)
        low, high = again.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        rows[name] = (float(unsure.mean() / sure.mean()), low, high, draws)
    table = pd.DataFrame.from_dict(rows, "index", columns=["value", "low", "high", "n"], dtype=float)
    return table.rename_axis("quantity").astype({"n": int})


# --- what the claims of chapter 12 read


def checks(
    searches: Mapping[str, tuple[Tensor, Tensor, Tensor, Tensor]],
    family: Family,
    moved: pd.DataFrame,
    saliency: Tensor,
) -> pd.DataFrame:
    """One number a check, of what the chapter shows and of the coordinates of `invariance`.

    searches: by name the ratios (n,) of n directions, and FI, which none should pass. moved: of `probes`, of
    whose shortest steps the least and the most stand here. saliency: of each weight, of which the share of
    zeros does. Index: check. Columns: value, low and high where it has an interval, n.
    """
    rows: dict[str, tuple[float, float | None, float | None, int]] = {}
    for name, (ratio, value, _, _) in searches.items():
        rows[f"{name}, best direction over FI"] = (float(ratio.max() / value), None, None, len(ratio))
    table = invariance(family)
    norms = table["Jacobian norm"]
    rows["FI, largest relative change"] = (table["relative difference"].max(), None, None, len(table))
    rows["Jacobian norm, most over least"] = (norms.max() / norms.min(), None, None, len(table))
    near = moved[moved["length ℓ"] == moved["length ℓ"].min()]["measured / predicted"]
    rows["least measured over predicted"] = (near.min(), None, None, len(near))
    rows["most measured over predicted"] = (near.max(), None, None, len(near))
    zeros, n = int((saliency == 0).sum()), saliency.numel()
    rows["share of saliency that is zero"] = (zeros / n, *wilson(zeros, n), n)
    return pd.DataFrame.from_dict(rows, "index", columns=["value", "low", "high", "n"]).rename_axis("check")
