"""The style: every measure has a look of its own that shows on white."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb

from fichapters.style import LOOKS, legend_outside, look, look_of, new_figure, use_style
from fihelpers.measures import MEASURES


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_measure_has_a_look_of_its_own() -> None:
    assert set(LOOKS) >= set(MEASURES)
    assert len({one.colour for one in LOOKS.values()}) == len(LOOKS)
    assert len({one.marker for one in LOOKS.values()}) == len(LOOKS)


@pytest.mark.parametrize("name", LOOKS)
def test_a_colour_shows_on_white(name: str) -> None:
    assert 1.05 / (luminance(LOOKS[name].colour) + 0.05) > 3  # WCAG 2 for graphics


def test_fi_with_a_filter_of_no_table_has_the_look_of_its_family() -> None:
    names = [f"FI {kind} {10.0**k:g}" for kind in ("damped", "cut", "exact") for k in range(-12, 3)]
    looks = {name: look_of(name) for name in names if name not in LOOKS}
    for name, one in looks.items():
        assert one == look_of(name) and 1.05 / (luminance(one.colour) + 0.05) > 3
        red, green, blue = to_rgb(one.colour)
        assert blue > max(red, green)  # warm colours are those of measures that keep the gradient's size
        assert (red > green) == ("damped" in name)
    assert len({one.colour for one in looks.values()}) > len(looks) / 2


def test_an_unknown_measure_is_named() -> None:
    with pytest.raises(KeyError, match="'guess'"):
        look("guess")


def test_fonts_are_at_least_nine_points_and_figures_are_not_left_open() -> None:
    plt.close("all")  # what other tests drew
    use_style()
    sizes = [
        v for k, v in plt.rcParams.items() if k.endswith(("labelsize", "titlesize", "font.size", "fontsize"))
    ]
    assert min(v for v in sizes if isinstance(v, int | float)) >= 9
    figure, axes = new_figure(2, 1)
    axes[0, 0].plot([0, 1], **look("FI exact"))
    axes[0, 0].plot([1, 0], **look("random"))
    axes[1, 0].plot([1, 0], **look("FI damped 0.01"))
    legend_outside(axes[0, 0])
    texts = [t.get_text() for t in axes[0, 0].get_legend().get_texts()]
    assert texts == ["FI exact", "random"] and axes.shape == (2, 1)
    assert not plt.get_fignums()
    figure.canvas.draw()
