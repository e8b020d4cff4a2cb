"""The page in a real headless Chromium: sort, filter, group, query, keyboard, theme, phone, and a silent console."""

import os
import time

import pytest

from efficientllm.metrics import conditions
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
    assert page.run("byId('failures-text').innerText").startswith("Failed (1)\noom mha")


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
    "eval loss <= -1 % and least al_s": "mla",
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
    for query, expected in QUERIES.items():
        (first, *_) = ask(page, query).split("do not fit")
        assert expected in first, query
    assert "×" in ask(page, "least AL") and "with a probability of 100 %" in ask(page, "least AL")


def test_a_wrong_query_is_told_what_would_be_right(page):
    for query, message in WRONG.items():
        assert message in ask(page, query), query
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


@pytest.mark.slow
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


OPENED = "document.querySelector('tr.opened')"


def test_a_row_opens_to_its_command_config_numbers_and_curves(page):
    page.run("document.querySelector('tr[data-variant=mla] .open-row').focus()")
    page.press("Enter", text="\r")
    text = page.run(f"{OPENED}.innerText")
    assert "python -m efficientllm.main --config=configs/base.py --config.name=attention-mla" in text
    assert "model.mixer\tmla\tgqa" in text and "aec_w\t650 W\tnvml energy counter" in text
    assert "not measured in this run" in text and "record.json" in page.run(f"{OPENED}.querySelector('.files a').href")
    assert page.run("document.querySelector('tr[data-variant=mla] .open-row').getAttribute('aria-expanded')") == "true"
    page.run("document.querySelectorAll('tr[data-variant=mla] .open-row')[1].click()")
    drawn = "[...document.querySelectorAll('tr.opened')].at(-1).querySelectorAll('.chart .main-svg').length"
    page.run("new Promise((done) => setTimeout(done, 300))")
    assert page.run(drawn) > 0, "the curves of a run that has event files"
    page.run("document.querySelector('tr[data-variant=mla] .open-row').click()")
    assert page.run("document.querySelectorAll('tr.opened').length") == 1


STATE = """(() => {
    const set = (id, value, event) => { byId(id).value = value; byId(id).dispatchEvent(new Event(event)); };
    set("filter", "m", "input"); set("group-by", "device", "change"); set("pareto-x", "amu_gb", "change");
    set("ranks-group", BOARD.groups[1].name, "change"); set("ranks-metric", "pcu", "change");
    byId("show-study").click(); document.querySelector("#columns input[value=compile_s]").click();
    document.querySelector("[data-sort=al_s]").click(); document.querySelector("[data-sort=al_s]").click();
    document.querySelector("tr[data-variant=mqa] .open-row").click();
    byId("query").value = "least amu_gb with al_s <= +50 %"; byId("query-form").requestSubmit();
    return location.hash;
})()"""
LOOK = """JSON.stringify([...["query", "filter", "group-by", "pareto-x", "ranks-metric"].map((id) => byId(id).value),
    ...["query-result", "ranks-text", "table-tables"].map((id) => byId(id).innerText), byId("show-study").checked])"""


def test_the_address_holds_what_is_asked_chosen_and_opened(page, report):
    before = page.run("location.hash"), page.run(LOOK)
    assert before[0] == "", "a page as it opens needs no address"
    hash, state = page.run(STATE), page.run(LOOK)
    page.open(report, hash)
    assert page.run(LOOK) == state and page.run("location.hash") == hash
    page.run("location.hash = ''")
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run(LOOK) == before[1], "another address in the same tab is followed too"


def test_links_to_sections_keep_the_address(page):
    page.run("byId('filter').value = 'mla'; byId('filter').dispatchEvent(new Event('input'))")
    page.run("document.querySelector('nav a[href=\"#claims\"]').click()")
    assert page.run("location.hash") == "#claims?filter=mla"
    assert page.run("document.activeElement.id") == "claims-title"


@pytest.mark.parametrize(
    "hash",
    [
        "#?columns=__proto__,constructor,al_s&sort=-__proto__&x=toString&by=constructor&rank=valueOf&open=__proto__",
        "#?query=%3Cimg%20src%3Dx%20onerror%3D%22window.pwned%3D1%22%3E&filter=%22%5D%3Cscript%3E",
        "#%3Cimg%20src%3Dx%20onerror%3D%22window.pwned%3D1%22%3E?study=javascript:window.pwned=1",
        "#?%E0%A4%A&=&&&query&open&sort&columns",
        "#?six-rows=nobody&curve-rows=nobody&rank-rows=nobody&tradeoff-rows=nobody&y=nothing&curve=x",
        "#" + "a" * 20000,
    ],
    ids=["names of objects", "markup", "markup as section", "malformed", "unknown rows", "long"],
)
def test_a_hostile_address_changes_nothing(page, report, hash):
    page.open(report, hash)
    assert page.run("window.pwned ?? null") is None and page.run("document.querySelector('img')") is None
    assert len([row for row in page.run(ROWS) if row != "theirs"]) in (0, 7)
    assert page.run("byId('pareto').data.length") == 3


