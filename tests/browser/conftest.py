"""Headless Chromium for the pages that people look at; run by make test-browser."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # small_folder.py

SCREENSHOTS = Path(__file__).parents[2] / ".cache" / "screenshots"


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """A browser: the machine's own Chromium or Chrome, else Playwright's."""
    from playwright.sync_api import sync_playwright

    own = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """An open page, with everything it complained about and everything it asked for."""

    def __init__(self, page):
        self.page, self.errors, self.requests, self.loads = page, [], [], []
        page.on("load", lambda page: self.loads.append(page.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("request", lambda request: self.requests.append(request.url))


@pytest.fixture
def visit(chromium) -> Iterator:
    """visit(path, width, scheme) opens a file in a window of that width (CSS pixels) and colour scheme.

    script: whether scripts run; clock: the page's clock is moved by hand.
    """
    contexts = []

    def open_page(
        path: Path, width: int = 1280, scheme: str = "light", script: bool = True, clock: bool = False
    ) -> Tab:
        context = chromium.new_context(
            viewport={"width": width, "height": 850}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        tab = Tab(context.new_page())
        if clock:
            tab.page.clock.install()
        tab.page.goto(path.resolve().as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def keep_screenshot() -> Iterator:
    """keep_screenshot(tab, name) leaves .cache/screenshots/NAME.png."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return lambda tab, name, **more: tab.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True, **more)
