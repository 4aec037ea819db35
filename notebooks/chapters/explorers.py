"""Explorers: small worlds to play with in a page. All is computed in the browser, so no kernel is needed."""

from __future__ import annotations

import base64
import io
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image

from fichapters.described import picture_and_words
from fichapters.style import INK, WIDTH, new_figure

WEB = Path(__file__).parent / "web"
CSS_DPI = 96  # pixels an inch of a page, by the definition of CSS


class Explorer(anywidget.AnyWidget):
    """An explorer; `still` is the figure that a page without JavaScript shows."""

    _css = WEB / "explorer.css"
    title = traitlets.Unicode().tag(sync=True)

    def __init__(self, still: Figure, **values: object) -> None:
        super().__init__(**values)
        self.still = still

    def _ipython_display_(self) -> None:
        png, words = picture_and_words(self.still)
        width = round(self.still.get_size_inches()[0] * CSS_DPI)
        picture = f'<img src="{_uri(png)}" alt="{escape(words["alt"])}" width="{width}">'
        display(HTML(f"<noscript>{picture}<p>{escape(self.title)}</p></noscript>"))
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


def simplex(net: Any, *, title: str, still: Figure) -> Simplex:
    """Explore a network of three answers and two dimensions of omega (method 1).

    net: P(y | omega) = softmax(bias + outer tanh(inner omega + shift)), such as `make_family` of chapter 02
    makes it, with inner: (H, 2); shift: (H,); outer: (3, H); bias: (3,). still: a picture for pages without
    JavaScript. Raises ValueError for other shapes.
    """
    family = {name: getattr(net, name) for name in ("inner", "shift", "outer", "bias")}
    hidden = len(net.inner)
    shapes = [tuple(t.shape) for t in family.values()]
    if shapes != [(hidden, 2), (hidden,), (3, hidden), (3,)]:
        raise ValueError(f"The explorer needs two dimensions and three answers; its tensors are {shapes}.")
    return Simplex(still, title=title, family={name: t.tolist() for name, t in family.items()})


@dataclass(frozen=True)
class Line:
    """A line of a chart through the places of its axis, with a band where low and high are given."""

    name: str
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Position:
    """What one position of a dial shows. pictures: uint8 arrays (H, W, 3), by caption. bars: by name.

    marker: at which place of the chart's axis a vertical line stands. note: what is to be seen, in words.
    """

    label: str
    note: str
    pictures: Mapping[str, np.ndarray]
    lines: Sequence[Line]
    bars: Mapping[str, float] | None = None
    marker: float | None = None


@dataclass(frozen=True)
class Axes:
    """The chart of a dial: what is drawn, from 0 to 1, against what, and what stands at the places of x."""

    x: str
    y: str
    ticks: Sequence[str]


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
    caption = traitlets.Unicode().tag(sync=True)
    group = traitlets.Int(0).tag(sync=True)
    position = traitlets.Int(0).tag(sync=True)

    def __init__(self, still: Figure, live: Live | None = None, **values: object) -> None:
        super().__init__(still, **values)
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
    axes: Axes,
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
    options = [list(dict.fromkeys(chosen)) for chosen in zip(*groups, strict=True)]
    images: dict[str, int] = {}
    stored = []
    for key in itertools.product(*options):
        positions = groups.get(key, ())
        if len(positions) < 2:
            chosen = ", ".join(map(repr, key))
            raise ValueError(f"A dial needs two positions or more; for {chosen} there are {len(positions)}.")
        stored.append([_stored(position, images) for position in positions])
    ticks = [{"at": place, "text": text} for place, text in enumerate(axes.ticks)]
    return Dial(
        _still(next(iter(groups.values()))[start], axes, bars),
        live,
        title=title,
        caption=caption,
        menus=[{"name": n, "options": o} for n, o in zip(names[:-1], options, strict=True)],
        groups=stored,
        images=list(images),
        dial=names[-1],
        axes={"x": axes.x, "y": axes.y, "limits": [0, 1], "ticks": ticks},
        bars=bars,
        position=start,
    )


def _still(position: Position, axes: Axes, bars: str) -> Figure:
    """One position as a figure: its pictures, its chart and its bars side by side."""
    count = len(position.pictures)
    figure, (panels,) = new_figure(1, count + (2 if position.bars else 1), size=(WIDTH, 2.9))
    for ax, (caption, picture) in zip(panels, position.pictures.items(), strict=False):
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(textwrap.fill(caption, 24), fontsize=9, fontweight="normal")
        ax.axis("off")
    chart = panels[count]
    for line in position.lines:
        chart.plot(line.y, label=line.name)
    chart.set(xlabel=axes.x, ylabel=axes.y, ylim=(0, 1))
    chart.set_xticks(range(len(axes.ticks)), axes.ticks, rotation=45)
    if position.marker is not None:
        chart.axvline(position.marker, color=INK, linewidth=0.8, linestyle=":")
    if position.bars:
        panels[-1].barh(list(position.bars), list(position.bars.values()))
        panels[-1].set_xlabel(bars)
        panels[-1].invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(textwrap.fill(position.note, 100), fontsize=10)
    return figure


def _stored(position: Position, images: dict[str, int]) -> dict[str, object]:
    """A position as the browser reads it; new images are added to `images`, by their place."""
    shown = []
    for caption, picture in position.pictures.items():
        buffer = io.BytesIO()
        few = Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE)
        few.save(buffer, format="PNG", optimize=True)
        place = images.setdefault(_uri(buffer.getvalue()), len(images))
        shown.append({"image": place, "caption": caption})
    lines = [
        {"name": line.name, "x": list(range(len(line.y)))}
        | {"y": _rounded(line.y), "low": _rounded(line.low), "high": _rounded(line.high)}
        for line in position.lines
    ]
    bars = (position.bars or {}).items()
    return {
        "label": position.label,
        "note": position.note,
        "marker": position.marker,
        "pictures": shown,
        "lines": lines,
        "bars": [{"name": name, "value": round(value, 4), "text": f"{value:.2f}"} for name, value in bars],
    }


def _rounded(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [round(float(value), 4) for value in values]


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
