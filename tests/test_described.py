"""Words for a figure come from the figure itself, and a stored picture is small."""

import io
from types import SimpleNamespace

import numpy as np
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure
from PIL import Image

from fichapters.described import COLOURS, describe, show_described, small_png
from fichapters.style import new_figure


def test_a_figure_says_titles_axes_and_legends() -> None:
    figure, axes = new_figure(1, 2)
    axes[0, 0].plot([0, 1], [1, 2], label="FI exact")
    axes[0, 0].set(title="Damage", xlabel="share, $\\lambda$", ylabel="accuracy")
    axes[0, 0].legend()
    figure.colorbar(axes[0, 1].imshow([[1, 2]]), label="FI of a pixel")
    said = describe(figure)
    assert said.startswith("Damage: accuracy against share, lambda; lines and marks: FI exact")
    assert said.endswith("Colours: FI of a pixel")
    assert describe(new_figure()[0]) == "A picture without title or labels"


def test_a_notebook_stores_the_picture_with_its_words() -> None:
    figure, axes = new_figure()
    axes[0, 0].set_title("Nothing yet")
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    shell.display_formatter.formatters["image/png"].for_type(Figure, lambda _: b"matplotlib's own")
    show_described(shell)
    data, metadata = shell.display_formatter.format(figure)
    assert Image.open(io.BytesIO(data["image/png"])).format == "PNG"
    assert metadata["image/png"] == {"alt": "Nothing yet"}


def test_a_small_picture_looks_the_same() -> None:
    rows = np.linspace(0, 255, 200)
    shades = np.stack(
        [np.tile(rows, (100, 1)), np.full((100, 200), 90.0), np.tile(rows[::-1], (100, 1))], axis=-1
    )
    buffer = io.BytesIO()
    Image.fromarray(shades.astype(np.uint8)).save(buffer, "png", dpi=(110, 110))
    small = Image.open(io.BytesIO(small_png(buffer.getvalue())))
    assert small.size == (200, 100) and len(small.getcolors() or []) <= COLOURS
    assert np.abs(np.asarray(small.convert("RGB")).astype(float) - shades).mean() < 2
    assert round(small.info["dpi"][0]) == 110
