"""Chapter 02: the measure, from the family of distributions to the closed form (method 1 and 1a)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from fihelpers.answers import Answers, usual_answers
from fihelpers.filters import Damped, Exact, Spectral
from fihelpers.influence import Moments, SaturationWarning, ceiling, fi, moments
from fihelpers.measures import JACOBIAN, SNIP
from fihelpers.models.language import Batch, LanguageModel
from fihelpers.tasks import Example

BASE = (0.55, 0.30, 0.15)  # P at omega = 0 of the three-class family
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

    def on_sphere(self, omega: Tensor) -> Tensor:
        """2 sqrt(P), a point on a sphere of radius 2, shape (..., K)."""
        return 2 * (self.log_probs(omega) / 2).exp()


class Local(NamedTuple):
    """All that FI needs to know at one point: P (K,), class gradients (K, p), y_hat and metric G (p, p)."""

    probs: Tensor
    grads: Tensor
    predicted: int
    metric: Tensor


def make_family(
    base: Sequence[float], dims: int, seed: int, scales: Sequence[float] | None = None, hidden: int = 6
) -> Family:
    """A random family with the probabilities `base` at omega = 0.

    dims: p. scales: how strongly the network reads each dimension of omega; 1 for each where None.
    """
    g = torch.Generator().manual_seed(seed)
    size = torch.ones(dims) if scales is None else torch.tensor(scales)
    inner = torch.randn(hidden, dims, generator=g, dtype=torch.float64) * size.double()
    shift = 0.5 * torch.randn(hidden, generator=g, dtype=torch.float64)
    outer = torch.randn(len(base), hidden, generator=g, dtype=torch.float64)
    bias = torch.tensor(base, dtype=torch.float64).log() - outer @ torch.tanh(shift)
    return Family(inner, shift, outer, bias)


def local(log_probs: Callable[[Tensor], Tensor], origin: Tensor) -> Local:
    """P, class gradients, y_hat and metric of omega -> log P at a point `origin` of shape (p,)."""
    probs = log_probs(origin).exp()
    grads = jacrev(log_probs)(origin)
    return Local(probs, grads, int(probs.argmax()), torch.einsum("k,ki,kj->ij", probs, grads, grads))


def grid_lines(family: Family, reach: float, lines: int, points: int = 81) -> pd.DataFrame:
    """Lines of constant omega_1 and of constant omega_2 in [-reach, reach]^2, and P along them.

    Columns: held (which coordinate is held), line, omega_1, omega_2, P_1, P_2, P_3.
    """
    along = torch.linspace(-reach, reach, points, dtype=torch.float64)
    parts = []
    for number, at in enumerate(torch.linspace(-reach, reach, lines).tolist()):
        fixed = torch.full_like(along, at)
        for held, pair in ((1, (fixed, along)), (2, (along, fixed))):
            parts.append(_points(family, torch.stack(pair, -1)).assign(held=held, line=number))
    return pd.concat(parts, ignore_index=True)


def rings(family: Family, metric: Tensor, radius: float, points: int = 121) -> pd.DataFrame:
    """Two rings about omega = 0 and their images: equal information length, and equal length in omega.

    The first is the ellipse omega^T G omega = radius^2; the second a circle of the same area. Columns as in
    `grid_lines`, with `ring` in the place of `held` and `line`.
    """
    angle = torch.linspace(0, 2 * math.pi, points, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    mu, vectors = torch.linalg.eigh(metric)
    ellipse = radius * circle @ (vectors / mu.sqrt()) @ vectors.T
    even = radius * circle / mu.prod() ** 0.25
    return pd.concat(
        [
            _points(family, ellipse).assign(ring="equal information length"),
            _points(family, even).assign(ring="equal length in ω"),
        ],
        ignore_index=True,
    )


def _points(family: Family, omega: Tensor) -> pd.DataFrame:
    table = torch.cat([omega, family.log_probs(omega).exp()], -1)
    names = ["omega_1", "omega_2", *(f"P_{k + 1}" for k in range(table.shape[1] - 2))]
    return pd.DataFrame(table.numpy(), columns=names)


def kl_ratios(family: Family, metric: Tensor, steps: Sequence[float], directions: int = 6) -> pd.DataFrame:
    """KL(P_0 || P_eps) over eps^T G eps / 2, for steps eps of several sizes and directions (degrees)."""
    origin = family.log_probs(torch.zeros(2, dtype=torch.float64))
    rows = []
    for degrees in (360 * i / directions for i in range(directions)):
        v = _direction(torch.tensor(math.radians(degrees), dtype=torch.float64))
        for size in steps:
            eps = size * v
            kl = (origin.exp() * (origin - family.log_probs(eps))).sum()
            rows.append((degrees, size, float(kl / (eps @ metric @ eps / 2))))
    return pd.DataFrame(rows, columns=["degrees", "step", "ratio"])


def _direction(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


def path_lengths(family: Family, paths: dict[str, Tensor]) -> pd.DataFrame:
    """The information length of each path (T, p), from the metric, and on the sphere of 2 sqrt(P).

    `great circle` is the shortest way between the ends for a model that could reach every P;
    `f change` is the change of -log P(y_hat), y_hat being the prediction at the start.
    """
    rows = []
    for name, path in paths.items():
        ball = family.on_sphere(path)
        cosine = (ball[0] @ ball[-1]) / 4
        log_p = family.log_probs(path[[0, -1]])[:, family.log_probs(path[0]).argmax()]
        rows.append(
            {
                "path": name,
                "by the metric": float(_metric_steps(family, path).sum()),
                "on the sphere": float(ball.diff(dim=0).norm(dim=-1).sum()),
                "great circle": float(2 * torch.acos(cosine)),
                "f change": float(log_p[0] - log_p[1]),
            }
        )
    return pd.DataFrame(rows)


def _metric_steps(family: Family, path: Tensor) -> Tensor:
    """Length of each step of a path (T, p), by G at its middle: shape (T-1,)."""
    middle = (path[1:] + path[:-1]) / 2
    grads = vmap(jacrev(family.log_probs))(middle)
    moved = torch.einsum("tki,ti->tk", grads, path.diff(dim=0))
    return (family.log_probs(middle).exp() * moved.square()).sum(-1).sqrt()


def bow(start: Tensor, end: Tensor, height: float, points: int = 400) -> Tensor:
    """A path (points, 2) from start to end, bent sideways by `height` times its length; 0 is straight."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    way = end - start
    side = torch.stack([-way[1], way[0]])
    return start + t * way + height * torch.sin(math.pi * t) * side


