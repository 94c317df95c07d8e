"""One HTML file without scripts, fonts or anything from a network."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dattn_mcore.errors import DataError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  color: #1c1c1c; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .4em }
table { border-collapse: collapse; margin: .6em 0 } td, th { padding: .15em .9em .15em 0;
  text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
.note { color: #555 } .bad { color: #a40000 } img { max-width: 100% }
.tiles img { image-rendering: pixelated; border: 1px solid #999; margin: 2px; vertical-align: top }
.text { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.text span { padding: 1px 0; border-radius: 2px }
.masked { background: #e8e8e8 } .supervised { background: #b7e4b0 } .special { color: #7a3e9d;
  font-weight: 600 } .image { background: #bcd7f5 }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def escape(text: Any) -> str:
    """Text, safe inside HTML; a character that cannot be written becomes a visible sign."""
    return html.escape(str(text)).encode("utf-8", "replace").decode("utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], name: str = "") -> str:
    """A table; whole numbers get thousands separators."""

    def cell(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else escape(value)

    lines = ["".join(f"<th>{escape(text)}</th>" for text in head)]
    lines += ["".join(f"<td>{cell(value)}</td>" for value in row) for row in rows]
    return f'<table id="{name}">' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(image: Image.Image, kind: str = "PNG", width: int | None = None, alt: str = "") -> str:
    """An image, inside the page."""
    return embedded(_encoded(image, kind), kind.lower(), width, alt)


def embedded(data: bytes, kind: str, width: int | None = None, alt: str = "") -> str:
    """Bytes of an image, inside the page."""
    size = f' width="{width}"' if width else ""
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{encoded}"{size} alt="{escape(alt)}">'


def write_page(path: Path, text: str) -> None:
    """Writes a page, whole or not at all.

    Raises:
        DataError: It cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"--output {path} cannot be written ({error.strerror}); name another file"
        ) from None


def _encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()
