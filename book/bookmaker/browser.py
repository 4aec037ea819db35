"""The book's pages in a browser: what is wrong with them, for readers with a mouse, a keyboard or a phone."""

import asyncio
import re
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar
from urllib.parse import unquote, urldefrag

from tqdm import tqdm

from fibook.build import AXE, fetch_assets

if TYPE_CHECKING:
    from playwright.async_api import Browser, Locator, Page, PdfMargins

Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
Result = TypeVar("Result")

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
BROWSER_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no answer from any other host
]
PATIENCE = 30_000  # milliseconds a page has to show its mathematics and widgets
KEYS = ("ArrowRight", "ArrowLeft", "ArrowDown", "Enter")  # that move an explorer
REACTION = 1_500  # milliseconds an explorer has to answer a click or a key
SETTLING = 10_000  # milliseconds the theme has to follow a new width
TABS = 2  # pages open at a time
FIRST_VISITED = ("intro.html", "search.html")  # by a reader whose system is dark
SOUGHT = "saturation"  # a word of the book's that its search must find
MARGIN: "PdfMargins" = {"top": "15mm", "right": "15mm", "bottom": "15mm", "left": "15mm"}

# Rules of axe-core that are not asked, with the reason.
AXE_NOT_ASKED = {
    "label-content-name-mismatch": "in the theme's search and colour buttons an icon's title counts as text",
}

# Rules of axe-core that the colours or the width of a page decide.
AXE_AGAIN = ["color-contrast", "link-in-text-block", "scrollable-region-focusable"]
# What stands on a page many times, made alike, and how many of it axe-core sees: it takes a second for a
# thousand words of coloured code.
AXE_ALIKE = {"dl.py": 30, "div.cell_input": 8, "table.dataframe tbody tr": 40}

WIDTHS = (1280, 380)  # CSS pixels: a laptop's screen and a phone's


def find_browser() -> Path | None:
    """An installed Chromium or Chrome, or None."""
    return next((Path(found) for name in BROWSERS if (found := shutil.which(name))), None)


def check_pages(html: Path, browser: Path) -> list[str]:
    """What is wrong with the pages under html, one finding a line; [] where all is well.

    Every page is opened in headless Chromium, from 127.0.0.1, light and dark, 1280 and 380 pixels wide.
    Findings: a request to another host, an answer that is not ok, a console error, an uncaught exception,
    a broken image or one without words for it, a link to a local page or anchor that does not exist, an empty
    widget, one that does not react to the mouse or the keyboard, a formula that was not typeset, something
    wider than the page, a serious or critical fault by axe-core's rules (contrast, names of buttons, ...), a
    search that finds nothing. Raises FileNotFoundError where there are no pages.
    """
    pages = {path.relative_to(html).as_posix(): path.read_text("utf-8") for path in html.rglob("*.html")}
    # not the index.html that only leads on to the book's first page, nor what the theme keeps for itself
    names = sorted(name for name in pages if "<html" in pages[name] and not name.startswith("_static/"))
    if not names:
        raise FileNotFoundError(f"{html} holds no pages; build the book first")
    anchors = {name: set(re.findall(r'\sid="([^"]+)"', pages[name])) for name in names}
    axe = (fetch_assets() / AXE).read_text("utf-8")
    with serve(html) as address:
        site = _Site(html, address, anchors, axe)
        found = _in_browser(browser, lambda chromium: _all_faults(chromium, site, names))
    return list(dict.fromkeys(found))  # one fault shows in several views


def print_pdf(html: Path, page: str, target: Path, browser: Path) -> Path:
    """Prints one page of the book (its name, such as chapters/01_first_look.html) on A4 paper, as PDF.

    Raises FileNotFoundError for a page that was not built.
    """
    if not (html / page).is_file():
        raise FileNotFoundError(f"{html / page} was not built; run `make book` first.")

    async def work(chromium: "Browser") -> bytes:
        tab = await chromium.new_page()
        await tab.emulate_media(media="print", color_scheme="light")
        await _open(tab, address + page)
        return await tab.pdf(format="A4", print_background=True, margin=MARGIN)

    with serve(html) as address:
        content = _in_browser(browser, work)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return target


@contextmanager
def serve(html: Path) -> Iterator[str]:
    """Serves the folder on a free port of this machine alone; yields the address, with a closing slash."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(html))) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files without a log line for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: what went wrong is seen by the browser."""


@dataclass(frozen=True)
class _Site:
    """The pages being checked: their folder, the address that serves it, the ids in each, and axe-core."""

    html: Path
    address: str
    anchors: dict[str, set[str]]
    axe: str

    def dead(self, link: str) -> str | None:
        """What is wrong with a link, or None; links to other hosts are not followed."""
        page, anchor = urldefrag(link)
        if not page.startswith(self.address):
            return None
        name = unquote(page.removeprefix(self.address).partition("?")[0]) or "index.html"
        if not (self.html / name).is_file():
            return f"link to {name}, which does not exist"
        if anchor and name in self.anchors and unquote(anchor) not in self.anchors[name]:
            return f"link to {name}#{anchor}, which does not exist"
        return None