def curve_ratios(family: Family, velocities: dict[str, tuple[Tensor, Tensor]], far: float) -> pd.DataFrame:
    """(change of f)^2 / length^2 along curves t v + t^2 b from omega = 0, against the length walked.

    velocities: name -> (v, b). far: information length at which a curve stops, roughly.
    """
    here = local(family.log_probs, torch.zeros(2, dtype=torch.float64))
    rows = []
    for name, (v, b) in velocities.items():
        unit = v / (v @ here.metric @ v).sqrt()
        t = torch.cat([torch.zeros(1), torch.logspace(-4, math.log10(far), 400)]).double()[:, None]
        path = t * unit + t * t * b
        length = _metric_steps(family, path).cumsum(0)
        f = -family.log_probs(path)[:, here.predicted]
        ratio = (f[1:] - f[0]) ** 2 / length**2
        rows.append(pd.DataFrame({"curve": name, "length": length, "ratio": ratio}))
    return pd.concat(rows, ignore_index=True)


def direction_search(here: Local, n: int) -> pd.DataFrame:
    """(grad f . v)^2 / v^T G v for n directions v in the plane, over half a turn (v and -v are alike)."""
    angle = torch.arange(n, dtype=torch.float64) * math.pi / n
    v = _direction(angle)
    change = (v @ here.grads[here.predicted]) ** 2
    length2 = torch.einsum("ni,ij,nj->n", v, here.metric, v)
    return pd.DataFrame({"degrees": torch.rad2deg(angle), "ratio": change / length2})


def angle_of(v: Tensor) -> float:
    """Direction of a vector (2,) in degrees, in [0, 180)."""
    return math.degrees(math.atan2(float(v[1]), float(v[0]))) % 180


