"""Runs on pictures in a real headless Chromium: levels, samples side by side, one place, keyboard, phone, paper."""

import numpy as np
import pytest

from efficientllm.report import __main__ as command
from report import browser, made

pytestmark = [
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on this machine"),
    pytest.mark.xdist_group("picture_page"),  # they share one report and one browser
]
NAMES = ("mha", "mqa", "<b>mla</b>")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for seed in range(2):
        for index, name in enumerate(NAMES):
            told = {"name": "dit", "variant": name, "baseline": "mha", "block": seed, "order": index, "seed": seed}
            run = folder / f"{seed}{index}"
            levels = {key: value * (1 + index / 10 + seed / 1000) for key, value in made.LEVELS.items()}
            values = {"eval_loss": 1.0 + index / 10 + seed / 1000, "fd_own": 5.0 + index, **levels}
            made.image_row(run, name, seed, sweep=told, **values)
            made.samples(run, seed=10 * seed + index, classes="AB<\"'F")
    made.row(folder / "text", eval_loss=4.0)
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


def choose(page, id_, value):
    page.run(f"byId('{id_}').value = {value!r}; byId('{id_}').dispatchEvent(new Event('change'))")


def pixels(page, selector):
    """The pixels of an image in the page, drawn at its own size, `[height, width, 4]`."""
    script = f"""(async () => {{ const image = document.querySelector({selector!r}); await image.decode();
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
        return [canvas.height, canvas.width, ...context.getImageData(0, 0, canvas.width, canvas.height).data]; }})()"""
    height, width, *values = page.run(script)
    return np.array(values, np.uint8).reshape(height, width, 4)


IMAGES = "[...document.querySelectorAll('#samples-pictures img')]"


def test_every_variant_has_its_grid_with_an_alternative_text(page):
    alts = page.run(f"{IMAGES}.map((image) => image.alt)")
    assert alts == [f"6 samples of {name}, dit 0, classes A, B, <, \", ', F" for name in NAMES]
    assert page.run(
        "[...document.querySelectorAll('#samples-pictures figcaption b')].map((each) => each.innerText)"
    ) == [*NAMES]
    assert "Same noise and same class at the same place" in page.run("byId('samples-hint').innerText")
    assert "12 pictures lie inside this file" in page.run("byId('samples-hint').innerText")
    assert "FD (own) 5" in page.run("document.querySelector('#samples-pictures figcaption').innerText")
    drawn = np.random.default_rng(1).integers(0, 256, (2, 6, 16, 16, 3), dtype=np.uint8)[0]
    shown = pixels(page, "figure[data-variant=mqa] img")
    assert np.array_equal(shown[18:34, 18:34, :3], drawn[4])
    assert page.run(f"{IMAGES}.every((image) => image.src.startsWith('data:image/'))")


def test_one_place_of_every_grid_and_its_nearest_training_picture(page):
    choose(page, "samples-place", "3")
    assert page.run("byId('samples-place').selectedOptions[0].innerText") == '4: "'
    page.run("byId('samples-nearest').click()")
    alts = page.run(f"{IMAGES}.map((image) => image.alt)")
    assert len(alts) == 6 and alts[0] == 'Sample 4: " of mha, dit 0'
    assert alts[1] == "Training pictures nearest to the sample of mha, dit 0: distance 3 (held-out pictures: 30.5)"
    box = """(() => { const box = document.querySelector("#samples-pictures .place"), image = box.firstChild;
        const [outer, inner] = [box, image].map((each) => each.getBoundingClientRect());
        const pixels = (length) => (length * 52) / inner.width;
        return [outer.width, outer.height, outer.left - inner.left, outer.top - inner.top].map(pixels); })()"""
    assert page.run(box) == pytest.approx([16, 16, 0, 18], abs=0.1), "the cut-out is the fourth of six pictures"
    assert "copies" in page.run("byId('samples-hint').innerText")


def test_blocks_and_rankings_are_chosen_and_kept_in_the_address(page, report):
    choose(page, "samples-block", "dit 1")
    choose(page, "samples-place", "1")
    choose(page, "levels-show", "ratio")
    hash = page.run("location.hash")
    assert page.run(f"{IMAGES}[0].alt") == "Sample 2: B of mha, dit 1"
    page.open(report, hash)
    assert (
        page.run(f"{IMAGES}[0].alt") == "Sample 2: B of mha, dit 1" and page.run("byId('levels-show').value") == "ratio"
    )
    groups = page.run("[...byId('samples-group').options].map((each) => each.value)")
    assert len(groups) == 1 and "flow of pixels" in groups[0], "rows of text have no samples"


