"""report.html in a real browser: on a phone and on a desk, in the light and in the dark.

With PT2_SCREENSHOTS=FOLDER, what the browser shows is kept there, to be looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.page.page import page
from tests.harness.page.records import record_of

PHONE, DESK = 360, 1280
RECORDS = {
    "dense": record_of(layers=30),
    "mixture": record_of(layers=48, experts=128),
    "hybrid": record_of(layers=12, kinds=tuple(f"mixer.part_{i}.a_long_name_proj" for i in range(24))),
}
LIGHT_PAGE, DARK_PAGE = "rgb(246, 247, 248)", "rgb(18, 20, 23)"


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    files = {name: folder / f"{name}.html" for name in RECORDS}
    for name, file in files.items():
        file.write_text(page(RECORDS[name]), encoding="utf-8")
    return files


@contextmanager
def opened(browser: Any, file: Path, width: int, scheme: str) -> Iterator[Any]:
    """A page in a window of this width; what the browser complains of, or asks for beyond it, is an error."""
    context = browser.new_context(viewport={"width": width, "height": 780}, color_scheme=scheme)
    tab = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(file.as_uri(), wait_until="networkidle")
    if folder := os.environ.get("PT2_SCREENSHOTS"):
        tab.screenshot(path=Path(folder) / f"{file.stem}-{width}-{scheme}.png", full_page=True)
    yield tab
    assert complaints == []
    assert requests == [file.as_uri()]
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", RECORDS)
def test_a_page_fits_its_window_and_asks_for_nothing(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    with opened(browser, pages[name], width, scheme) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("svg").count() == 9
        # A table may be wider than a phone, but then it scrolls inside its own frame.
        wide = tab.evaluate(
            """() => [...document.querySelectorAll("body *")].filter(e =>
                !e.closest(".scroll") && !e.closest("svg") && e.getBoundingClientRect().right > innerWidth
            ).map(e => e.outerHTML.slice(0, 80))"""
        )
        assert wide == []


@pytest.mark.parametrize(("scheme", "background"), [("light", LIGHT_PAGE), ("dark", DARK_PAGE)])
def test_the_page_follows_the_theme(
    browser: Any, pages: dict[str, Path], scheme: str, background: str
) -> None:
    with opened(browser, pages["dense"], PHONE, scheme) as tab:
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == background


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_stands_out_from_its_background(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    """WCAG AA: a contrast of 4.5, by the definition of WCAG 2.2; on the shades of the table of layers too."""
    script = """() => {
        const solid = e => {  // the colour behind an element: its background over those of its ancestors
            const behind = e.parentElement ? solid(e.parentElement) : [255, 255, 255, 1];
            const own = (getComputedStyle(e).backgroundColor.match(/[\\d.]+/g) || []).map(Number);
            const alpha = own.length === 4 ? own[3] : own.length ? 1 : 0;
            return behind.slice(0, 3).map((value, i) => value * (1 - alpha) + (own[i] || 0) * alpha);
        };
        const words = [...document.querySelectorAll("body *")].filter(e =>
            [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
        return words.map(e => {
            const style = getComputedStyle(e);
            const inside = e.closest("svg");
            return [e.textContent.trim().slice(0, 40), inside ? style.fill : style.color,
                    solid(inside ? inside.parentElement : e)];
        });
    }"""
    with opened(browser, pages["dense"], DESK, scheme) as tab:
        found = tab.evaluate(script)
    assert len(found) > 300
    faint = [(words, contrast(colour(ink), behind)) for words, ink, behind in found]
    assert [pair for pair in faint if pair[1] < 4.5] == []


def colour(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"[\d.]+", text)[:3]]


def contrast(ink: list[float], behind: list[float]) -> float:
    """Ratio of the relative luminances of two colours in sRGB."""

    def luminance(channels: list[float]) -> float:
        linear = [c / 3294.6 if c <= 10.31 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(ink), luminance(behind)))
    return (high + 0.05) / (low + 0.05)


def test_contrasts_are_those_of_the_definition() -> None:
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([119, 119, 119], [255, 255, 255]) == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_no_text_of_a_plot_is_smaller_than_nine_pixels(
    browser: Any, pages: dict[str, Path], width: int
) -> None:
    script = """() => [...document.querySelectorAll("svg text")].map(e =>
        parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a)"""
    with opened(browser, pages["dense"], width, "light") as tab:
        sizes = tab.evaluate(script)
    assert len(sizes) > 50
    assert min(sizes) >= 9


@pytest.mark.parametrize("name", RECORDS)
def test_words_of_a_plot_stay_inside_it_and_apart(browser: Any, pages: dict[str, Path], name: str) -> None:
    """The fonts of the page are not those that matplotlib measures."""
    script = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
        const box = svg.getBoundingClientRect();
        const texts = [...svg.querySelectorAll("text")].map(e => [e.textContent, e.getBoundingClientRect()]);
        const out = texts.filter(([, r]) => r.left < box.left - 2 || r.right > box.right + 2 ||
            r.top < box.top - 2 || r.bottom > box.bottom + 2).map(([t]) => `${t} leaves ${svg.ariaLabel}`);
        texts.forEach(([t, a], i) => texts.slice(i + 1).forEach(([u, b]) => {
            const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            if (across > 1 && down > 4) out.push(`${t} covers ${u} in ${svg.ariaLabel}`);
        }));
        return out;
    })"""
    with opened(browser, pages[name], PHONE, "light") as tab:
        assert tab.evaluate(script) == []
