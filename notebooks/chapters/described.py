"""Figures that describe themselves: every picture comes with words for readers who cannot see it."""

from __future__ import annotations

import io
from typing import Any

from IPython.core.pylabtools import print_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

COLOURS = 256  # of a stored picture; a plot has fewer, but for the edges of its letters


class DescribedFigure(Figure):
    """A figure that a notebook stores as a small PNG with an `alt` text made of its own titles and labels."""


def show_described(shell: Any) -> None:
    """Makes a notebook (IPython's shell, or None outside of one) show such figures with their words.

    A formatter of their own type goes before the one that matplotlib sets up for all figures.
    """
    if shell is not None:
        shell.display_formatter.formatters["image/png"].for_type(DescribedFigure, picture_and_words)


def picture_and_words(figure: Figure) -> tuple[bytes, dict[str, str]]:
    """A figure as a small PNG, and the metadata in which IPython keeps an alt text."""
    return small_png(print_figure(figure, fmt="png")), {"alt": describe(figure)}


def small_png(png: bytes) -> bytes:
    """The same picture in at most 256 colours: about a third of the bytes, and the same to the eye."""
    picture, buffer = Image.open(io.BytesIO(png)), io.BytesIO()
    few = picture.convert("RGB").quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(buffer, format="png", compress_level=9, dpi=picture.info.get("dpi", (96, 96)))
    return buffer.getvalue()


def describe(figure: Figure) -> str:
    """What the figure shows, panel by panel: title, what is drawn against what, and the legend's entries."""
    parts = [_plain(figure.get_suptitle()), _plain(figure.get_supxlabel())]
    parts += [_describe_panel(axes) for axes in figure.axes if axes.get_visible() and not _is_colorbar(axes)]
    parts += [f"Colours: {_plain(axes.get_ylabel())}" for axes in figure.axes if _is_colorbar(axes)]
    parts += ["Shown: " + _entries(legend.get_texts()) for legend in figure.legends]
    said = list(dict.fromkeys(part for part in parts if part.strip(" :")))
    return ". ".join(said) or "A picture without title or labels"


def _describe_panel(axes: Axes) -> str:
    title = next((text for place in ("left", "center", "right") if (text := axes.get_title(loc=place))), "")
    across, up = _plain(axes.get_xlabel()), _plain(axes.get_ylabel())
    plot = f"{up} against {across}" if up and across else up or across
    legend = axes.get_legend()
    names = "lines and marks: " + _entries(legend.get_texts()) if legend else ""
    words = "; ".join(part for part in (plot, names) if part)
    return ": ".join(part for part in (_plain(title), words) if part)


def _is_colorbar(axes: Axes) -> bool:
    return axes.get_label() == "<colorbar>"


def _entries(texts: list[Any]) -> str:
    return ", ".join(_plain(text.get_text()) for text in texts)


def _plain(text: str) -> str:
    """Text without the marks of formulas and line breaks."""
    return " ".join(text.replace("$", "").replace("\\", "").split())
