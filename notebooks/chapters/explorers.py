"""Explorers: small worlds to play with in a page. All is computed in the browser, so no kernel is needed."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import anywidget
import numpy as np
import traitlets
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fichapters.described import describe
from fichapters.explore import image_uri, still_picture
from fichapters.style import INK, WIDTH, new_figure

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


class Network(Protocol):
    """P(y | omega) = softmax(bias + outer tanh(inner omega + shift)), as `manifold.make_family` makes it."""

    @property
    def inner(self) -> Tensor: ...
    @property
    def shift(self) -> Tensor: ...
    @property
    def outer(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor: ...


def simplex(net: Network, *, title: str, still: Figure) -> Simplex:
    """Explore a network of three answers and two dimensions of omega (method 1).

    inner: (H, 2); shift: (H,); outer: (3, H); bias: (3,). still: a picture for pages without JavaScript.
    Raises ValueError for other shapes.
    """
    family = {name: getattr(net, name) for name in ("inner", "shift", "outer", "bias")}
    hidden = len(net.inner)
    shapes = [tuple(t.shape) for t in family.values()]
    if shapes != [(hidden, 2), (hidden,), (3, hidden), (3,)]:
        raise ValueError(f"The explorer needs two dimensions and three answers; its tensors are {shapes}.")
    return Simplex(still, describe(still), title=title, family={n: t.tolist() for n, t in family.items()})


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
    """What one position of a dial shows. pictures: uint8 arrays (H, W) or (H, W, 3), by caption.

    marker: where on the x axis of the chart a vertical line stands. note: what is to be seen, in words.
    """

    label: str
    note: str
    pictures: Mapping[str, np.ndarray] | None = None
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()
    marker: float | None = None


@dataclass(frozen=True)
class Axes:
    """The chart of a dial: what is drawn against what, the range of y, and what to write at values of x."""

    x: str = ""
    y: str = ""
    limits: tuple[float, float] = (0.0, 1.0)
    ticks: Mapping[float, str] | None = None


@dataclass(frozen=True)
class Live:
    """Any value, computed by the kernel: `compute` makes a position of the chosen options and the value.

    label: what the value is. low and high: its range. start: what stands in the box at first.
    """

    label: str
    start: float
    low: float
    high: float
    compute: Callable[[tuple[str, ...], float], Position]


class Dial(Explorer):
    """Pictures, lines and bars for each position of a slider; menus choose between several sliders.

    Where a kernel runs, a further box asks it for positions in between.
    """

    _esm = WEB / "dial.js"
    menus = traitlets.List(traitlets.Dict()).tag(sync=True)
    groups = traitlets.List(traitlets.List(traitlets.Dict())).tag(sync=True)  # the last menu runs fastest
    images = traitlets.List(traitlets.Unicode()).tag(sync=True)  # data URIs, each once
    dial = traitlets.Unicode().tag(sync=True)
    axes = traitlets.Dict().tag(sync=True)
    bars = traitlets.Unicode().tag(sync=True)
    largest = traitlets.Float(1.0).tag(sync=True)
    caption = traitlets.Unicode().tag(sync=True)
    group = traitlets.Int(0).tag(sync=True)
    position = traitlets.Int(0).tag(sync=True)

    def __init__(self, still: Figure, alt: str, live: Live | None = None, **values: object) -> None:
        super().__init__(still, alt, **values)
        self.live = live
        if live:
            self.on_msg(self._answer)

    def _answer(self, _: object, asked: dict[str, Any], __: object) -> None:
        """Tells a page that a kernel is there, or computes what it asks for."""
        live = self.live
        assert live is not None
        if "value" not in asked:
            given = {"label": live.label, "start": live.start, "low": live.low, "high": live.high}
            return self.send({"live": given})
        options = tuple(str(option) for option in asked["options"])
        try:
            if not live.low <= float(asked["value"]) <= live.high:
                raise ValueError(f"Choose a value from {live.low:g} to {live.high:g}.")
            images: dict[str, int] = {}
            made = _stored(live.compute(options, float(asked["value"])), images)
            self.send({"position": made, "images": list(images)})
        except Exception as error:  # it would go unseen otherwise
            self.send({"error": str(error)})


def dial(
    groups: Mapping[tuple[str, ...], Sequence[Position]],
    *,
    title: str,
    caption: str,
    names: Sequence[str],
    axes: Axes = Axes(),
    bars: str = "",
    start: int = 0,
    live: Live | None = None,
) -> Dial:
    """Turn through stored results: menus of options, and a slider through the positions of each choice.

    groups: positions by the options that are chosen, one option a menu; every combination must be there.
    names: what the menus and, last, the slider choose. bars: what the bars are. start: the first position
    that is shown, also by pages without JavaScript. caption: what the reader may try, with units and n.
    Raises ValueError where a choice has fewer than two positions or none.
    """
    menus = _menus(groups, names)
    images: dict[str, int] = {}
    stored = [
        [_stored(position, images) for position in groups[key]]
        for key in itertools.product(*(menu["options"] for menu in menus))
    ]
    values = [bar.value for positions in groups.values() for position in positions for bar in position.bars]
    still = _still(next(iter(groups.values()))[start], axes, bars)
    return Dial(
        still,
        describe(still),
        live,
        title=title,
        caption=caption,
        menus=menus,
        groups=stored,
        images=list(images),
        dial=names[-1],
        axes={"x": axes.x, "y": axes.y, "limits": list(axes.limits), "ticks": _ticks(axes)},
        bars=bars,
        largest=max([1.0, *values]),
        position=start,
    )


def _menus(groups: Mapping[tuple[str, ...], Sequence[Position]], names: Sequence[str]) -> list[dict]:
    """The menus, each with its name and options; raises ValueError unless every choice has positions."""
    menus = [
        {"name": name, "options": list(dict.fromkeys(options))}
        for name, options in zip(names[:-1], zip(*groups, strict=True), strict=True)
    ]
    for key in itertools.product(*(menu["options"] for menu in menus)):
        found = len(groups.get(key, ()))
        if found < 2:
            chosen = ", ".join(map(repr, key))
            raise ValueError(f"A dial needs two positions or more, but for {chosen} there are {found}.")
    return menus


def _still(position: Position, axes: Axes, bars: str) -> Figure:
    """One position as a figure: its pictures, its chart and its bars side by side."""
    pictures = list((position.pictures or {}).items())
    kinds = [*("picture" for _ in pictures), *(["chart"] if position.lines else [])]
    kinds += ["bars"] if position.bars else []
    figure, axs = new_figure(1, len(kinds), size=(WIDTH, 2.9))
    for ax, kind in zip(axs[0], kinds, strict=True):
        if kind == "picture":
            caption, picture = pictures.pop(0)
            ax.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set_title(textwrap.fill(caption, 24), fontsize=9, fontweight="normal")
            ax.axis("off")
        elif kind == "chart":
            for line in position.lines:
                ax.plot(line.x, line.y, label=line.name)
            ticks = axes.ticks or {}
            ax.set(xlabel=axes.x, ylabel=axes.y, ylim=axes.limits)
            ax.set_xticks(list(ticks), list(ticks.values()), rotation=45)
            if position.marker is not None:
                ax.axvline(position.marker, color=INK, linewidth=0.8, linestyle=":")
        else:
            ax.barh([bar.name for bar in position.bars], [bar.value for bar in position.bars])
            ax.set_xlabel(bars)
            ax.invert_yaxis()
    if position.lines:
        figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(textwrap.fill(position.note, 100), fontsize=10)
    return figure


def _ticks(axes: Axes) -> list[dict[str, object]] | None:
    return None if axes.ticks is None else [{"at": at, "text": text} for at, text in axes.ticks.items()]


def _stored(position: Position, images: dict[str, int]) -> dict[str, object]:
    """A position as the browser reads it; new images are added to `images`, by their place."""
    shown = []
    for caption, picture in (position.pictures or {}).items():
        image = Image.fromarray(picture)
        if picture.ndim == 3:  # of few colours, which makes it small
            image = image.quantize(256, dither=Image.Dither.NONE)
        place = images.setdefault(image_uri(image), len(images))
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