def _polar(nu: Tensor) -> Tensor:
    r, theta = 5 + nu[0], nu[1]
    return torch.stack([r * theta.cos() - 5, r * theta.sin()])


def _curved(nu: Tensor) -> Tensor:
    return torch.stack([3 * torch.sinh(nu[0]) + nu[1] + nu[1] ** 2, (torch.exp(4 * nu[1]) - 1) / 2])


def _linear(rows: Sequence[Sequence[float]]) -> Callable[[Tensor], Tensor]:
    matrix = torch.tensor(rows, dtype=torch.float64)
    return lambda nu: matrix @ nu


COORDINATES: dict[str, Callable[[Tensor], Tensor]] = {
    "as given": lambda nu: nu,
    "other units (× 100, × 0.02)": _linear([[100, 0], [0, 0.02]]),
    "rotated by 30°": _linear([[0.75**0.5, -0.5], [0.5, 0.75**0.5]]),
    "sheared": _linear([[1, 3], [0, 1]]),
    "polar": _polar,
    "nonlinear": _curved,
}


def _through(family: Family, phi: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The family's log-probabilities in the coordinates nu, omega = phi(nu)."""
    return lambda nu: family.log_probs(phi(nu))


def invariance(family: Family, lam: float) -> pd.DataFrame:
    """FI and the Jacobian norm of one family in several coordinates omega = phi(nu), phi(0) = 0.

    Columns: FI of the pair, its relative difference to the first row, FI of each coordinate alone, the
    Jacobian norm of the pair, and FI damped by `lam`.
    """
    rows = []
    for name, phi in COORDINATES.items():
        here = local(_through(family, phi), torch.zeros(2, dtype=torch.float64))
        single = _quiet_fi(here.grads, here.probs)
        rows.append(
            {
                "coordinates": name,
                "FI": float(fi(here.grads, here.probs, over=0)),
                "FI of ν₁ alone": float(single[0]),
                "FI of ν₂ alone": float(single[1]),
                "Jacobian norm": float(here.grads[here.predicted].norm()),
                f"FI damped {lam:g}": float(fi(here.grads, here.probs, over=0, spectral=Damped(lam))),
            }
        )
    table = pd.DataFrame(rows).set_index("coordinates")
    table.insert(1, "relative difference", (table["FI"] / table["FI"].iloc[0] - 1).abs())
    return table


def _quiet_fi(grads: Tensor, probs: Tensor, **options: object) -> Tensor:
    """`fi` of values that may all reach their ceiling, which is what the caller wants to see."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        return fi(grads, probs, **options)  # type: ignore[arg-type]


def spectrum(here: Local, filters: Sequence[Spectral]) -> pd.DataFrame:
    """The directions that FI adds up (method 1a): mu, leverage U[y_hat, i]^2 / P(y_hat), and each filter's h.

    The null direction sqrt(P), which exists for every model, is left out.
    """
    root = here.probs.sqrt()[:, None] * here.grads
    mu, vectors = torch.linalg.eigh(root @ root.T)
    mu, vectors = mu[1:].flip(0), vectors[:, 1:].flip(1)
    table = {"μ": mu, "leverage": vectors[here.predicted] ** 2 / here.probs[here.predicted]}
    gains = {f"h {h}": h.gain(mu, mu[0], mu.dtype) for h in filters}
    return pd.DataFrame({name: column.numpy() for name, column in {**table, **gains}.items()})


def gains(filters: Sequence[Spectral], low: float, high: float, points: int = 400) -> pd.DataFrame:
    """h(mu) of each filter, mu from low to high; the largest mu of the group is `high`."""
    mu = torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)
    top = torch.tensor(high, dtype=torch.float64)
    columns = {str(h): h.gain(mu, top, torch.float32).numpy() for h in filters}
    return pd.DataFrame({"μ": mu.numpy(), **columns}).melt("μ", var_name="filter", value_name="h")


def damping_path(here: Local, lams: Sequence[float]) -> pd.DataFrame:
    """FI of single elements (p = 1) under a range of dampings, each relative to the largest element.

    Columns: element, lam, value, exact (the same for exact FI) and jacobian2 (for the squared Jacobian norm).
    """
    m = moments(here.grads, here.probs)
    exact, jacobian2 = _relative(fi(here.grads, here.probs)), _relative(m.score**2)
    rows = []
    for lam in lams:
        values = _relative(fi(here.grads, here.probs, spectral=Damped(lam)))
        for i, (value, e, j) in enumerate(zip(values, exact, jacobian2, strict=True)):
            rows.append((f"{i + 1}", lam, float(value), float(e), float(j)))
    return pd.DataFrame(rows, columns=["element", "lam", "value", "exact", "jacobian2"])


def _relative(values: Tensor) -> Tensor:
    return values / values.max()


def rank_agreement(path: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of damped FI with exact FI and the squared Jacobian norm, for each lam."""
    rows = []
    for lam, part in path.groupby("lam"):
        ranks = part[["value", "exact", "jacobian2"]].rank().corr()["value"]
        rows.append((lam, ranks["exact"], ranks["jacobian2"]))
    return pd.DataFrame(rows, columns=["lam", "with_exact", "with_jacobian2"])


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
    rows = [torch.autograd.grad(log_p[y].sum(), leaf, retain_graph=True)[0] for y in range(len(logits))]
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
    """`fihelpers.influence.fi`."""
    return _quiet_fi(grads, probs, over=1, predicted=0, spectral=Exact(RTOL))


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pseudo-inverse of G": by_pseudo_inverse,
    "K × K, all directions": by_all_directions,
    "K × K, centred, K − 1 directions": by_centring,
    "fihelpers.fi": by_this_package,
}