def _in_browser(path: Path, work: Callable[["Browser"], Awaitable[Result]]) -> Result:
    """Starts the browser, lets work use it, and closes it."""
    from playwright.async_api import async_playwright

    async def run() -> Result:
        async with (
            async_playwright() as playwright,
            await playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS) as chromium,
        ):
            return await work(chromium)

    return asyncio.run(run())


async def _all_faults(chromium: "Browser", site: _Site, names: list[str]) -> list[str]:
    """The faults of all pages, each with its page's name, in the order of the pages."""
    free = asyncio.Semaphore(TABS)
    bar = tqdm(total=len(names), desc="pages in the browser", unit="page")

    async def one(name: str) -> list[str]:
        async with free, await chromium.new_page() as page:
            faults = await _faults(page, site, name)
            bar.update()
            return [f"{name}: {fault}" for fault in faults]

    found = await asyncio.gather(*map(one, names))
    bar.close()
    return [fault for faults in found for fault in faults]


async def _faults(page: "Page", site: _Site, name: str) -> list[str]:
    """The faults of one page in all views; one that shows in several comes as often."""
    faults: list[str] = []
    _listen(page, site.address, faults)
    await _show(page, WIDTHS[0], "light")
    await _open(page, site.address + name)
    faults += await _explore(page)
    for width in WIDTHS:
        for scheme in SCHEMES:
            await _show(page, width, scheme)
            faults += await page.evaluate(_SEEN, scheme)
    links = await page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)")
    faults += [fault for link in links if (fault := site.dead(link))]
    await page.evaluate(site.axe)
    for width, scheme in zip(WIDTHS, SCHEMES, strict=True):
        await _show(page, width, scheme)
        faults += await _ask_axe(page, again=scheme != SCHEMES[0])
    if name in FIRST_VISITED:  # menus in the dark, and a first visit there, which all pages share
        await _show(page, WIDTHS[0], "dark")
        await _open(page, site.address + name)
        faults += await page.evaluate(_SEEN, "dark")
        await page.evaluate(site.axe)
        faults += await _ask_axe(page, again=True)
    if name == "search.html":
        faults += await _search(page, site)
    return faults


async def _ask_axe(page: "Page", again: bool) -> list[str]:
    """What axe-core finds in the page as it is shown; again: only what colours and width can change."""
    from playwright.async_api import TimeoutError

    with suppress(TimeoutError):
        await page.wait_for_function(_SETTLED, timeout=SETTLING)
    return await page.evaluate(_AXE, [list(AXE_NOT_ASKED), AXE_ALIKE, AXE_AGAIN if again else None])


async def _show(page: "Page", width: int, scheme: Scheme) -> None:
    await page.set_viewport_size({"width": width, "height": 900})
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await page.evaluate(_LAID_OUT)


async def _open(page: "Page", address: str) -> None:
    from playwright.async_api import TimeoutError

    await page.goto(address)
    with suppress(TimeoutError):  # what is then still missing is seen in the checks
        await page.wait_for_function(_READY, timeout=PATIENCE)


def _listen(page: "Page", address: str, faults: list[str]) -> None:
    """Adds what the page reports while it loads to faults."""

    def note(fault: str, seen: bool = True) -> None:
        if seen:
            faults.append(fault)

    own = (address, "data:", "blob:")
    page.on("request", lambda asked: note(f"request to {asked.url}", not asked.url.startswith(own)))
    page.on("response", lambda found: note(f"answer {found.status} for {found.url}", found.status >= 400))
    page.on("console", lambda said: note(f"console error: {said.text}", said.type == "error"))
    page.on("pageerror", lambda error: note(f"uncaught exception: {error}"))


async def _explore(page: "Page") -> list[str]:
    """Explorers of a page that the mouse or the keyboard does not move, by their numbers."""
    explorers = await page.locator(_VIEW).locator("xpath=..").all()
    return [
        f"explorer {number} does not react to the {way}"
        for number, explorer in enumerate(explorers, start=1)
        for way in _CONTROLS
        if not await _moves(explorer, way)
    ]


async def _moves(explorer: "Locator", way: str) -> bool:
    """Whether a control changes what the explorer shows, clicked at both its ends or by the keyboard."""
    from playwright.async_api import TimeoutError

    for control in await explorer.locator(_CONTROLS[way]).locator("visible=true").all():
        await explorer.evaluate(_REMEMBER)
        for place in (0.85, 0.15) if way == "mouse" else KEYS:
            with suppress(TimeoutError):
                await _act(control, place)
                if await explorer.evaluate(_CHANGED, REACTION):
                    return True
    return False


async def _act(control: "Locator", place: float | str) -> None:
    """Press a key on a control, or click it at a share of its width."""
    if isinstance(place, str):
        await control.press(place, timeout=REACTION)
    elif box := await control.bounding_box():
        middle = box["height"] / 2
        await control.click(position={"x": place * box["width"], "y": middle}, timeout=REACTION)


