"""Pictures in a report: read as they were drawn, encoded alike within a budget, and never trusted."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from efficientllm.report import find_rows, image_figures, leaderboard, rows, sampled_pictures, write_files
from report import made

pytestmark = pytest.mark.quick


def read(folder):
    return rows.read_rows(find_rows.find_files([folder])[0])


def decoded(uri):
    kind, _, data = uri.partition(";base64,")
    assert kind.startswith("data:image/")
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_small_pictures_are_embedded_as_they_were_drawn(tmp_path):
    file = made.image_row(tmp_path / "a")
    drawn = made.samples(tmp_path / "a")
    embedded = sampled_pictures.embed_pictures(read(tmp_path))
    picture = embedded["runs"][str(file)]
    for name, pictures in zip(("grid", "nearest"), drawn, strict=True):
        kind, image = decoded(picture[name])
        assert kind == "data:image/png" and image.size == (picture["width"], picture["height"]) == (52, 34)
        assert np.array_equal(np.asarray(image)[18:, :16], pictures[3])
    assert picture["cell"] == [16, 16] and picture["classes"] == list("ABCDEF") and picture["columns"] == 3
    assert (picture["distances"], picture["unseen"], picture["of"]) == ([0, 1, 2, 3, 4, 5], 30.5, 1297)
    assert embedded["how"].startswith("2 pictures lie inside this file") and "as they were drawn" in embedded["how"]


def test_samples_of_a_tuned_model_have_those_of_its_base_beside_them(tmp_path):
    files = [made.image_row(tmp_path / name) for name in ("tuned", "plain", "other_size")]
    drawn = made.samples(tmp_path / "tuned", base=True)
    made.samples(tmp_path / "plain")
    made.samples(tmp_path / "other_size")
    Image.new("RGB", (10, 10)).save(tmp_path / "other_size" / "samples" / "base.png")
    runs = sampled_pictures.embed_pictures(read(tmp_path))["runs"]
    _, image = decoded(runs[str(files[0])]["base"])
    assert np.array_equal(np.asarray(image)[18:, :16], drawn[0][3, ::-1])
    assert runs[str(files[1])]["base"] is None and runs[str(files[2])]["base"] is None


PROMPTS = [f"a fox, {place}" for place in range(6)]


@pytest.mark.parametrize("prompts, expected", [(PROMPTS, PROMPTS), (PROMPTS[:2], []), ([1] * 6, []), ("abcdef", [])])
def test_places_have_their_prompts(tmp_path, prompts, expected):
    file = made.image_row(tmp_path / "a")
    made.samples(tmp_path / "a", prompts_=prompts)
    assert sampled_pictures.embed_pictures(read(tmp_path))["runs"][str(file)]["prompts"] == expected


def test_large_pictures_are_scaled_alike_until_they_fit(tmp_path):
    for name, side in (("a", 64), ("b", 16)):
        made.image_row(tmp_path / name)
        made.samples(tmp_path / name, side=side, border=0, nearest=False, count=4)
    embedded = sampled_pictures.embed_pictures(read(tmp_path), budget=12_000)
    kinds = [decoded(picture["grid"]) for picture in embedded["runs"].values()]
    assert {kind for kind, _ in kinds} == {"data:image/jpeg"}
    sizes = sorted(image.size[0] for _, image in kinds)
    assert sizes[0] == 32 and 32 < sizes[1] < 128 and f"scaled to {sizes[1]} pixels" in embedded["how"]
    total = sum(len(base64.b64decode(picture["grid"].partition(",")[2])) for picture in embedded["runs"].values())
    assert total <= 12_000
    widths = sorted(picture["width"] for picture in embedded["runs"].values())
    assert widths == [32, 128], "the size as drawn, which places are counted by"


@pytest.mark.slow
def test_a_page_of_twelve_variants_stays_below_five_megabytes(tmp_path):
    for index in range(12):
        made.image_row(tmp_path / str(index), f"mixer{index}", **made.LEVELS)
        made.samples(tmp_path / str(index), seed=index, side=256, count=16, classes="A" * 16)
    runs = read(tmp_path)
    embedded = sampled_pictures.embed_pictures(runs)
    uris = [picture[name] for picture in embedded["runs"].values() for name in ("grid", "nearest")]
    assert len(uris) == 24 and None not in uris, "noise, which is the hardest to encode"
    folder = tmp_path / "report"
    (folder / "figures").mkdir(parents=True)
    write_files.write_report(leaderboard.build_leaderboard(runs), runs, folder)
    assert (folder / "index.html").stat().st_size < 5e6


BAD = {
    "no picture": lambda folder: (folder / "grid.png").write_bytes(b"not a picture"),
    "cut off": lambda folder: (folder / "grid.png").write_bytes((folder / "grid.png").read_bytes()[:200]),
    "a page": lambda folder: (folder / "grid.png").write_text("<svg onload='window.pwned=1'></svg>"),
    "a folder": lambda folder: ((folder / "grid.png").unlink(), (folder / "grid.png").mkdir()),
    "huge": lambda folder: Image.new("1", (9000, 9000)).save(folder / "grid.png"),
}


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD)
def test_a_damaged_picture_is_left_out(tmp_path, damage):
    made.image_row(tmp_path / "a")
    made.samples(tmp_path / "a")
    damage(tmp_path / "a" / "samples")
    assert sampled_pictures.embed_pictures(read(tmp_path)) == {"runs": {}, "how": ""}


DESCRIBED = {
    "other size": {"columns_": 2},
    "words": {"count_": "6"},
    "flag": {"border_": True},
    "negative": {"width_": -16},
    "none": {"count_": 0},
    "too many": {"count_": 10**9},
    "classes of numbers": {"classes_": [1, 2, 3, 4, 5, 6]},
    "few classes": {"classes_": ["A"]},
}


@pytest.mark.parametrize("described", DESCRIBED.values(), ids=DESCRIBED)
def test_what_does_not_describe_the_grid_is_left_out(tmp_path, described):
    file = made.image_row(tmp_path / "a")
    made.samples(tmp_path / "a", **described)
    picture = sampled_pictures.embed_pictures(read(tmp_path))["runs"][str(file)]
    assert picture.keys() == {"grid", "nearest", "base", "width", "height"} and picture["grid"]


@pytest.mark.parametrize("nearest", [[], {"distances": [1]}, {"distances": ["<b>"] * 6}, None], ids=str)
def test_distances_are_numbers_or_absent(tmp_path, nearest):
    file = made.image_row(tmp_path / "a")
    made.samples(tmp_path / "a", nearest=True)
    described = tmp_path / "a" / "samples" / "samples.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"nearest": nearest}))
    picture = sampled_pictures.embed_pictures(read(tmp_path))["runs"][str(file)]
    assert "distances" not in picture and picture["classes"] == list("ABCDEF")


def test_pictures_of_another_size_are_not_shown_beside_the_samples(tmp_path):
    file = made.image_row(tmp_path / "a")
    made.samples(tmp_path / "a")
    Image.new("RGB", (10, 10)).save(tmp_path / "a" / "samples" / "nearest.png")
    picture = sampled_pictures.embed_pictures(read(tmp_path))["runs"][str(file)]
    assert picture["grid"] and picture["nearest"] is None


def test_rows_of_text_have_no_pictures(tmp_path):
    made.row(tmp_path / "a", eval_loss=1.0)
    made.samples(tmp_path / "a")
    assert sampled_pictures.embed_pictures(read(tmp_path))["runs"] == {}


def test_markdown_shows_levels_and_samples_as_figures(tmp_path):
    for mixer in ("mha", "gqa"):
        made.image_row(tmp_path / mixer, mixer, **made.LEVELS)
        made.samples(tmp_path / mixer)
    folder = tmp_path / "report"
    (folder / "figures").mkdir(parents=True)
    runs = read(tmp_path)
    write_files.write_report(leaderboard.build_leaderboard(runs), runs, folder)
    text = (folder / "report.md").read_text()
    assert "![levels](figures/1_levels.png)" in text and "![samples](figures/1_samples.png)" in text
    with Image.open(folder / "figures" / "1_samples.png") as figure:
        assert figure.width > 100


@pytest.mark.parametrize("base", [True, False])
def test_figures_show_the_model_before_tuning_once(tmp_path, base):
    for adapter in ("loha", "lora"):
        made.image_row(tmp_path / adapter, adapter)
        made.samples(tmp_path / adapter, base=base)
    rows = read(tmp_path)
    (group,) = leaderboard.build_leaderboard(rows)["groups"]
    figure = image_figures.draw_samples(group, {str(row.path): row for row in rows})
    titles = [panel.get_title() for panel in figure.axes if panel.get_title()]
    assert len(titles) == 2 + base and (titles[0] == "before tuning") is base
    shown = np.asarray(figure.axes[0].images[0].get_array())[:16, :16]
    drawn = np.asarray(Image.open(tmp_path / "lora" / "samples" / ("base.png" if base else "grid.png")))[:16, :16]
    assert np.array_equal(shown, drawn)
