"""The report in a real browser: no errors, nothing fetched, nothing beyond the screen, legible in light and dark."""

import json
from pathlib import Path

import pytest
from small_folder import write

from deepv3.train.report import write_comparison, write_report

pytestmark = pytest.mark.browser

WIDTHS = (390, 768, 1280)

# Elements that stick out of the window although no ancestor scrolls them.
STICKING_OUT = """() => [...document.querySelectorAll('body *')].filter(node => {
  const box = node.getBoundingClientRect();
  if (!box.width || !box.height || node.closest('.scroll, nav, pre, svg')) return false;
  return box.right > document.documentElement.clientWidth + 0.5 || box.left < -0.5;
}).map(node => node.outerHTML.slice(0, 120))"""

# Pairs of axis labels of one axis that lie upon each other.
OVERLAPS = """() => [...document.querySelectorAll('.plot .x, .plot .y')].flatMap(axis => {
  const boxes = [...axis.children].map(node => [node.textContent, node.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
    p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom).map(([b]) => a + ' / ' + b));
})"""

# Smallest contrast of text with what is behind it (WCAG 2.1), and where.
CONTRAST = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [99, ''];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || node.closest('script, svg') || !node.getBoundingClientRect().width) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, node.outerHTML.slice(0, 120)];
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The pages that are looked at, by name."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        write(folder / "sweep" / f"{i}-lr-{lr}", steps=150, lr=lr, seed=i) for i, lr in enumerate((1e-3, 2e-3, 4e-3))
    ]
    long = write(folder / ("a-name-without-any-place-to-break-" * 4 + "x"), steps=3000)
    single = write(folder / "single", steps=1)
    (folder / "empty").mkdir()
    return {
        "report": write_report(runs[0]),
        "comparison": write_comparison(runs, folder / "comparison.html"),
        "long": write_report(long),
        "single": write_report(single),
        "empty": write_report(folder / "empty"),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "comparison", "long", "single", "empty"])
def test_a_page_is_whole_at_every_width(name, width, scheme, pages, visit, keep_screenshot):
    tab = visit(pages[name], width, scheme)
    keep_screenshot(tab, f"{name}-{width}-{scheme}")
    assert tab.errors == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    assert tab.page.evaluate(STICKING_OUT) == []
    assert tab.page.evaluate(OVERLAPS) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_text_has_enough_contrast(name, scheme, pages, visit):
    ratio, where = visit(pages[name], 1280, scheme).page.evaluate(CONTRAST)
    assert ratio >= 4.5, where


def test_opened_tables_do_not_widen_a_phones_page(pages, visit, keep_screenshot):
    tab = visit(pages["report"], 390)
    tab.page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
    keep_screenshot(tab, "report-390-opened")
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 390
    assert tab.page.evaluate(STICKING_OUT) == []


def test_pointing_at_a_chart_reads_its_values_there(pages, visit):
    tab = visit(pages["report"])
    plot = tab.page.locator("#loss .plot")
    before = tab.page.locator("#loss .legend b").all_inner_texts()
    box = plot.bounding_box()
    tab.page.mouse.move(box["x"] + box["width"] * 0.02, box["y"] + 50)
    assert tab.page.locator("#loss .cursor").is_visible()
    there = tab.page.locator("#loss .legend b").all_inner_texts()
    rows = [json.loads(line) for line in (pages["report"].parent / "metrics.jsonl").read_text().splitlines()]
    step = int(tab.page.locator("#loss .cursor b").inner_text())
    assert 1 <= step <= 5
    assert float(there[0]) == pytest.approx(rows[step - 1]["loss_main"], rel=1e-3)
    tab.page.mouse.move(5, 5)
    assert tab.page.locator("#loss .legend b").all_inner_texts() == before


def test_a_tile_grows_when_it_is_pressed_by_key_or_pointer(pages, visit):
    tab = visit(pages["report"])
    tile = tab.page.locator("button.tile").first
    small = tile.bounding_box()["width"]
    tile.focus()
    tab.page.keyboard.press("Enter")
    assert tile.get_attribute("aria-expanded") == "true" and tile.bounding_box()["width"] > 3 * small
    tile.click()
    assert tile.bounding_box()["width"] == pytest.approx(small, abs=1)


def test_the_page_of_a_running_run_reloads_itself_unless_it_is_being_read(pages, visit):
    tab = visit(pages["empty"], clock=True)
    with tab.page.expect_event("load"):
        tab.page.clock.run_for(61_000)
    assert len(tab.loads) == 2
    tab.page.locator("summary").first.click()
    tab.page.clock.run_for(200_000)
    assert len(tab.loads) == 2
    over = visit(pages["report"], clock=True)
    over.page.clock.run_for(200_000)
    assert len(over.loads) == 1, "this run is over"


def test_every_figure_is_there_without_script(pages, visit):
    tab = visit(pages["report"], script=False)
    assert tab.page.locator("figure.chart svg").count() == tab.page.locator("figure.chart").count() >= 14
    assert tab.page.locator("figure.map img").count() >= 8


def test_figures_have_names_and_numbers_for_those_who_cannot_see_them(pages, visit):
    page = visit(pages["report"]).page
    assert page.evaluate("[...document.querySelectorAll('svg')].every(n => n.getAttribute('aria-label').length > 10)")
    assert page.evaluate("[...document.images].every(n => n.alt.length > 10)")
    assert page.evaluate("[...document.querySelectorAll('figure.chart')].every(n => n.querySelector('table caption'))")
    assert page.evaluate("document.documentElement.lang") == "en" and page.title() == "0-lr-0.001 · deepv3"
