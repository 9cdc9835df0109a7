"""The page of a running stream in a real browser."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import RATIO, chromium, requests, set_dark, set_width
from models import small_model
from PIL import Image
from streams import detector, frames, wait_until
from watching import Listener, Running, running, threshold_between

from advrad_fast import Detector
from advrad_fast.line import InspectionStream
from advrad_fast.line.drift import Direction, DriftState
from advrad_fast.line.watch import WatchPage, board


@pytest.fixture(scope="module")
def model() -> Detector:
    return detector()


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def line(model: Detector) -> Iterator[Running]:
    with running(model, deadline_ms=3.6e6, hold_ms=3.6e6) as made:  # what is shown stays, until a test wants it otherwise
        yield made


@pytest.fixture
def browser(open_browser: Any) -> Any:
    """Nothing of others in the logs."""
    open_browser.get("about:blank")
    for log in ("browser", "performance"):
        open_browser.get_log(log)
    set_width(open_browser, 1200)
    return open_browser


def outcome(browser: Any) -> str:
    """What the panel says, in word, shape and colour."""
    found: list[str] = browser.execute_script(
        "return [document.getElementById('word').textContent, document.getElementById('outcome').dataset.outcome,"
        " document.getElementById('shape').getAttribute('href').replace('#shape-', '').replace('-', ' ')]"
    )
    assert len(set(found)) == 1, found
    return found[0]


def becomes(browser: Any, wanted: str, why: str = "") -> None:
    wait_until(lambda: outcome(browser) == wanted and why in text(browser, "why") and outcome(browser) == wanted, 30.0)


def text(browser: Any, name: str) -> str:
    found: str = browser.execute_script(f"return document.getElementById('{name}').textContent")
    return found


def is_loaded(browser: Any, name: str) -> bool:
    script = f"const i = document.getElementById('{name}'); return !i.hidden && i.complete && i.naturalWidth > 0"
    return bool(browser.execute_script(script))


def test_it_follows_the_line(browser: Any, line: Running, model: Detector) -> None:
    good, bad = threshold_between(model)
    browser.get(line.page.url)
    becomes(browser, "WAITING")
    line.line.part(good)
    becomes(browser, "OK")
    wait_until(lambda: is_loaded(browser, "frame") and is_loaded(browser, "map"))
    line.line.part(bad)
    becomes(browser, "DEFECT")
    assert text(browser, "count-OK") == text(browser, "count-DEFECT") == "1" and text(browser, "share") == "50.0 %"
    assert float(text(browser, "score")) == pytest.approx(line.results[1].score, rel=1e-3)
    assert browser.title == "DEFECT · line <b>7</b>" and text(browser, "source") == "line <b>7</b>"  # names stay text
    wait_until(lambda: "DEFECT" in text(browser, "announce"))
    assert browser.execute_script("return document.getElementById('announce').getAttribute('aria-live')") == "polite"
    line.line.part(np.zeros((3,), np.uint8))
    becomes(browser, "ERROR")
    assert "expected a uint8" in text(browser, "why")
    assert not is_loaded(browser, "frame") and not is_loaded(browser, "map")  # no picture of another part beside it
    assert browser.execute_script("return document.querySelectorAll('#chart use').length") == 2
    assert "1 above it" in browser.execute_script("return document.getElementById('chart').getAttribute('aria-label')")
    line.end()
    becomes(browser, "ENDED")


def test_frame_and_heat_map_are_of_one_part(browser: Any, line: Running) -> None:
    browser.get(line.page.url)
    for _ in range(30):
        line.line.part()
        pair = browser.execute_script(
            "return ['frame', 'map'].map(id => document.getElementById(id)).map(i => i.hidden || i.src)"
        )
        assert pair[0] is pair[1] is True or pair[0].replace("frame", "map") == pair[1]
    wait_until(lambda: is_loaded(browser, "frame") and text(browser, "pictured") == "no. 29")


def test_it_asks_for_nothing_elsewhere_and_reports_no_error(browser: Any, line: Running) -> None:
    browser.get(line.page.url)
    line.line.part()
    wait_until(lambda: is_loaded(browser, "map"))
    assert browser.get_log("browser") == []
    assert all(url.startswith(line.page.url) for url in requests(browser))
    blocked = browser.execute_script(
        "const image = new Image(); const done = new Promise(resolve => { image.onerror = image.onload = e => resolve(e.type) });"
        "image.src = 'http://192.0.2.1/x.png'; return done"
    )
    assert blocked == "error"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_what_is_old_is_not_shown(browser: Any, model: Detector) -> None:
    """A part that was good is not good for ever: the source has gone, or no part has come."""
    good, _ = threshold_between(model)
    with running(model, deadline_ms=500.0, hold_ms=1500.0) as line:
        browser.get(line.page.url)
        line.line.part(good)
        becomes(browser, "OK")
        becomes(browser, "WAITING")
        assert "OK was" in text(browser, "why")
        line.line.part(*[OSError("no route to host")] * 30)
        becomes(browser, "ERROR")
        assert "no route to host" in text(browser, "why")
        becomes(browser, "NO DATA", "source does not answer")  # in a pause between two attempts
        lamp = browser.execute_script("return document.getElementById('lamp-source').dataset.level")
        assert lamp == "bad" and "not connected" in text(browser, "lamp-source")


def test_drift_has_its_lamp(browser: Any, model: Detector) -> None:
    def lamp() -> Any:
        return browser.execute_script(
            "const lamp = document.getElementById('lamp-drift'); return lamp.hidden ? null : [lamp.dataset.level, lamp.innerText]"
        )

    with InspectionStream(model, frames(3)) as stream:
        results = list(stream)
    quiet = DriftState(frames=900, e_value=0.25, peak=3.0, level=100.0)
    at = datetime(2026, 1, 2, 12, 4, 5, tzinfo=UTC)
    found = replace(quiet, e_value=140.0, direction=Direction.UP, alarm_frame=880, alarm_at=at, onset_frame=600)
    for result, state in zip(results, (None, quiet, found), strict=True):
        object.__setattr__(result, "drift", state)
    with WatchPage(port=0, deadline_ms=3.6e6) as page:
        browser.get(page.url)
        page.write(results[0])
        wait_until(lambda: is_loaded(browser, "frame"))
        assert lamp() is None
        page.write(results[1])
        wait_until(lambda: lamp() == ["good", "Drift\nnone"])
        page.write(results[2])
        wait_until(lambda: lamp()[0] == "warn")
        assert lamp()[1] == "Drift\nscores went up, found 2026-01-02"
        object.__setattr__(results[2], "drift", replace(found, alarm_at=datetime.now(UTC)))
        page.write(results[2])
        wait_until(lambda: re.fullmatch(r"Drift\nscores went up, found \d\d:\d\d:\d\d", lamp()[1]) is not None)


SEEN = """
window.seen = [];
new MutationObserver(changes => {
  for (const {target} of changes) if (target.id === 'outcome') window.seen.push(target.dataset.outcome);
}).observe(document, {subtree: true, childList: true, attributes: true, attributeFilter: ['data-outcome']});
"""


def test_a_page_that_is_loaded_late_shows_nothing_old(browser: Any, model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where drawing hangs the server still has the last state, of a good part."""
    good, _ = threshold_between(model)
    hangs, release = threading.Event(), threading.Event()

    def hang(result: object) -> None:
        hangs.set()
        release.wait(600.0)

    def waited_ms() -> int:
        with Listener(line.page) as listener:
            state = listener.next()
            assert state is not None and state["result"]["outcome"] == "OK"
            return listener.waited_ms

    # The outcome itself stays fresh: only that nothing is heard makes it old.
    with running(model, deadline_ms=3.6e6, hold_ms=3.6e6) as line:
        browser.get(line.page.url)
        line.line.part(good)
        becomes(browser, "OK")
        monkeypatch.setattr(board, "pictures", hang)
        script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SEEN})
        try:
            line.line.part(good)
            assert hangs.wait(20.0)  # there is no further state from here on
            wait_until(lambda: waited_ms() > 3000)
            becomes(browser, "NO DATA")
            for _ in range(2):
                browser.get(line.page.url)
                wait_until(lambda: text(browser, "source") == line.line.name)  # the state has come
                assert outcome(browser) == "NO DATA" and set(browser.execute_script("return window.seen")) == {"NO DATA"}
        finally:
            release.set()
            browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_a_process_that_stops_or_dies(browser: Any, tmp_path: Path) -> None:
    """A browser that hears nothing says so, and is back with the line."""
    (tmp_path / "in").mkdir()
    small_model().save(tmp_path / "small.safetensors")
    command = [
        sys.executable,
        "-m",
        "advrad_fast.cli",
        "watch",
        "small.safetensors",
        "in",
        "--backend",
        "cpu",
        "--settle-ms",
        "0",
    ]
    command += ["--threshold", "1e9", "--deadline-ms", "3600000", "--listen"]

    def start(address: str) -> tuple[subprocess.Popen[str], str]:
        environment = {**os.environ, "ADVRAD_CACHE": str(tmp_path / "cache")}
        process = subprocess.Popen([*command, address], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        return process, process.stderr.readline().split()[-1]

    def part(name: str) -> None:
        Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.png").rename(tmp_path / "in" / f"{name}.png")

    process, url = start("127.0.0.1:0")
    try:
        browser.get(url)
        becomes(browser, "WAITING")
        part("one")
        becomes(browser, "OK")
        process.send_signal(signal.SIGSTOP)
        becomes(browser, "NO DATA")
        assert text(browser, "why") == "No connection to the inspection."
        process.send_signal(signal.SIGCONT)
        becomes(browser, "OK")
        process.kill()
        becomes(browser, "NO DATA")
        process.communicate()
        process, _ = start(url.removeprefix("http://").rstrip("/"))
        becomes(browser, "WAITING")
        part("two")
        becomes(browser, "OK")
        assert text(browser, "count-OK") == "1" and text(browser, "part") == "two.png"
    finally:
        process.kill()
        process.communicate()


def test_the_last_rejects_can_be_looked_at_by_keyboard(browser: Any, line: Running, model: Detector) -> None:
    from selenium.webdriver import ActionChains, Keys

    good, bad = threshold_between(model)
    browser.get(line.page.url)
    line.line.part(bad, good, np.ascontiguousarray(bad[::-1]), good)
    wait_until(lambda: browser.execute_script("return document.querySelectorAll('#gallery button').length") == 2)

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    press(Keys.TAB)
    assert browser.execute_script("return document.activeElement.closest('#gallery li') !== null")
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(Keys.ENTER)
    wait_until(lambda: is_loaded(browser, "closer-frame") and is_loaded(browser, "closer-map"))
    assert text(browser, "closer-name") == "DEFECT · no. 2" and "threshold" in text(browser, "closer-facts")
    assert text(browser, "now") == f"Now: {outcome(browser)}"
    press(Keys.ARROW_RIGHT)
    assert text(browser, "closer-name") == "DEFECT · no. 0"
    assert browser.execute_script(
        "return [document.getElementById('older').disabled, document.getElementById('newer').disabled]"
    ) == [
        True,
        False,
    ]
    press(Keys.ESCAPE)
    assert not browser.execute_script("return document.getElementById('closer').open")
    assert browser.execute_script("return document.activeElement.closest('#gallery li') !== null")  # back where it was


WIDER = """
return Array.from(document.body.querySelectorAll('*'))
  .filter(e => !e.closest('svg, dialog, .unseen'))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.tagName + '#' + e.id)
"""

# In a font whose letters are wide, every word that the panel can say has to fit into it.
WORDS = """
const panel = document.getElementById('outcome'), word = document.getElementById('word');
return ['OK', 'DEFECT', 'ABSTAIN', 'ERROR', 'NO DATA', 'WAITING', 'ENDED'].map(outcome => {
  panel.dataset.outcome = word.textContent = outcome;
  const box = panel.getBoundingClientRect();
  const shape = word.previousElementSibling.getBoundingClientRect();
  const inside = word.getBoundingClientRect().right < box.right && shape.left > box.left;
  return [outcome, inside, parseFloat(getComputedStyle(word).fontSize) / box.width];
});
"""


@pytest.mark.parametrize("width", [320, 390, 768, 820, 1024, 1440, 1920])
def test_nothing_is_wider_than_the_screen(browser: Any, line: Running, model: Detector, width: int) -> None:
    good, bad = threshold_between(model)
    browser.get(line.page.url)
    line.line.part(good, bad)
    wait_until(lambda: is_loaded(browser, "map"))
    set_width(browser, width)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script(WIDER) == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for word, inside, share in browser.execute_script(WORDS):
        assert inside and share > 0.1, word


CONTRAST = (
    RATIO
    + """
const found = [];
const panel = document.getElementById('outcome'), lamps = document.querySelectorAll('#lamps li');
const levels = ['good', 'bad', 'warn', 'off'];
['OK', 'DEFECT', 'ABSTAIN', 'ERROR', 'NO DATA', 'WAITING', 'ENDED'].forEach((outcome, i) => {
  panel.dataset.outcome = outcome;
  for (const lamp of lamps) lamp.dataset.level = levels[i % 4];
  const all = document.querySelectorAll('p, b, span, dt, dd, figcaption, h1, h2, text, li');
  for (const e of all) if (e.textContent.trim() && e.getClientRects().length) found.push([...ratio(e), outcome]);
});
return found.sort((a, b) => a[0] - b[0])[0];
"""
)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_dark(browser: Any, line: Running, model: Detector, dark: bool) -> None:
    good, bad = threshold_between(model)
    set_dark(browser, dark)
    browser.get(line.page.url)
    line.line.part(bad, good)
    wait_until(lambda: browser.execute_script("return document.querySelectorAll('#gallery button').length") == 1)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(17, 22, 28)") == dark
    ratio, *where = browser.execute_script(CONTRAST)
    set_dark(browser, False)
    assert ratio >= 4.5, where  # WCAG AA


def test_outcomes_differ_without_colour(browser: Any, line: Running) -> None:
    """Each has a silhouette of its own, and a panel of its own even for who sees no colour."""
    browser.get(line.page.url)
    shapes = browser.execute_script(
        "return ['OK', 'DEFECT', 'ABSTAIN', 'ERROR', 'NO-DATA', 'WAITING', 'ENDED']"
        ".map(name => document.getElementById('shape-' + name).innerHTML)"
    )
    assert len(set(shapes)) == 7 and all(shapes)


def test_signing_in(browser: Any, model: Detector) -> None:
    from selenium.webdriver.common.by import By

    with running(model, token="a-token-that-is-long-enough") as line:
        browser.get(line.page.url)
        field = browser.find_element(By.ID, "token")
        field.send_keys("wrong")
        field.submit()
        wait_until(lambda: "This is not the token." in browser.page_source)
        browser.find_element(By.ID, "token").send_keys("a-token-that-is-long-enough")
        browser.find_element(By.ID, "token").submit()
        wait_until(lambda: browser.execute_script("return document.getElementById('word') !== null"))
        becomes(browser, "WAITING")
        assert "token" not in browser.current_url
        assert browser.execute_script("return document.cookie") == ""  # no script can read it