async def _search(page: "Page", site: _Site) -> list[str]:
    """Asks the book's search for a word that stands in it."""
    from playwright.async_api import TimeoutError

    await page.goto(f"{site.address}search.html?q={SOUGHT}")
    try:
        await page.locator("#search-results li a").first.wait_for(timeout=PATIENCE)
    except TimeoutError:
        return [f"the search does not find the word {SOUGHT}"]
    return []


_VIEW = 'script[type="application/vnd.jupyter.widget-view+json"]'

# The parts of an explorer that are tried. An open menu is the system's own, out of the mouse's reach.
_CONTROLS = {"mouse": "input, button, svg", "keyboard": "input, select, button, [tabindex='0']"}

# What an explorer shows, without its controls.
_SHOWN = """explorer => {
  const copy = explorer.cloneNode(true);
  for (const part of copy.querySelectorAll("script, style, button, input, select")) part.remove();
  return copy.innerHTML;
}"""
_REMEMBER = f"explorer => {{ explorer.shown = ({_SHOWN})(explorer); }}"
_CHANGED = f"""async (explorer, patience) => {{
  const end = performance.now() + patience;
  while (performance.now() < end) {{
    if (({_SHOWN})(explorer) !== explorer.shown) return true;
    await new Promise(done => setTimeout(done, 20));
  }}
  return false;
}}"""

# Ends when the sidebars have their places: for a moment after a new width the text takes the whole of it.
_LAID_OUT = """async () => {
  const width = () => document.querySelector("#main-content article")?.clientWidth;
  for (let same = 0, last = width(); same < 5; last = width()) {
    await new Promise(done => setTimeout(done, 50));
    same = width() === last ? same + 1 : 0;
  }
}"""

# True once the theme lets the keys scroll what became too large; it looks a while after the screen changed.
_SETTLED = """() => [...document.querySelectorAll("[tabindex='-1']")]
  .every(part => part.scrollWidth <= part.clientWidth && part.scrollHeight <= part.clientHeight)"""

# Serious and critical faults by axe-core. Formulas are left out, since they have many parts and MathJax's own
# words for each; they were seen to be typeset before. Of what is made alike many times, the first ones
# stand for all.
_AXE = """async ([notAsked, alikes, asked]) => {
  for (const formula of document.querySelectorAll("mjx-container")) formula.replaceChildren();
  for (const [alike, shown] of Object.entries(alikes))
    for (const part of [...document.querySelectorAll(alike)].slice(shown)) part.remove();
  const rules = Object.fromEntries(notAsked.map(rule => [rule, { enabled: false }]));
  const chosen = asked ? { runOnly: asked } : { rules };
  const found = await axe.run(document, { resultTypes: ["violations"], selectors: false, ...chosen });
  return found.violations
    .filter(rule => ["serious", "critical"].includes(rule.impact))
    .flatMap(rule => rule.nodes.map(node => `${rule.id} (${rule.help}): ${node.html.slice(0, 120)}`));
}"""

# True once colours are chosen, formulas typeset, all parts of the widgets drawn and pictures there or failed.
_READY = """() => {
  const all = selector => [...document.querySelectorAll(selector)];
  const views = all('script[type="application/vnd.jupyter.widget-view+json"]');
  const widgets = views.map(view => [...view.parentElement.querySelectorAll(".lm-Widget")]);
  return document.documentElement.dataset.theme !== "auto"
    && all(".math").every(formula => formula.querySelector("mjx-container"))
    && widgets.every(parts => parts.length && parts.every(part => part.offsetHeight))
    && [...document.images].every(image => image.complete);
}"""

# The faults one can see in a page that is ready.
_SEEN = """async scheme => {
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const faults = [];
  const root = document.documentElement;
  if (root.dataset.theme !== scheme) faults.push(`colours are ${root.dataset.theme}, not ${scheme}`);
  for (const image of document.images) {
    if (!image.naturalWidth) faults.push(`broken image ${image.src.slice(0, 100)}`);
    else if (/^\\S+\\.(png|svg|jpe?g|gif|webp)$/.test(image.alt))
      faults.push(`no words for the image ${image.alt.slice(-40)}, only its file's name`);
  }
  for (const view of document.querySelectorAll('script[type="application/vnd.jupyter.widget-view+json"]'))
    if (!view.parentElement.querySelector(".lm-Widget")?.offsetHeight) faults.push("empty widget");
  for (const formula of document.querySelectorAll(".math"))
    if (!formula.querySelector("mjx-container") || formula.querySelector("mjx-merror"))
      faults.push(`formula not typeset: ${formula.textContent.trim().slice(0, 80)}`);
  if (root.scrollWidth > root.clientWidth) {
    const scrolls = part => part !== document.body && getComputedStyle(part).overflowX !== "visible";
    const inside = part => part && (scrolls(part) || inside(part.parentElement));
    const end = part => part.getBoundingClientRect().left + part.scrollWidth;
    const wide = [...document.body.querySelectorAll("*")]
      .filter(part => end(part) > root.clientWidth && !inside(part));
    faults.push(`${root.scrollWidth} px wide on a screen of ${root.clientWidth} px, for example `
      + wide.slice(-2).map(part => `<${part.localName}> ${part.textContent.trim().slice(0, 40)}`).join(", "));
  }
  return faults;
}"""
