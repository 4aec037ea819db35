"""Sphinx extension of the book, named in book/_config.yml: what head and header of every page carry."""

import re
from html import escape, unescape
from pathlib import Path
from typing import Any

from fibook import reference
from fibook.site import CARD, address

CARD_ALT = "Accuracy against the share of weights set to zero, for weights chosen by four measures."
SHORTEST = 60  # characters of a description, where a page has a paragraph that long
LONGEST = 200  # characters of a description


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("config-inited", _set_up)
    app.connect("html-page-context", _extend_page, priority=502)  # after the theme has made its buttons
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.linkcode")
    app.connect("autodoc-process-docstring", reference.convert_docstring)
    app.connect("autodoc-process-signature", reference.resolve_fields)
    app.connect("autodoc-skip-member", reference.choose_member)
    app.add_directive("fi-modules", reference.ModulesDirective)
    app.add_directive("fi-pictures", reference.PicturesDirective)
    app.connect("doctree-resolved", reference.list_pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _set_up(app: Any, config: Any) -> None:
    """Settings of the reference, and canonical links where it is known where the pages will stand."""
    for name, value in reference.SETTINGS.items():
        setattr(config, name, value)
    where = address(Path(app.srcdir))
    config.linkcode_resolve = lambda domain, info: reference.source_line(
        where, info["module"], info["fullname"]
    )
    if where:
        config.html_baseurl = where.pages


def _extend_page(app: Any, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    where = address(Path(app.srcdir))
    tags = {
        "og:type": "article" if name.startswith("chapters/") else "website",
        "og:site_name": app.config.project,
        "og:title": re.sub(r"<[^>]+>", "", unescape(context.get("title") or app.config.project)),
        "og:description": _description(doctree) or app.config.project,
        "og:image:alt": CARD_ALT,
    }
    if where:
        tags |= {"og:url": f"{where.pages}{name}.html", "og:image": f"{where.pages}_static/{CARD}"}
    heads = [f'<meta property="{what}" content="{escape(text)}">' for what, text in tags.items()]
    heads += [
        f'<meta name="description" content="{escape(tags["og:description"])}">',
        '<meta name="twitter:card" content="summary_large_image">',
    ]
    context["metatags"] = "\n    ".join([context.get("metatags", ""), *heads])
    # a list's children must be list items, which bibliography entries are not
    if "body" in context:
        context["body"] = context["body"].replace(
            'role="list" class="citation-list"', 'class="citation-list"'
        )
    if where and name.startswith("chapters/"):
        chapter = name.removeprefix("chapters/")
        context["header_buttons"].append(_launch_buttons(where.binder(chapter), where.colab(chapter)))


def _description(doctree: Any) -> str:
    """The first paragraph of a page that is more than a heading or an item of a list, cut at a word."""
    if doctree is None:
        return ""
    paragraphs = doctree.findall(
        lambda node: node.tagname == "paragraph" and node.parent.tagname == "section"
    )
    texts = [" ".join(paragraph.astext().split()) for paragraph in paragraphs]
    text = next((text for text in texts if len(text) >= SHORTEST), next(iter(texts), ""))
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " …"


def _launch_buttons(binder: str, colab: str) -> dict[str, Any]:
    """A menu of the theme's header."""
    places = {"Binder": (binder, "logo_binder.svg"), "Colab": (colab, "logo_colab.png")}
    buttons = [
        {
            "type": "link",
            "text": name,
            "tooltip": f"Run this chapter on {name}",
            "icon": f"_static/images/{icon}",
            "url": url,
        }
        for name, (url, icon) in places.items()
    ]
    return {
        "type": "group",
        "tooltip": "Run this chapter elsewhere",
        "icon": "fas fa-rocket",
        "buttons": buttons,
        "label": "launch-buttons",
    }
