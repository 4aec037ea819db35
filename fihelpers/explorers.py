"""Explorers: small worlds to play with in a page. All is computed in the browser, so no kernel is needed."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets
from IPython.display import HTML, display
from matplotlib.figure import Figure
from torch import Tensor

from fihelpers.explore import still_picture

WEB = Path(__file__).parent / "web"


class Explorer(anywidget.AnyWidget):
    """An explorer; `still` is the figure that a page without JavaScript shows."""

    _css = WEB / "explorer.css"
    title = traitlets.Unicode().tag(sync=True)

    def __init__(self, still: Figure, alt: str, **values: object) -> None:
        super().__init__(**values)
        self.still, self.alt = still, alt

    def _ipython_display_(self) -> None:
        display(HTML(still_picture(self.still, self.alt, self.title)))
        display(self._repr_mimebundle_(), raw=True)


class Simplex(Explorer):
    """Three answers that depend on two numbers omega: P on the simplex, the metric's ellipse, and FI.

    The reader moves omega, the direction u of a single perturbation, and the damping lambda = 10^decade.
    """

    _esm = WEB / "simplex.js"
    family = traitlets.Dict().tag(sync=True)
    omega = traitlets.List(traitlets.Float(), [0.0, 0.0]).tag(sync=True)
    degrees = traitlets.Float(30.0).tag(sync=True)
    decade = traitlets.Float(-2.0).tag(sync=True)


def simplex(
    inner: Tensor, shift: Tensor, outer: Tensor, bias: Tensor, *, title: str, still: Figure, alt: str
) -> Simplex:
    """Explore P(y | omega) = softmax(bias + outer tanh(inner omega + shift)) of three answers (method 1).

    inner: (H, 2); shift: (H,); outer: (3, H); bias: (3,). still and alt: a picture for pages without
    JavaScript, and what it shows. Raises ValueError for other shapes.
    """
    hidden = len(inner)
    shapes = [tuple(t.shape) for t in (inner, shift, outer, bias)]
    if shapes != [(hidden, 2), (hidden,), (3, hidden), (3,)]:
        raise ValueError(f"The explorer needs two dimensions and three answers; its tensors are {shapes}.")
    named = {"inner": inner, "shift": shift, "outer": outer, "bias": bias}
    return Simplex(still, alt, title=title, family={name: t.tolist() for name, t in named.items()})