def test_hostile_names_stay_text(chromium, tmp_path):
    chromium.problems.clear()
    name = '<img src=x onerror="window.pwned=1"> %{x} "]\' | <b>bold</b>'
    for seed in range(2):
        for variant in (name, "__proto__"):
            told = {"name": "<i>s</i>", "variant": variant, "baseline": name, "block": seed, "order": 0, "seed": seed}
            folder = tmp_path / f"runs{seed}" / f"{len(variant)} <b>"
            made.row(folder, "gqa", seed=seed, sweep=told, al_s=0.5 + seed, eval_loss=3.0, changes={"data": name})
            made.curves(folder, steps=3)
    told = {"name": "<i>s</i>", "variant": name, "baseline": name, "block": 3, "order": 0, "seed": 3}
    made.row(tmp_path / "failed", "gqa", outcome="crash", sweep=told)
    (tmp_path / "failed" / "log.txt").write_text(f"{name}\n")
    assert command.main([str(tmp_path), f"--out={tmp_path / 'report'}"]) == 0
    chromium.open(tmp_path / "report" / "index.html")
    chromium.run("for (const button of document.querySelectorAll('.open-row')) button.click()")
    chromium.run("for (const each of document.querySelectorAll('details')) each.open = true")
    chromium.run("document.querySelector('[data-sort=variant]').click()")
    hash = chromium.run("location.hash")
    chromium.open(tmp_path / "report" / "index.html", hash)
    assert chromium.run("document.querySelectorAll('tr.opened').length") == 3
    assert (
        chromium.run("window.pwned ?? null") is None
        and chromium.run("document.querySelector('main img, main i:not(.legend i)')") is None
    )
    assert chromium.problems == []


