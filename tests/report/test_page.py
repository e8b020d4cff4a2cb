"""The page in a real headless Chromium: sort, filter, group, query, keyboard, theme, phone, and a silent console."""

import pytest

from efficientllm.report import __main__ as command
from report import browser, made

pytestmark = [
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on this machine"),
    pytest.mark.xdist_group("page"),  # they share one report and one browser
]
ROWS = "[...document.querySelectorAll('#table-tables tbody tr')].map((row) => row.dataset.variant ?? 'theirs')"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    made.sweep(folder / "cpu", blocks=3, event_files=True)
    told = {"name": "attention", "variant": "mha", "baseline": "gqa", "block": 0, "order": 9, "seed": 0}
    made.row(folder / "cpu" / "oom", "mha", outcome="oom", sweep=told)
    made.sweep(folder / "gpu", blocks=2, devices=made.H100, aec_w=650.0)
    assert command.main([str(folder), f"--out={folder / 'report'}"]) == 0
    return folder / "report" / "index.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    made_browser = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield made_browser
    made_browser.close()


@pytest.fixture
def page(chromium, report):
    chromium.problems.clear()
    chromium.look()
    chromium.open(report)
    yield chromium
    assert chromium.problems == [], "the console is silent"


def ask(page, query):
    """What the page answers: the text of the result, or of the error."""
    page.run(f"byId('query').value = {query!r}; byId('query-form').requestSubmit()")
    return page.run("byId('query-error').hidden ? byId('query-result').innerText : byId('query-error').innerText")


def test_it_shows_every_variant_with_ratio_and_reason(page):
    assert page.run(ROWS).count("mla") == 2 and len(page.run(ROWS)) == 7
    mla = "document.querySelector('tr[data-variant=mla] td[data-key=al_s]')"
    assert "×1.2" in page.run(f"{mla}.innerText") or "×1.3" in page.run(f"{mla}.innerText")
    null = "document.querySelector('tr[data-variant=mla] td[data-key=mcr] .null')"
    assert page.run(f"{null}.title") == "not measured in this run" and page.run(f"{null}.innerText") == "–"
    assert page.run("byId('failures-text').innerText").startswith("oom mha")


def test_it_sorts_by_mouse_and_keyboard_with_nulls_last(page):
    page.run("byId('group-by').value = 'task'; byId('group-by').dispatchEvent(new Event('change'))")
    page.run("document.querySelector('[data-sort=al_s]').click()")
    order = page.run(ROWS)
    assert order[0] == "mqa" and order[-1] == "mha" and order[-2] == "mla"
    head = "document.querySelector('[data-sort=al_s]').closest('th').getAttribute('aria-sort')"
    assert page.run(head) == "ascending"
    assert page.run("document.activeElement.dataset.sort") == "al_s", "the focus stays on the heading"
    page.press("Enter", text="\r")
    assert page.run(head) == "descending" and page.run(ROWS)[0] == "mla" and page.run(ROWS)[-1] == "mha"


def test_it_filters_and_groups(page):
    page.run("byId('filter').value = 'MLA h100'; byId('filter').dispatchEvent(new Event('input'))")
    assert page.run(ROWS) == ["mla"] and page.run("byId('table-count').innerText") == "1 of 7 variants"
    page.run("byId('filter').value = 'nothing'; byId('filter').dispatchEvent(new Event('input'))")
    assert page.run(ROWS) == []
    page.run("byId('filter').value = ''; byId('filter').dispatchEvent(new Event('input'))")
    for by, count in (("device", 2), ("axis", 1), ("scale", 1), ("ranking", 2)):
        page.run(f"byId('group-by').value = '{by}'; byId('group-by').dispatchEvent(new Event('change'))")
        assert page.run("document.querySelectorAll('#table-tables table').length") == count, by


def test_the_studys_rows_and_other_columns_come_on_demand(page):
    page.run("byId('show-study').click()")
    assert page.run(ROWS).count("theirs") == 8
    assert "digest" in page.run("document.querySelector('tr.theirs').title")
    shown = "document.querySelectorAll('[data-sort=compile_s]').length"
    assert page.run(shown) == 0
    page.run("document.querySelector('#columns input[value=compile_s]').click()")
    assert page.run(shown) == 2


QUERIES = {
    "least AL": "mqa",
    "least al_s with eval loss <= -1 %": "mla",
    "least flops_per_token with amu_gb >= 1900 MB and amu_gb < 2.1 GB": "gqa",
    "most tt_tokens_per_param_s where al_s <= 470 ms, params_total > 1": "mqa",
    "least al_s with al_s <= 1 ms": "No variant fits",
}
WRONG = {
    "lest al_s": "begin with least or most",
    "least al_x": "did you mean “al_s”?",
    "least al_s with eval_loss": "is no condition",
    "least al_s with eval_loss <= much": "is no value for eval_loss",
    "least al_s with al_s <= 3 GB": "“GB” is no unit for al_s, which is in s",
    "least al_s with amu_gb <= 3 parsec": "“parsec” is no unit for amu_gb, which is in GB",
    "least al_s eval_loss <= 3": "conditions follow “with”",
}


def test_queries(page):
    for query, said in QUERIES.items():
        (first, *_) = ask(page, query).split("do not fit")
        assert said in first, query
    assert "×" in ask(page, "least AL") and "with a probability of 100 %" in ask(page, "least AL")


def test_a_wrong_query_is_told_what_would_be_right(page):
    for query, said in WRONG.items():
        assert said in ask(page, query), query
        assert page.run("byId('query').getAttribute('aria-invalid')") == "true"
    assert "mqa" in ask(page, "least al_s") and page.run("byId('query').hasAttribute('aria-invalid')") is False


def test_charts_are_drawn_and_follow_their_controls(page):
    for id_ in ("pareto", "radar", "curves-chart"):
        assert page.run(f"document.querySelectorAll('#{id_} .main-svg').length") > 0, id_
    assert page.run("byId('pareto').data.length") == 3 and page.run("byId('radar').data.length") == 3
    assert page.run("byId('curves-chart').data[0].y.length") == 200
    page.run("byId('pareto-x').value = 'amu_gb'; byId('pareto-x').dispatchEvent(new Event('change'))")
    assert page.run("byId('pareto').data.find((trace) => trace.name === 'mqa').x[0]") == pytest.approx(1.6, rel=0.01)
    page.run("byId('ranks-metric').value = 'al_s'; byId('ranks-metric').dispatchEvent(new Event('change'))")
    assert page.run("document.querySelector('#ranks-text tbody th').innerText") == "mqa"


def test_light_and_dark_follow_the_system_and_the_switch(page, report):
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.run(background)
    page.look(dark=True)
    page.open(report)
    dark = page.run(background)
    assert light != dark
    page.run("byId('theme').click()")
    assert page.run(background) == light
    page.run("byId('theme').click(); localStorage.clear()")


def test_it_fits_a_phone(page, report):
    page.look(390, 844)
    page.open(report)
    assert page.run("document.documentElement.scrollWidth") <= 390
    assert page.run("document.querySelector('#radar .main-svg').getBoundingClientRect().width") <= 390


def test_every_control_is_reached_and_named(page):
    unnamed = """[...document.querySelectorAll('button, input, select, [role=region], [role=img]')].filter((each) =>
        !(each.innerText || each.getAttribute('aria-label') || (each.labels && each.labels.length))).length"""
    assert page.run(unnamed) == 0
    page.run("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        page.press("Tab")
        reached.add(page.run("document.activeElement.id || document.activeElement.className"))
    assert {"skip", "theme", "query", "filter", "group-by", "show-study"} <= reached
