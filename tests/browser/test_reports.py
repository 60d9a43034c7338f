"""Reports in a real browser: nothing is amiss in its console, every image is there, a phone scrolls one way only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from launch.commands.report import load_judged
from pretrain.evals.result import EvalReport
from pretrain.reports.comparison import compare_results
from pretrain.reports.comparison_page import write_comparison
from pretrain.reports.page import render
from pretrain.reports.report_figures import picture
from tests.launch.suites import in_this_process, run_suite, tree_of, write_suite
from tests.reports.test_report import sample_page

pytestmark = pytest.mark.xdist_group("browser")  # one browser, and one suite, for all of them

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESKTOP = {"width": 360, "height": 780}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        told = f"no browser to open reports in, none of {', '.join(NAMES)}: Debian's package chromium"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    with sync_playwright() as playwright:
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=path, args=args, timeout=180_000)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    assert run_suite(write_suite(folder, tree_of(folder)), folder / "out", devices=[], run=in_this_process) == 0
    return folder / "out"


def opened(browser: Browser, path: Path, size: dict[str, int], heard: list[str]) -> Page:
    page = browser.new_page(viewport=size)  # type: ignore[arg-type]
    page.set_default_timeout(120_000)
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    for details in page.query_selector_all("details:not([open]) > summary"):
        details.click()
    return page


def assert_sound(browser: Browser, path: Path, size: dict[str, int]) -> int:
    """Returns how many images it has."""
    heard: list[str] = []
    page = opened(browser, path, size, heard)
    images = page.evaluate("[...document.images].map(i => [i.complete && i.naturalWidth > 0, i.width > 0, i.alt])")
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    beyond = page.evaluate(
        "[...document.querySelectorAll('img, p, h1, h2, h3, li, summary, dd, .stack td')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    page.close()
    assert heard == []
    assert [alt for loaded, shown, alt in images if not (loaded and shown)] == []
    assert wide == 0, f"the page scrolls sideways by {wide} pixels"
    assert beyond == []
    return len(images)


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_comparison_is_whole(browser: Browser, suite: Path, tmp_path: Path, size: dict[str, int]) -> None:
    path = write_comparison(compare_results([suite], "random"), tmp_path, load_judged)
    # By class: 2 columns of a figure and 3 matrices; 3 of features; 6 queries with 5 neighbours for each encoder.
    assert assert_sound(browser, path, size) == 2 * (1 + 3) + 3 + 6 * (1 + 3 * 5)


def test_many_encoders_and_long_words_leave_the_page_as_wide_as_it_is(
    browser: Browser, suite: Path, tmp_path: Path
) -> None:
    own = EvalReport.load(suite / "first" / "colours" / "knn.json")
    paths = []
    for index in range(12):
        name = f"{'a_name_without_an_end_' * 4}{index}"
        changed = replace(
            own,
            encoder={**own.encoder, "source": name},
            arguments={**own.arguments, "k": [index % 4]},
            notes=["<script>alert(1)</script> & a-note-of-one-word" + "-and-more" * 30],
        )
        paths.append(tmp_path / f"{index}.json")
        changed.save(paths[-1])
    path = write_comparison(compare_results(paths), tmp_path / "page", load_judged)
    assert_sound(browser, path, PHONE)


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_report_shows_every_number_at_once_and_tables_that_go_on_say_so(
    browser: Browser, suite: Path, tmp_path: Path, size: dict[str, int]
) -> None:
    run = tmp_path / "run.html"
    drawn = picture(np.zeros((4, 4, 3), np.uint8)).source
    page_text = render("report.html.j2", sample_page("a_name_without_an_end_" * 5))
    run.write_text(page_text.replace("data:image/png;base64,AA==", drawn))
    assert_sound(browser, run, size)
    page = opened(browser, run, size, [])
    cut = page.evaluate(
        "[...document.querySelectorAll('.stack')].filter(e => e.scrollWidth > e.parentElement.clientWidth).length"
    )
    folded = page.evaluate("document.querySelectorAll('details').length")
    page.close()
    assert cut == 0
    assert folded == 2, "the recipe and the packages"
    comparison = write_comparison(compare_results([suite], "random"), tmp_path / "page", load_judged)
    page = opened(browser, comparison, size, [])
    shades = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => getComputedStyle(e).backgroundImage)")
    page.close()
    assert shades
    assert all(shade.count("linear-gradient") == 4 for shade in shades)


def test_what_is_broken_is_seen(browser: Browser, tmp_path: Path) -> None:
    page = {
        "name": "x",
        "verdict": "",
        "facts": {},
        "packages": {},
        "eval_curves": [],
        "comparisons": [],
        "notes": [],
        "goodput": None,
        "triples": [],
        "neighbours": None,
    }
    path = tmp_path / "run.html"
    whole = render("report.html.j2", {**page, "curves": [], "environment": {}, "recipe": ""})
    path.write_text(whole)
    assert assert_sound(browser, path, PHONE) == 0
    for broken in (
        '<img src="data:image/png;base64,AAAA" alt="broken">',
        '<img src="http://localhost/x.png" alt="from outside">',
        "<script>nothing()</script>",
        '<div style="width: 2000px">wide</div>',
    ):
        path.write_text(whole.replace("</header>", f"{broken}</header>"))
        with pytest.raises(AssertionError):
            assert_sound(browser, path, PHONE)