def rounding_cases(cases: Cases) -> pd.DataFrame:
    """FI of every case by every way, over its ceiling. Columns: way, unsure (1 - P(y_hat)), over, error.

    `over` is FI / ceiling, at most 1 where FI is right; `error` is the relative difference to the same
    computation in float64.
    """
    top = ceiling(cases.probs, 0).double()
    truth = by_this_package(cases.exact_grads, cases.exact_probs).double()
    parts = []
    for name, way in WAYS.items():
        values = way(cases.grads, cases.probs).double()
        error = (values / truth - 1).abs()
        columns = {"unsure": cases.exact_probs[1:].sum(0), "over": values / top, "error": error}
        parts.append(pd.DataFrame({k: v.numpy() for k, v in columns.items()}).assign(way=name))
    return pd.concat(parts, ignore_index=True)


def rounding_summary(table: pd.DataFrame) -> pd.DataFrame:
    """For each way the violations of the ceiling, the worst FI / ceiling, and the cases over 1 % wrong."""
    judged = table.assign(violates=table.over > 1 + TOLERANCE, wrong=table.error > 0.01)
    return judged.groupby("way", sort=False).agg(
        cases=("over", "size"),
        violations=("violates", "sum"),
        worst=("over", "max"),
        wrong=("wrong", "sum"),
    )


