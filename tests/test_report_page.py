"""The report's page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import RATIO, chromium, requests, set_dark, set_width
from reports import HOSTILE, category

from advrad_fast.evaluation import report


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report.write(folder, category("screw"))
    report.write(folder, category(HOSTILE, seed=1))
    return report.write(folder, category("grid", seed=2, attacked=False))


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(open_browser: Any, page: Path) -> Any:
    """The page, freshly opened, and nothing of others in the logs."""
    open_browser.get("about:blank")  # the browser's own first page is not ours
    for log in ("browser", "performance"):
        open_browser.get_log(log)
    set_width(open_browser, 1200)
    open_browser.get(page.as_uri())
    return open_browser


TABLE = "document.querySelector('[aria-label=\"Figures by category\"] table')"


def column(browser: Any, index: int, table: str = TABLE) -> list[str]:
    found: list[str] = browser.execute_script(
        f"return Array.from({table}.tBodies[0].rows, row => row.cells[{index}].textContent)"
    )
    return found


def sorted_by(browser: Any) -> list[tuple[str, str]]:
    heads = f"return Array.from({TABLE}.tHead.rows[0].cells, cell => [cell.textContent, cell.getAttribute('aria-sort')])"
    return [(text, order) for text, order in browser.execute_script(heads) if order != "none"]


def head(browser: Any, text: str) -> Any:
    buttons = browser.execute_script(f"return Array.from({TABLE}.tHead.querySelectorAll('button'))")
    return next(button for button in buttons if button.text == text)


def test_it_opens_without_an_error_and_without_a_request(browser: Any, page: Path) -> None:
    assert browser.get_log("browser") == []
    assert requests(browser) == [page.as_uri()]
    blocked = browser.execute_script(
        "const image = new Image(); const done = new Promise(resolve => { image.onerror = image.onload = e => resolve(e.type) });"
        "image.src = 'http://192.0.2.1/x.png'; return done"
    )
    assert blocked == "error"
    assert requests(browser) == []
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_names_stay_text(browser: Any) -> None:
    assert "owned" not in browser.title.split("<script>")[0]
    assert HOSTILE in browser.execute_script("return document.body.textContent")
    assert browser.execute_script("return document.scripts.length") == 1
    assert browser.execute_script("return document.querySelectorAll('[onerror], img[src=x]').length") == 0


def test_images_are_there(browser: Any) -> None:
    widths = browser.execute_script(
        "for (const image of document.images) image.loading = 'eager';"
        "return Promise.all(Array.from(document.images, image => image.decode().then(() => image.naturalWidth)))"
    )
    assert (
        len(widths) == 3 + (2 * 6 * 2 + 6) * 2
    )  # colour scales; six images, with two views in two categories and one in a third
    assert all(width > 0 for width in widths)
    assert browser.execute_script("return Array.from(document.images, i => i.alt).every(alt => alt.length > 0)")


def test_tables_sort_by_click(browser: Any) -> None:
    before = column(browser, 0)
    assert len(before) == 3 and sorted_by(browser) == []
    head(browser, "image AUROC").click()
    values = [float(text) for text in column(browser, 3)]
    assert values == sorted(values) and sorted_by(browser) == [("image AUROC", "ascending")]
    head(browser, "image AUROC").click()
    assert [float(text) for text in column(browser, 3)] == values[::-1]
    assert sorted_by(browser) == [("image AUROC", "descending")]
    head(browser, "category").click()
    assert column(browser, 0) == sorted(before) and sorted_by(browser) == [("category", "ascending")]
    assert browser.execute_script(f"return {TABLE}.tFoot.rows[0].cells[0].textContent") == "mean"


def test_what_is_missing_comes_last_either_way(browser: Any) -> None:
    for _ in range(2):
        head(browser, "robust, linf 2/255").click()
        names, values = column(browser, 0), column(browser, 9)
        assert names[-1] == "grid" and values[-1] == "\N{EN DASH}" and "\N{EN DASH}" not in values[:-1]


def test_tables_sort_by_keyboard(browser: Any) -> None:
    from selenium.webdriver import ActionChains, Keys

    browser.execute_script("arguments[0].focus()", head(browser, "category"))
    ActionChains(browser).send_keys(Keys.TAB, Keys.ENTER).perform()
    assert sorted_by(browser) == [("good", "ascending")]
    ActionChains(browser).send_keys(Keys.SPACE).perform()
    assert sorted_by(browser) == [("good", "descending")]
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # where the focus is can be seen


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_nothing_is_wider_than_the_screen(browser: Any, width: int) -> None:
    set_width(browser, width)
    browser.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    assert browser.execute_script("return innerWidth") == width
    wide = browser.execute_script(
        "return Array.from(document.body.querySelectorAll('*'))"
        ".filter(e => !e.parentElement.closest('.scroll'))"
        ".filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)"
        ".map(e => e.tagName + '.' + e.getAttribute('class'))"
    )
    assert wide == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


CONTRAST = (
    RATIO
    + """
const all = document.querySelectorAll('p, b, span, td, th, dt, figcaption, h1, h2, h3, text, summary');
return Array.from(all).filter(e => e.textContent.trim()).map(ratio).sort((a, b) => a[0] - b[0])[0];
"""
)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_dark(browser: Any, dark: bool) -> None:
    set_dark(browser, dark)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(18, 22, 28)") == dark
    ratio, where = browser.execute_script(CONTRAST)
    assert ratio >= 4.5, where  # WCAG AA
    set_dark(browser, False)


def test_a_dark_screen_prints_on_white_and_within_the_page(browser: Any) -> None:
    set_dark(browser, True)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    set_width(browser, 718)  # A4 between Chromium's own margins
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script("return getComputedStyle(document.querySelector('h1')).color") == "rgb(28, 36, 48)"
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    set_dark(browser, False)


def test_all_is_printed(browser: Any) -> None:
    """The list of all images is folded on the screen, and open on paper."""
    assert not browser.execute_script("return document.querySelector('details').open")
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return document.querySelector('details').open")
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert not browser.execute_script("return document.querySelector('details').open")
