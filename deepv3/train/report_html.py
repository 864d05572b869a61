"""HTML of the report in small pieces: elements, tables, the frame of a page; text is escaped where it enters one."""

from collections.abc import Iterable
from functools import cache
from html import escape
from pathlib import Path


def tag(name: str, *content: str, **attributes: object) -> str:
    """An element. content: HTML; attributes: text, `cls` for class, `_` for `-`; an empty one is left out."""
    words = [name]
    for key, value in attributes.items():
        key = "class" if key == "cls" else key.replace("_", "-")
        if value != "":
            words.append(f'{key}="{escape(str(value))}"')
    return f"<{' '.join(words)}>{''.join(content)}</{name}>"


def title(text: str, unit: str = "") -> str:
    """A figure's heading, with its unit set lighter."""
    return tag("h3", escape(text), " " + tag("span", escape(unit), cls="unit") if unit else "")


def note(text: str) -> str:
    """A small line of text; nothing where it is empty."""
    return tag("p", escape(text), cls="note") if text else ""


def table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]], cls: str = "") -> str:
    """A table that scrolls sideways where it is too wide. Cells are HTML; the first of a row is its heading."""
    heads = "".join(tag("th", escape(text), scope="col") for text in head)
    body = []
    for first, *rest in rows:
        cells = (cell if cell.startswith("<td") else tag("td", cell) for cell in rest)
        body.append(tag("tr", tag("th", first, scope="row"), *cells))
    inner = tag("caption", escape(caption)) + tag("thead", tag("tr", heads)) + tag("tbody", *body)
    return tag("div", tag("table", inner, cls=cls), cls="scroll", tabindex="0", role="region", aria_label=caption)


def fold(summary: str, *content: str, cls: str = "") -> str:
    """Content behind a line that opens it."""
    return tag("details", tag("summary", escape(summary)), *content, cls=cls)


def section(name: str, *content: str) -> str:
    """A part of the page that the bar on top links to; nothing where there is no content."""
    body = "".join(content)
    return tag("section", tag("h2", escape(name)), body, id=f"s-{name.lower()}") if body else ""


def links(names: Iterable[str]) -> str:
    """The bar of links to sections."""
    return tag("nav", *(tag("a", escape(name), href=f"#s-{name.lower()}") for name in names), aria_label="Sections")


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def document(name: str, body: str, running: bool = False) -> str:
    """A whole page around `body`: style and script inside, nothing fetched. running: it reloads itself."""
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
    )
    head += tag("title", escape(name)) + tag("style", _asset("report.css"))
    page = tag("head", head) + tag("body", body, tag("script", _asset("report.js")))
    return "<!doctype html>\n" + tag("html", page, lang="en", data_refresh="60" if running else "") + "\n"
