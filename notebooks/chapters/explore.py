"""Widgets for the book's pages: they need no kernel, only the state that was stored with the notebook."""

import base64
import io
from collections.abc import Sequence
from html import escape

import anywidget
import ipywidgets as widgets
import matplotlib.pyplot as plt
import traitlets
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image

from fichapters.described import small_png

DPI = 160  # pixels an inch of a stored frame
CSS_DPI = 96  # pixels an inch of a page, by the definition of CSS
INTERVAL = 1000  # milliseconds a frame stays while playing

_ESM = """
function render({ model, el }) {
  const title = document.createElement("div");
  title.className = "flipbook-title";
  const picture = document.createElement("img");
  picture.tabIndex = 0;
  picture.width = model.get("width");
  picture.height = model.get("height");
  const label = document.createElement("div");
  label.className = "flipbook-label";
  label.setAttribute("aria-live", "polite");
  el.classList.add("flipbook");
  el.append(title, picture, label);

  const last = model.get("frames").length - 1;
  const show = () => {
    const frame = model.get("frame");
    title.textContent = model.get("title");
    picture.src = model.get("frames")[frame];
    picture.alt = model.get("alt")[frame];
    label.textContent = `${frame + 1} of ${last + 1}: ${model.get("labels")[frame]}`;
  };
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    model.set("frame", Math.min(last, Math.max(0, model.get("frame") + step)));
    model.save_changes();
  });
  model.on("change:frame", show);
  show();
}
export default { render };
"""

# The pictures are drawn on white, so they keep a white ground where the page is dark.
_CSS = """
.flipbook-title { font-weight: 600; }
.flipbook img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.flipbook-label { font-variant-numeric: tabular-nums; }
"""


class Flipbook(anywidget.AnyWidget):
    """Shows one of several stored pictures: the one that `frame` counts to from 0.

    Left and right arrow keys turn the page while the picture has the focus.
    """

    _esm = _ESM
    _css = _CSS
    frames = traitlets.List(traitlets.Unicode()).tag(sync=True)  # data URIs
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    alt = traitlets.List(traitlets.Unicode()).tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    width = traitlets.Int().tag(sync=True)  # CSS pixels
    height = traitlets.Int().tag(sync=True)  # CSS pixels
    frame = traitlets.Int(0).tag(sync=True)


class FlipbookBox(widgets.VBox):
    """A flipbook above its controls; a page without JavaScript shows the first frame instead."""

    def _ipython_display_(self) -> None:
        book = self.children[0]
        display(HTML(fallback(book.frames[0], book.alt[0], f"{book.title}: {book.labels[0]}", book.width)))
        display(self._repr_mimebundle_(), raw=True)


def flipbook(
    frames: Sequence[Figure], labels: Sequence[str], *, title: str, alt: Sequence[str]
) -> FlipbookBox:
    """One picture at a time, turned by Play, a slider or the arrow keys, in JupyterLab and in the book.

    frames: matplotlib figures of one size; they are drawn on white as PNG and closed.
    labels: a short text for each frame, shown below it. title: shown above all of them.
    alt: for each frame, what a reader who cannot see it must know.
    Raises ValueError for fewer than two frames, for texts that are empty or do not match the frames one to
    one, and for figures of different sizes.
    """
    _check(frames, labels, alt)
    pictures = [_png(figure) for figure in frames]
    width, height = (round(inches * CSS_DPI) for inches in frames[0].get_size_inches())
    book = Flipbook(
        frames=[_data_uri(picture) for picture in pictures],
        labels=list(labels),
        alt=list(alt),
        title=title,
        width=width,
        height=height,
    )
    for figure in frames:
        plt.close(figure)
    last = len(frames) - 1
    play = widgets.Play(min=0, max=last, interval=INTERVAL)
    slider = widgets.IntSlider(min=0, max=last, description="Picture", readout=False)
    # Linked in the browser, so that they move together where no kernel runs.
    widgets.jslink((play, "value"), (slider, "value"))
    widgets.jslink((slider, "value"), (book, "frame"))
    controls = widgets.HBox([play, slider], layout=widgets.Layout(flex_flow="row wrap"))
    return FlipbookBox([book, controls])


def still_picture(figure: Figure, alt: str, caption: str) -> str:
    """HTML of a figure for pages where JavaScript is off; the figure is drawn on white."""
    width = round(figure.get_size_inches()[0] * CSS_DPI)
    return fallback(_data_uri(_png(figure)), alt, caption, width)


def _check(frames: Sequence[Figure], labels: Sequence[str], alt: Sequence[str]) -> None:
    """Raises ValueError unless there are two frames or more, of one size, each with both its texts."""
    if len(frames) < 2:
        raise ValueError(f"a flipbook needs at least two frames, got {len(frames)}: show one figure as it is")
    for name, texts in {"labels": labels, "alt": alt}.items():
        if len(texts) != len(frames):
            raise ValueError(f"{len(frames)} frames but {len(texts)} {name}: give each frame one")
        if not all(text.strip() for text in texts):
            raise ValueError(f"one of the flipbook's {name} is empty: say what its frame shows")
    sizes = {tuple(figure.get_size_inches()) for figure in frames}
    if len(sizes) > 1:
        raise ValueError(f"the flipbook's figures have sizes {sorted(sizes)} inches: use one figsize for all")


def _png(figure: Figure) -> bytes:
    """The figure on white, at its full size (a tight box would make the frames jump)."""
    buffer = io.BytesIO()
    with plt.rc_context({"savefig.bbox": None}):
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return small_png(buffer.getvalue())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def image_uri(image: Image.Image) -> str:
    """An image as a data URI, in PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return _data_uri(buffer.getvalue())


def fallback(source: str, alt: str, caption: str, width: int) -> str:
    """What a page shows where JavaScript is off."""
    return (
        f'<noscript><img src="{source}" alt="{escape(alt)}" width="{width}">'
        f"<p>{escape(caption)}</p></noscript>"
    )
