"""Pages in a headless Chromium: what it complains about, how wide they are, and whether their folds open."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (  # a browser that calls nobody
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
HERE = "http://127.0.0.1:"
THEMES = ("light", "dark")

# What a closed fold hides must be visible once it is open; folds within folds are opened from the outside inwards.
FOLDS = """() => [...document.querySelectorAll('details')].map(fold => {
    const inside = () => [...fold.children].filter(child => child.tagName !== 'SUMMARY' && child.checkVisibility())
        .reduce((sum, child) => sum + child.getBoundingClientRect().height, 0);
    const closed = fold.open ? null : inside();
    fold.querySelector(':scope > summary').click();
    if (!fold.open) fold.querySelector(':scope > summary').click();
    return {summary: fold.querySelector(':scope > summary').textContent, closed, open: inside()};
})"""
# Elements that stick out of the page to the right, unless something around them scrolls or hides what sticks out.
WIDE = """() => [...document.body.querySelectorAll('*')].filter(element => {
    if (element.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let up = element; up && up !== document.body; up = up.parentElement)
        if (getComputedStyle(up).overflowX !== 'visible') return false;
    return true;
}).map(element => element.outerHTML.slice(0, 120))"""


@dataclass(frozen=True)
class Seen:
    """One page in one theme, opened once.

    Attributes:
        complaints: errors and warnings of the console, exceptions, requests that failed or went elsewhere.
        scrolls: pixels by which the page is wider than the window, with all folds open.
        wide: the elements that make it so.
        folds: (summary, height of what is inside while closed, None where it was open at first; while open).
        ground: colour behind the text.
        text: what is visible, with all folds open.
    """

    complaints: list[str]
    scrolls: int
    wide: list[str]
    folds: list[tuple[str, float | None, float]]
    ground: str
    text: str


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium with an empty profile of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e .[dev]")
    binary = next((found for name in BINARIES if (found := shutil.which(name))), None)
    if binary is None:
        pytest.skip("no Chromium: install the package `chromium` (Debian) or Google Chrome")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=FLAGS)
        yield browser
        browser.close()


def seen_in(page: Any, theme: str, complaints: list[str]) -> Seen:
    page.emulate_media(color_scheme=theme)
    folds = [(f["summary"].strip(), f["closed"], f["open"]) for f in page.evaluate(FOLDS)]
    return Seen(
        complaints,
        page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"),
        page.evaluate(WIDE),
        folds,
        page.evaluate("getComputedStyle(document.body).backgroundColor"),
        page.inner_text("body"),
    )


@pytest.fixture(scope="session")
def look(chromium: Any) -> Callable[[str, int], list[Seen]]:
    """`look(address, width)` opens a page in a window of this width, and turns it from the light theme to the dark."""

    def look(address: str, width: int) -> list[Seen]:
        complaints: list[str] = []
        with chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=THEMES[0]) as context:
            context.route(
                lambda url: not url.startswith((HERE, "file:", "data:", "blob:")), lambda route: route.abort()
            )
            page = context.new_page()
            page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("requestfailed", lambda request: complaints.append(f"not loaded: {request.url}"))
            page.goto(address, wait_until="load")
            return [seen_in(page, theme, complaints) for theme in THEMES]

    return look


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """No line on stderr for every request."""


@pytest.fixture(scope="session")
def pages() -> Iterator[Callable[[Path], list[str]]]:
    """`pages(target)`: the addresses of an .html file, or of every .html file in a folder, which is served for it."""
    with ExitStack() as servers:

        def pages(target: Path) -> list[str]:
            if target.is_file():
                return [target.as_uri()]
            server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(target)))
            servers.callback(server.server_close)
            servers.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            found = sorted(target.rglob("*.html"))
            return [f"{HERE}{server.server_port}/{quote(page.relative_to(target).as_posix())}" for page in found]

        yield pages