def test_on_paper_nothing_is_cut(page):
    """As a browser lays it out for A4 upright; every column and every chart lies on the page."""
    page.look(703, 1000, dark=True)
    page.run("document.querySelector('tr[data-variant=mla] .open-row').click()")
    page.run("dispatchEvent(new Event('beforeprint'))")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.call("Emulation.setEmulatedMedia", media="print", features=dark)
    beyond = """[...document.querySelectorAll('main *')].filter((each) => each.checkVisibility() &&
        each.getBoundingClientRect().right > 704).map((each) => each.outerHTML.slice(0, 80))"""
    assert page.run(beyond) == [] and page.run("document.documentElement.scrollWidth") <= 703
    assert page.run("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    assert page.run("theme()") == "light"
    for dark_system in (False, True):  # the system's scheme changes while the paper is laid out
        page.look(703, 1000, dark=dark_system)
        page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert page.run("theme()") == "light"
    page.run("dispatchEvent(new Event('afterprint'))")
    page.call("Emulation.setEmulatedMedia", media="", features=dark)
    assert page.run("theme()") == "dark" and page.run("document.querySelector('#pareto').layout.width ?? null") is None


def test_on_a_telephone_labels_do_not_meet_and_tables_say_that_they_scroll(page, report):
    page.look(390, 844)
    page.open(report)
    labels = (
        "[...document.querySelectorAll('#pareto .textpoint text')].map((each) => each.getBoundingClientRect().toJSON())"
    )
    labels = page.run(labels)
    assert labels
    for i, a in enumerate(labels):
        assert a["left"] >= 0 and a["right"] <= 390
        for b in labels[:i]:
            assert (
                a["right"] <= b["left"] or b["right"] <= a["left"] or a["bottom"] <= b["top"] or b["bottom"] <= a["top"]
            )
    frame = "document.querySelector('#table-tables .frame')"
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run(f"{frame}.className") == "frame more-right"
    page.run(f"{frame}.firstElementChild.scrollLeft = 1e6")
    page.run("new Promise((done) => setTimeout(done, 200))")
    assert page.run(f"{frame}.className") == "frame more-left"
    for id_ in ("radar", "curves-chart"):
        assert page.run(f"document.querySelectorAll('#{id_} .legend').length") == 0, "plotly.js draws no legend"
        assert page.run(f"byId('{id_}').nextElementSibling.querySelectorAll('button').length") == 3
    page.run("byId('radar').nextElementSibling.querySelector('button').click()")
    assert page.run("byId('radar').data[0].visible") is False


def test_charts_stand_clear_of_what_follows_and_the_first_column_keeps_its_lines(page):
    below = "byId('pareto-text').getBoundingClientRect().top"
    assert page.run(f"{below} - document.querySelector('#pareto .xtitle').getBoundingClientRect().bottom") > 8
    cell = "getComputedStyle(document.querySelector('#table-tables tbody th'))"
    assert page.run(f"{cell}.position") == "sticky" and page.run(f"{cell}.borderRightWidth") == "1px"
    assert page.run("getComputedStyle(document.querySelector('table')).borderCollapse") == "separate"


def test_claims_that_can_be_tested_come_first_and_the_rest_is_folded(page):
    first = page.run("[...document.querySelectorAll('#claims-text > .frame tbody th')].map((each) => each.innerText)")
    folded = page.run("document.querySelectorAll('#claims-text details tbody tr').length")
    assert "mqa-memory" in first and "moe-flops" not in first and folded + len(first) == page.run("BOARD.claims.length")
    assert page.run("document.querySelector('#claims-text details').open") is False


def test_failures_say_why_and_running_runs_are_none(chromium, tmp_path):
    chromium.problems.clear()
    made.row(tmp_path / "ok", al_s=0.5)
    for outcome in ("nan", "oom", "crash", "timeout", "invalid", "interrupted"):
        lost = {"devices": {}} if outcome == "nan" else {}  # a run that failed before it knew its device
        made.row(tmp_path / outcome, outcome=outcome, **lost)
        (tmp_path / outcome / "log.txt").write_text(f"step 1/9\n{outcome} because of reasons\n")
    for name, age in (("running", 0), ("killed", 86400)):
        (tmp_path / name).mkdir()
        for file, text in (("config.json", "{}"), ("log.txt", "step 3/9  loss 2.5\n")):
            (tmp_path / name / file).write_text(text)
            os.utime(tmp_path / name / file, (time.time() - age,) * 2)
    assert command.main([str(tmp_path), f"--out={tmp_path / 'report'}"]) == 0
    chromium.open(tmp_path / "report" / "index.html")
    text = chromium.run("byId('failures-text').innerText")
    failed, _, rest = text.partition("Running (1)")
    running, _, stopped = rest.partition("Stopped")
    assert failed.startswith("Failed (5)") and failed.count("because of reasons") == 5
    assert "step 3/9 loss 2.5" in running and "interrupted because" in stopped and "killed" in stopped
    assert "6 failed, 1 running" in chromium.run("byId('summary').innerText")
    chromium.run("for (const each of document.querySelectorAll('#failures-text details')) each.open = true")
    chromium.run("new Promise((done) => setTimeout(done, 100))")
    assert chromium.run("byId('failures-text').innerText").count("The command that runs it again") == 6
    assert chromium.problems == []


def test_a_longer_training_answers_nothing_and_is_marked(chromium, tmp_path):
    """Best on both axes, as it was trained five times as long: out of answers, and a cross in the plot."""
    chromium.problems.clear()
    starved = conditions.row(None) | {"starved": True, "reasons": ["84% of the CPU time went to others"]}
    for seed in range(2):
        for mixer, al_s, loss, steps in (("gqa", 0.5, 6.5, 40), ("mla", 0.6, 6.4, 40), ("mqa", 0.1, 2.0, 200)):
            told = {"name": "x", "variant": mixer, "baseline": "gqa", "block": seed, "order": 0, "seed": seed}
            values = {"al_s": al_s + seed / 100, "eval_loss": loss + seed / 100}
            met = starved if mixer == "mla" and seed else None
            changes = {"train.steps": steps}
            folder = tmp_path / f"{mixer}{seed}"
            made.row(folder, mixer, seed=seed, sweep=told, changes=changes, conditions=met, **values)
    assert command.main([str(tmp_path), f"--out={tmp_path / 'report'}"]) == 0
    chromium.open(tmp_path / "report" / "index.html")
    for query in ("least al_s with eval_loss <= 6.5", "least eval_loss", "least al_s with eval_loss <= +1 %"):
        fit = ask(chromium, query)
        out = chromium.run("byId('query-result').querySelector('details').textContent")
        assert "mqa" not in fit and "number of tokens" in out, query
    names = chromium.run("byId('pareto').data.map((trace) => trace.meta)")
    assert [name for name in names if "not compared" in name] == ["mqa (not compared)"]
    assert "not compared: another number of tokens" in chromium.run("byId('pareto-text').innerText")
    mla = "document.querySelector('tr[data-variant=mla]')"
    assert "1 of 2 starved" in chromium.run(f"{mla}.querySelector('td[data-key=al_s]').innerText")
    assert "84%" in chromium.run(f"{mla}.querySelector('.outcomes small').title")
    assert chromium.problems == []
