"""The widgets, as far as they can be tested without a browser; test_book.py plays them in one."""

import base64
import struct

import matplotlib.pyplot as plt
import pytest
from ipywidgets import IntSlider, Play, Widget
from matplotlib.figure import Figure

from fichapters import explore


def figures(count: int, size: tuple[float, float] = (5, 2)) -> list[Figure]:
    made = [plt.figure(figsize=size) for _ in range(count)]
    for number, figure in enumerate(made):
        figure.add_subplot().bar([0, 1], [1, number])
    return made


def flipbook(count: int) -> explore.FlipbookBox:
    texts = [f"frame {number}" for number in range(count)]
    return explore.flipbook(figures(count), texts, title="Bars", alt=texts)


def test_frames_are_different_pictures_of_one_size() -> None:
    frames = flipbook(3).children[0].frames
    assert len(set(frames)) == 3
    for frame in frames:
        png = base64.b64decode(frame.removeprefix("data:image/png;base64,"))
        assert struct.unpack(">II", png[16:24]) == (5 * explore.DPI, 2 * explore.DPI)


def test_frames_keep_their_size_under_a_tight_box() -> None:
    with plt.rc_context({"savefig.bbox": "tight"}):
        frame = flipbook(2).children[0].frames[0]
    png = base64.b64decode(frame.removeprefix("data:image/png;base64,"))
    assert struct.unpack(">II", png[16:24]) == (5 * explore.DPI, 2 * explore.DPI)


def test_figures_are_closed() -> None:
    plt.close("all")
    flipbook(2)
    assert plt.get_fignums() == []


def test_controls_reach_every_frame_and_are_linked_in_the_browser() -> None:
    box = flipbook(4)
    book, controls = box.children
    play, slider = controls.children
    assert isinstance(play, Play) and isinstance(slider, IntSlider)
    assert (play.min, play.max) == (slider.min, slider.max) == (0, 3)
    state = Widget.get_manager_state()["state"]
    links = [entry["state"] for entry in state.values() if entry["model_name"] == "LinkModel"]
    pairs = [(link["source"], link["target"]) for link in links]
    name = {widget: f"IPY_MODEL_{widget.model_id}" for widget in (play, slider, book)}
    assert ([name[play], "value"], [name[slider], "value"]) in pairs
    assert ([name[slider], "value"], [name[book], "frame"]) in pairs


def test_shown_with_a_picture_for_readers_without_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(explore, "display", lambda content, **_: shown.append(content))
    box = explore.flipbook(figures(2), ["<none>", "all"], title="Bars", alt=['a "low" bar', "high"])
    box._ipython_display_()
    fallback, bundle = shown
    assert box.children[0].frames[0] in fallback.data  # type: ignore[attr-defined]
    assert 'alt="a &quot;low&quot; bar"' in fallback.data  # type: ignore[attr-defined]
    assert "Bars: &lt;none&gt;" in fallback.data  # type: ignore[attr-defined]
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == box.model_id  # type: ignore[index]


@pytest.mark.parametrize(
    ("count", "labels", "alt", "message"),
    [
        (1, ["a"], ["a"], "at least two frames, got 1"),
        (2, ["a"], ["a", "b"], "2 frames but 1 labels"),
        (2, ["a", "b"], ["a", "b", "c"], "2 frames but 3 alt"),
        (2, ["a", "b"], ["a", " "], "one of the flipbook's alt is empty"),
    ],
)
def test_texts_must_match_the_frames(count: int, labels: list[str], alt: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explore.flipbook(figures(count), labels, title="Bars", alt=alt)


def test_figures_of_different_sizes_are_refused() -> None:
    mixed = [*figures(1), *figures(1, size=(4, 2))]
    with pytest.raises(ValueError, match=r"sizes .*4.*5.* inches"):
        explore.flipbook(mixed, ["a", "b"], title="Bars", alt=["a", "b"])
