"""Explorers: small worlds to play with in a page. All is computed in the browser, so no kernel is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fihelpers.explore import image_uri, still_picture

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
        made = self._repr_mimebundle_()
        assert made is not None  # it is for a widget without a view
        bundle, metadata = made
        display(bundle, metadata=metadata, raw=True)


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


@dataclass(frozen=True)
class Line:
    """A line of a chart, with a band from low to high where these are given; all of one length."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class Bar:
    """A bar from 0; `text` is the value as it is shown."""

    name: str
    value: float
    text: str


@dataclass(frozen=True)
class Position:
    """What one position of a dial shows. pictures: grey levels (H, W, 3) or (H, W) as uint8, by caption.

    marker: where on the x axis of the chart a vertical line stands. note: what is to be seen, in words.
    """

    label: str
    note: str
    pictures: Mapping[str, np.ndarray] | None = None
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()
    marker: float | None = None


class Dial(Explorer):
    """Pictures, lines and bars for each position of a slider, of which a menu may choose between several."""

    _esm = WEB / "dial.js"
    groups = traitlets.List(traitlets.Dict()).tag(sync=True)
    images = traitlets.List(traitlets.Unicode()).tag(sync=True)  # data URIs, each once
    choice = traitlets.Unicode().tag(sync=True)
    dial = traitlets.Unicode().tag(sync=True)
    axes = traitlets.Dict().tag(sync=True)
    largest = traitlets.Float(1.0).tag(sync=True)
    group = traitlets.Int(0).tag(sync=True)
    position = traitlets.Int(0).tag(sync=True)


def dial(
    groups: Mapping[str, Sequence[Position]],
    *,
    title: str,
    names: tuple[str, str],
    axes: tuple[str, str] = ("", ""),
    limits: tuple[float, float] = (0.0, 1.0),
    still: Figure,
    alt: str,
) -> Dial:
    """Turn through stored results: a menu of groups, and a slider through the positions of each.

    names: what the menu and the slider choose. axes and limits: the chart's axes, and the range of its y.
    still and alt: a picture for pages without JavaScript, and what it shows. Raises ValueError where a group
    has fewer than two positions.
    """
    short = [name for name, positions in groups.items() if len(positions) < 2]
    if short or not groups:
        raise ValueError(f"A dial needs two positions or more, but {(*short, 'it')[0]!r} has fewer.")
    images: dict[str, int] = {}
    stored = [
        {"name": name, "positions": [_stored(position, images) for position in positions]}
        for name, positions in groups.items()
    ]
    values = [bar.value for positions in groups.values() for position in positions for bar in position.bars]
    return Dial(
        still,
        alt,
        title=title,
        groups=stored,
        images=list(images),
        choice=names[0],
        dial=names[1],
        axes={"x": axes[0], "y": axes[1], "limits": list(limits)},
        largest=max([limits[1], *values]),
    )


def _stored(position: Position, images: dict[str, int]) -> dict[str, object]:
    """A position as the browser reads it; new images are added to `images`, by their place."""
    shown = []
    for caption, picture in (position.pictures or {}).items():
        place = images.setdefault(image_uri(Image.fromarray(picture)), len(images))
        shown.append({"image": place, "caption": caption})
    lines, bars = ([asdict(part) for part in parts] for parts in (position.lines, position.bars))
    return {
        "label": position.label,
        "note": position.note,
        "marker": position.marker,
        "pictures": shown,
        "lines": lines,
        "bars": bars,
    }