def test_a_picture_is_enlarged_by_the_keyboard(page):
    page.run("document.querySelector('.enlarge').focus()")
    width = "document.querySelector('#samples-pictures img').getBoundingClientRect().width"
    small = page.run(width)
    page.press("Enter", text="\r")
    assert page.run("document.querySelector('.enlarge').getAttribute('aria-pressed')") == "true"
    assert page.run(width) > 2 * small
    page.press("Enter", text="\r")
    assert page.run(width) == small


def test_levels_are_lines_with_a_table_beside_them(page):
    assert page.run("byId('levels-chart').data.map((trace) => trace.name)") == [*NAMES]
    loss = page.run("byId('levels-chart').data[1].y")
    assert loss == pytest.approx([1.1 * (1 + level / 10) for level in range(1, 8)], rel=1e-3)
    choose(page, "levels-show", "ratio")
    assert page.run("byId('levels-chart').data[0].y") == [1] * 7
    assert page.run("byId('levels-chart').data[1].y") == pytest.approx([1.1] * 7, rel=1e-3)
    heads = page.run("[...document.querySelectorAll('#levels-text thead th')].map((each) => each.innerText)")
    assert heads == ["variant", "all levels", *(f"{level}/8" for level in range(1, 8))]
    assert page.run("document.querySelectorAll('#levels-text tbody tr').length") == 3
    assert "×1.1" in page.run("document.querySelectorAll('#levels-text tbody tr')[1].innerText")


def test_other_noise_is_said_and_no_place_is_offered(chromium, tmp_path):
    chromium.problems.clear()
    for name, how in (("mha", "euler in 28 steps"), ("gqa", "ddim in 50 steps")):
        made.image_row(tmp_path / name, name)
        made.samples(tmp_path / name, how_=how)
    assert command.main([str(tmp_path), f"--out={tmp_path / 'report'}"]) == 0
    chromium.open(tmp_path / "report" / "index.html")
    assert "differ in how they were drawn" in chromium.run("byId('samples-hint').innerText")
    assert chromium.run("byId('samples-place').options.length") == 1
    assert chromium.run("byId('levels').hidden && document.querySelector('nav a[href=\"#levels\"]').hidden")
    assert chromium.problems == []


def test_prompts_name_the_places_and_the_base_is_beside_them(chromium, tmp_path):
    chromium.problems.clear()
    prompts = [f"a <b>fox</b>, {place}" for place in range(6)]
    for name in ("lora", "loha"):
        made.image_row(tmp_path / name, name)
        made.samples(tmp_path / name, classes=[""] * 6, base=True, prompts_=prompts)
    assert command.main([str(tmp_path), f"--out={tmp_path / 'report'}"]) == 0
    chromium.open(tmp_path / "report" / "index.html")
    assert "Same noise and same prompt at the same place" in chromium.run("byId('samples-hint').innerText")
    choose(chromium, "samples-place", "2")
    assert chromium.run("byId('samples-place').selectedOptions[0].innerText") == f"3: {prompts[2]}"
    before, after = chromium.run(f"{IMAGES}.slice(0, 2).map((image) => image.alt)")
    assert before.startswith("Sample of the model before tuning, of the same prompt and noise")
    assert after.startswith(f"Sample 3: {prompts[2]} of")
    assert chromium.problems == []


def test_a_row_opens_to_its_samples(page):
    page.run("document.querySelector('tr[data-variant=mqa] .open-row').click()")
    opened = "document.querySelector('tr.opened')"
    assert page.run(f"{opened}.querySelector('img').alt").startswith("Samples of dit 0")
    assert "samples/grid.png" in page.run(f"{opened}.querySelector('.files').innerText")


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(page, report, width):
    page.look(width, 844)
    page.open(report)
    page.run("byId('samples-nearest').click()")
    assert page.run("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('#samples *, #levels .chart')].map((each) => each.getBoundingClientRect())"
    assert page.run(f"{boxes}.filter((box) => box.right > innerWidth).length") == 0
    assert page.run(f"{IMAGES}.every((image) => image.getBoundingClientRect().width > 60)")
    unnamed = """[...document.querySelectorAll('#samples button, #samples select, #levels select')].filter((each) =>
        !(each.getAttribute('aria-label') || (each.labels && each.labels.length))).length"""
    assert page.run(unnamed) == 0


def test_on_paper_pictures_are_not_cut(page):
    page.look(703, 1000)
    page.run("dispatchEvent(new Event('beforeprint'))")
    page.call("Emulation.setEmulatedMedia", media="print")
    beyond = (
        "[...document.querySelectorAll('#samples *')].filter((each) => each.getBoundingClientRect().right > 704).length"
    )
    assert page.run(beyond) == 0 and page.run(f"{IMAGES}[0].getBoundingClientRect().width") > 100
    page.run("dispatchEvent(new Event('afterprint'))")
    page.call("Emulation.setEmulatedMedia", media="")
