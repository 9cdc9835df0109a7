"""HTML as trees: text and attributes are escaped when they are written, so a file's name can never become markup."""

from __future__ import annotations

import base64
import hashlib
import io
from xml.etree import ElementTree

from PIL import Image

Node = ElementTree.Element

_PICTURE_SIDE = 320  # pixels


def tag(name: str, /, *children: Node | str | None, **attributes: object) -> Node:
    """An element; strings become text, None is left out.

    Args:
        attributes: ``class_`` is ``class``; other underscores become hyphens; an attribute of None or False is left out, one
            of True has no value.
    """
    node = ElementTree.Element(name)
    for key, value in attributes.items():
        if value is not None and value is not False:
            node.set(key.rstrip("_").replace("_", "-"), "" if value is True else str(value))
    for child in children:
        if isinstance(child, str):
            if len(node):
                node[-1].tail = (node[-1].tail or "") + child
            else:
                node.text = (node.text or "") + child
        elif child is not None:
            node.append(child)
    return node


def embed(image: Image.Image) -> str:
    """A picture as a data URI: JPEG, at most 320 pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def document(title: str, body: Node, *, style: str, script: str) -> bytes:
    """A page that needs nothing else, in UTF-8.

    Its content security policy allows this style, this script and embedded images: no network, and no script that got in some
    other way.

    Args:
        style, script: our own CSS and JavaScript, written as they are.
    """
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", style),
    )
    body.append(tag("script", script))
    page = ElementTree.tostring(tag("html", head, body, lang="en"), encoding="unicode", method="html")
    # A file name that is not UTF-8 comes with lone surrogates.
    return ("<!doctype html>\n" + page + "\n").encode("utf-8", "replace")


def _source(text: str) -> str:
    """How a content security policy names a style or script that stands in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
