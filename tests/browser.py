"""Chromium without a screen, for tests of pages; it can't reach a network that the page would ask for unnoticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


# WCAG's contrast of a text's colour with the nearest background behind it.
RATIO = """
const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(v => channel(Number(v)));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = element => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (!colour.startsWith('rgba(0, 0, 0, 0')) return colour;
  }
  return 'rgb(255, 255, 255)';
};
const ratio = element => {
  const style = getComputedStyle(element), own = light(element.tagName == 'text' ? style.fill : style.color);
  const other = light(behind(element));
  const where = element.tagName + ' ' + element.textContent.slice(0, 40);
  return [(Math.max(own, other) + 0.05) / (Math.min(own, other) + 0.05), where];
};
"""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser, or a skip that says what is missing; with ADVRAD_REQUIRE_CHROMIUM=1 that is a failure.

    Args:
        profile: an empty folder.
    """
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in found.items() if path is None]:
        reason = f"{', '.join(missing)} not found (Debian: chromium and chromium-driver)"
        if os.environ.get("ADVRAD_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options=options, service=ChromeService(executable_path=found["chromedriver"]))
    try:
        yield browser
    finally:
        browser.quit()


def set_width(browser: Any, width: int, height: int = 900) -> None:
    """The page's own width, which a window can't be made as narrow as."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def set_dark(browser: Any, dark: bool) -> None:
    """The colours that the page is asked for."""
    feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def requests(browser: Any) -> list[str]:
    """Addresses that were asked for since the last call, but for embedded ones, the browser's own pages, and what the page's
    policy stopped before it was sent."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    failed = [event["params"] for event in events if event["method"] == "Network.loadingFailed"]
    stopped = {event["requestId"] for event in failed if event.get("blockedReason") == "csp"}
    asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [event["request"]["url"] for event in asked if event["requestId"] not in stopped]
    return [url for url in urls if not url.startswith(("data:", "chrome", "about:"))]