def margins(
    sure: Sequence[float], unsure: Sequence[float], draws: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """How much larger each measure is for an unsure than for a sure answer, all else equal (claim 3).

    `draws` single perturbations with random slopes of the logits, the same under both distributions; the
    value for SNIP is drawn as well. Returns by measure the ratio of the means with its bootstrap interval.
    """
    g = torch.Generator().manual_seed(seed)
    slopes = torch.randn(len(sure), draws, generator=g, dtype=torch.float64)
    value = torch.randn(draws, generator=g, dtype=torch.float64)
    found: dict[str, list[Tensor]] = {"exact": [], "jacobian": [], "snip": []}
    for printed in (sure, unsure):
        probs = torch.tensor(printed, dtype=torch.float64)
        probs = probs / probs.sum()
        grads = slopes - probs @ slopes
        found["exact"].append(fi(grads, probs))
        found["jacobian"].append(JACOBIAN(grads, probs))
        found["snip"].append(SNIP(grads, probs, value=value))
    pick = torch.randint(draws, (RESAMPLES, draws), generator=g)
    ratios = {}
    for name, (low, high) in found.items():
        again = (high[pick].mean(1) / low[pick].mean(1)).quantile(torch.tensor([0.025, 0.975]).double())
        ratios[name] = (float(high.mean() / low.mean()), *again.tolist())
    return ratios


def ceiling_curve(points: int = 200) -> pd.DataFrame:
    """The ceiling (1 - P) / P for P(y_hat) from .2 to .99."""
    p = torch.linspace(0.2, 0.99, points)
    return pd.DataFrame({"P": p.numpy(), "ceiling": ((1 - p) / p).numpy()})


@dataclass(frozen=True, eq=False)
class Question:
    """One question put to a model, and the classes that its answer is judged on."""

    model: LanguageModel
    batch: Batch
    classes: Answers

    def log_probs(self) -> Tensor:
        """log P of the K classes, (K,), in float64 from the model's own logits, differentiable."""
        return self.classes.log_probs(self.model.last_logits(self.batch).double())[0]


def ask(model: LanguageModel, example: Example) -> Question:
    """Put a question to a model; its classes are fixed, so a changed model is judged on the same ones."""
    batch = model.batches([example.prompt])[0]
    answers = usual_answers(model.tokenizer, lettered=bool(example.options))
    with torch.no_grad():
        return Question(model, batch, answers.fix(model.last_logits(batch)))


def weight_gradients(question: Question, name: str) -> tuple[Tensor, Tensor]:
    """P (K,) and the class gradients (K, *shape) of one weight tensor, by K - 1 backward passes.

    The row of the predicted class follows from sum_y P(y) s_y = 0. Raises KeyError for an unknown name.
    """
    weight = weight_of(question.model, name)
    log_p = question.log_probs()
    probs = log_p.detach().exp().cpu()
    y_hat = int(probs.argmax())
    grads = torch.zeros(len(probs), *weight.shape, dtype=torch.float64)
    for y in range(len(probs)):
        if y != y_hat:
            grads[y] = torch.autograd.grad(log_p[y], weight, retain_graph=True)[0].double().cpu()
            grads[y_hat] -= probs[y] / probs[y_hat] * grads[y]
    return probs, grads


def weight_of(model: LanguageModel, name: str) -> Tensor:
    """A parameter by its name. Raises KeyError for an unknown one."""
    named = dict(model.network.named_parameters())
    if name not in named:
        raise KeyError(f"the model {model.name!r} has no weight {name!r}; take a name from its state dict.")
    return named[name]


def probes(
    question: Question, name: str, m: Moments, values: Tensor, lengths: Sequence[float]
) -> pd.DataFrame:
    """Move single weights by given information lengths; f should change by sqrt(FI) times the length.

    m: moments of the tensor's class gradients; values: its FI. The weights are those of the highest and of
    the median FI, and that of the largest |df|. The step is relative to the root mean square of the tensor.
    """
    order = values.flatten().argsort()
    chosen = {
        "highest FI": int(order[-1]),
        "median FI": int(order[len(order) // 2]),
        "largest |∂f|": int(m.score.abs().flatten().argmax()),
    }
    weight = weight_of(question.model, name)
    typical = float(weight.detach().float().square().mean().sqrt())
    with torch.no_grad():
        before = question.log_probs()
    rows = []
    for label, i in chosen.items():
        for length in lengths:
            step = length / float(m.metric.flatten()[i].sqrt())
            with _moved(weight, i, step), torch.no_grad():
                change = float((question.log_probs() - before)[before.argmax()].abs())
            predicted = length * float(values.flatten()[i].sqrt())
            gradient = float(m.score.flatten()[i].abs())
            rows.append(
                (label, float(values.flatten()[i]), gradient, length, step / typical, predicted, change)
            )
    columns = ["weight", "FI", "|∂f|", "length ℓ", "step / typical weight", "predicted |Δf|", "measured |Δf|"]
    table = pd.DataFrame(rows, columns=columns).set_index("weight")
    return table.assign(**{"measured / predicted": table["measured |Δf|"] / table["predicted |Δf|"]})


@contextmanager
def _moved(weight: Tensor, index: int, step: float) -> Iterator[None]:
    """One entry of a weight is displaced for a while, and put back bit for bit."""
    flat = weight.data.view(-1)
    old = flat[index].clone()
    flat[index] += step
    try:
        yield
    finally:
        flat[index] = old
