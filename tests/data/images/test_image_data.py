"""What training and evaluation see of pictures: each once an epoch, split by content, shared, resumable."""

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from efficientllm import data
from efficientllm.data.corpus import Corpus
from efficientllm.data.images import ImageData, ImageSource, Picture, read_source
from efficientllm.data.images.latents import to_float
from efficientllm.data.rows.images import is_mirrored
from efficientllm.errors import UserError
from efficientllm.registry import register

pytestmark = pytest.mark.quick

KEYS = {"images": np.float32, "labels": np.int32, "weights": np.float32, "identity": np.uint32}


@register("data", "eager_pictures")
@dataclasses.dataclass(frozen=True)
class Eager(ImageSource):
    """Arrays, without a key."""

    size: int = 4
    channels: int = 1
    count: int = 40
    held_out: float = 0.25

    def pictures(self):
        for index in range(self.count):
            yield Picture(np.full((4, 4), index, np.uint8), index % 4, caption=f"number {index}")


@register("data", "odd_pictures")
@dataclasses.dataclass(frozen=True)
class Odd(ImageSource):
    what: str = ""
    size: int = 4

    classes = ("a", "b")

    def pictures(self):
        gray = [np.full((4, 4), level, np.uint8) for level in range(3)]
        yield Picture(gray[0], "a")
        yield {
            "tuple": (gray[1], "a"),
            "array": Picture(gray[1].astype(float), "a"),
            "no label": Picture(gray[1]),
            "beyond": Picture(gray[1], "c"),
            "number": Picture(gray[1], 1),
            "list": Picture(gray[1], ["a"]),
        }[self.what]


@register("data", "stranger_pictures")
class Stranger:
    modality = "images"


@pytest.fixture
def opened():
    """Opens training iterators and closes them afterwards."""
    iterators = []

    def train(spec, batch_size=8, seed=0, **options):
        options = {name: options.pop(name) for name in ("process_index", "process_count") if name in options} | options
        iterators.append(ImageData(spec).train(batch_size, seed, **options))
        return iterators[-1]

    yield train
    for iterator in iterators:
        iterator.close()


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(left, right):
    return all(np.array_equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in KEYS)


def joined(shares):
    return [{key: np.concatenate([share[key] for share in step]) for key in KEYS} for step in zip(*shares, strict=True)]


def test_a_batch_has_the_promised_arrays(spec, opened):
    read = ImageData(spec)
    assert read.image_shape == (8, 8, 3) and read.num_classes == 3 and read.class_names == ["ant", "bee", "cat"]
    for batch in (next(opened(spec)), next(iter(read.held_out(8)))):
        assert {key: value.dtype for key, value in batch.items()} == KEYS
        assert batch["images"].shape == (8, 8, 8, 3) and all(
            batch[key].shape == (8,) for key in KEYS if key != "images"
        )
        assert batch["images"].min() >= -1 and batch["images"].max() <= 1


def test_rows_are_the_decoded_files_with_their_labels(folder, opened):
    """The oracle is Pillow: these pictures are resized once."""
    expected = {}
    for path in folder.glob("*/*.png"):
        image = Image.open(path)
        width = round(image.width * 8 / 12)
        image = image.resize((width, 8), Image.Resampling.BICUBIC)
        left = (width - 8) // 2
        pixels = np.asarray(image.crop((left, 0, left + 8, 8)))
        expected[pixels.tobytes()] = ("ant", "bee", "cat").index(path.parent.name), path
    read = ImageData(f"images(path={str(folder)!r}, size=8, flip=False, held_out=0.2)")
    batches = [*take(opened(read.spec), 10), *read.held_out(8)]
    seen = set()
    for batch in batches:
        for pixels, label, weight, identity in zip(*(batch[key] for key in KEYS), strict=True):
            if weight:
                number, path = expected[np.round((pixels + 1) * 127.5).astype(np.uint8).tobytes()]
                digest = hashlib.sha256(path.read_bytes()).digest()
                assert number == label and identity == int.from_bytes(digest[4:8], "big")
                seen.add(path)
    assert len(seen) == 48


def test_uint8_becomes_minus_one_to_one():
    np.testing.assert_array_equal(to_float(np.array([0, 255], np.uint8)), np.array([-1, 1], np.float32))
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(to_float(levels), levels / 127.5 - 1, atol=1e-7)
    assert to_float(levels).dtype == np.float32


def test_every_picture_comes_once_an_epoch_in_a_new_order(opened):
    spec = "eager_pictures(held_out=0.0)"
    batches = take(opened(spec, 5), 24)
    epochs = [batches[start : start + 8] for start in (0, 8, 16)]
    orders = [np.concatenate([batch["identity"] for batch in epoch]).tolist() for epoch in epochs]
    assert all(len(set(order)) == 40 for order in orders) and len({tuple(order) for order in orders}) == 3


def test_a_batch_may_be_larger_than_the_data(opened):
    batch = next(opened("eager_pictures(held_out=0.0)", 100))
    assert batch["images"].shape == (100, 4, 4, 1) and len(set(batch["identity"][:40].tolist())) == 40


@pytest.fixture(params=["cached", "on the fly"])
def storage(request, monkeypatch):
    if request.param == "on the fly":
        monkeypatch.setattr(read_source, "CACHED_BYTES", 1000)
    return request.param


def test_processes_share_the_batch_of_one(spec, opened, storage):
    whole = take(opened(spec, 8, seed=3), 10)
    for count in (2, 8):
        shares = [take(opened(spec, 8, seed=3, process_index=i, process_count=count), 10) for i in range(count)]
        assert same(whole, joined(shares))
    assert (ImageData(spec).pictures.pixels is None) == (storage == "on the fly")


def test_more_processes_than_files(tmp_path, opened):
    for name in "ab":
        Image.effect_noise((8, 8), ord(name)).save(tmp_path / f"{name}.png")
    spec = f"images(path={str(tmp_path)!r}, size=8, labels='none')"
    shares = [take(opened(spec, 8, process_index=index, process_count=8), 3) for index in range(8)]
    assert same(take(opened(spec, 8), 3), joined(shares))
    held_out = [list(ImageData(spec).held_out(8, index, 8)) for index in range(8)]
    assert sum(batch["weights"].sum() for share in held_out for batch in share) == 1


def test_pictures_decoded_on_the_fly_are_those_of_the_cache(spec, opened, monkeypatch):
    cached, held_out, facts = take(opened(spec), 10), list(ImageData(spec).held_out(8)), ImageData(spec).describe()
    monkeypatch.setenv("EFFICIENTLLM_CACHE", os.environ["EFFICIENTLLM_CACHE"] + "2")
    monkeypatch.setattr(read_source, "CACHED_BYTES", 1000)
    read = ImageData(spec)
    assert same(take(opened(spec), 10), cached) and same(list(read.held_out(8)), held_out)
    assert read.pictures.pixels is None and read.describe() == facts


def test_arrays_are_cached_however_many(monkeypatch):
    monkeypatch.setattr(read_source, "CACHED_BYTES", 100)
    assert ImageData("eager_pictures()").pictures.pixels is not None


def test_the_seed_decides_order_and_flips(spec, opened):
    assert same(take(opened(spec, seed=5), 8), take(opened(spec, seed=5), 8))
    assert not same(take(opened(spec, seed=5), 8), take(opened(spec, seed=6), 8))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_state_through_json_resumes_at_the_same_batch(spec, opened, storage, processes):
    share = {"process_index": processes - 1, "process_count": processes}
    iterator, states, batches = opened(spec, **share), [], []
    for _ in range(20):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for start in (0, 1, 3, 4, 5, 15):  # an epoch is less than five batches
        resumed = opened(spec, **share)
        take(resumed, 2)
        resumed.set_state(json.loads(states[start]))
        assert same(take(resumed, 5), batches[start : start + 5]), start


def test_half_of_the_training_pictures_are_mirrored_and_no_held_out_one(folder, opened):
    specs = [f"images(path={str(folder)!r}, size=8, held_out=0.2, flip={flip})" for flip in (True, False)]
    flipped, plain = (take(opened(spec), 40) for spec in specs)
    mirrored = 0
    for left, right in zip(flipped, plain, strict=True):
        assert np.array_equal(left["identity"], right["identity"])
        for a, b in zip(left["images"], right["images"], strict=True):
            assert np.array_equal(a, b) or np.array_equal(a, b[:, ::-1])
            mirrored += not np.array_equal(a, b)
    assert abs(mirrored - 160) < 4 * np.sqrt(320 / 4)
    assert same(*(list(ImageData(spec).held_out(8)) for spec in specs))
    assert 400 < sum(is_mirrored(0, place) for place in range(1000)) < 600


@pytest.mark.parametrize("batch_size, processes", [(4, 1), (4, 2), (3, 3), (64, 4)])
def test_held_out_pictures_come_once_and_alike_for_every_process(spec, batch_size, processes):
    read = ImageData(spec)
    views = [read.held_out(batch_size, index, processes) for index in range(processes)]
    shares = [list(view) for view in views]
    assert {len(share) for share in shares} == {len(view) for view in views} == {len(views[0])}
    assert same(joined(shares), list(read.held_out(batch_size)))
    rows = [(batch["identity"], batch["weights"]) for share in shares for batch in share]
    identity, weights = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
    count = read.describe()["held_out_images"]
    assert weights.sum() == count == len(set(identity[weights > 0].tolist())) and set(weights.tolist()) <= {0, 1}
    assert same(shares[0], list(views[0]))


def test_limit_takes_the_first_batches(spec):
    read = ImageData(spec)
    whole, limited = read.held_out(2), read.held_out(2, limit=2)
    assert len(limited) == 2 < len(whole) and same(list(limited), list(whole)[:2])
    assert len(read.held_out(2, limit=1000)) == len(whole)


def test_the_first_held_out_pictures_are_of_several_classes():
    read = ImageData("glyphs(held_out=0.3)")
    (batch,) = read.held_out(64, limit=1)
    assert len(set(batch["labels"].tolist())) > 25


def test_sides_are_apart_and_complete_and_decided_by_content(folder, spec):
    read = ImageData(spec)
    sides = {side: set(read.pictures.contents[read.indices(side)].tolist()) for side in ("train", "held_out")}
    assert not sides["train"] & sides["held_out"] and len(sides["train"] | sides["held_out"]) == 48
    assert 0.05 < len(sides["held_out"]) / 48 < 0.4
    for path in sorted(folder.glob("*/*.png")):  # other names, the same contents
        path.rename(path.with_name("x" + path.name))
    again = ImageData(spec)
    assert {side: set(again.pictures.contents[again.indices(side)].tolist()) for side in sides} == sides
    assert (
        ImageData(spec.replace("size=8", "size=4")).pictures.is_held_out.tolist() == again.pictures.is_held_out.tolist()
    )


def test_a_repeated_picture_is_never_on_both_sides(folder, spec):
    for path in list(folder.glob("*/*.png")):
        path.with_name("copy" + path.name).write_bytes(path.read_bytes())
    read = ImageData(spec)
    contents = [read.pictures.contents[read.indices(side)] for side in ("train", "held_out")]
    assert not np.intersect1d(*contents).size and sum(map(len, contents)) == 96
    assert read.notes()[1:] == ["48 of the pictures repeat others"]


def test_describe_counts_what_is_there(spec):
    read = ImageData(spec)
    facts = read.describe()
    assert facts["source"] == spec and not facts["sampled"] and len(facts["fingerprint"]) == 64
    assert facts["train_images"] + facts["held_out_images"] == 48 and facts["classes"] == facts["train_classes"] == 3
    labels = read.pictures.labels[read.indices("held_out")]
    assert facts["held_out_images"] == len(labels) and facts["held_out_classes"] == len(set(labels.tolist()))
    assert (facts["size"], facts["channels"]) == (8, 3)
    assert json.loads(json.dumps(facts)) == facts
    assert read.notes() == [f"48 pictures of 8 x 8 in 3 classes, {len(labels)} of them held out"]


def test_the_fingerprint_follows_content_labels_size_and_split(folder, spec):
    def fingerprint(spec):
        return ImageData(spec).describe()["fingerprint"]

    first = fingerprint(spec)
    assert fingerprint(spec) == first and fingerprint(spec.replace("held_out=0.2", "held_out=0.2, flip=False")) == first
    others = {fingerprint(spec.replace(*change)) for change in (("size=8", "size=4"), ("0.2", "0.5"), ("0.2", "0.0"))}
    others.add(fingerprint(spec.replace("size=8", "size=8, labels='none'")))
    (folder / "ant" / "00.png").rename(folder / "bee" / "00.png")
    others.add(fingerprint(spec))
    Image.new("RGB", (9, 9)).save(folder / "bee" / "00.png")
    others.add(fingerprint(spec))
    assert len(others | {first}) == 7


def test_captions_come_in_the_order_of_the_side():
    read = ImageData("eager_pictures()")
    for side in ("train", "held_out"):
        numbers = [int(read.pictures[index].max()) for index in read.indices(side)]
        assert read.captions(side) == [f"number {number}" for number in numbers]
    plain = ImageData("glyphs(letters='ab')")
    assert set(plain.captions("train")) == {"a", "b"}, "names of classes where there are no captions"
    assert len(plain.captions("train")) == len(plain.indices("train"))


def test_pictures_are_read_once(spec, folder, opened, monkeypatch):
    first = take(opened(spec), 3)
    monkeypatch.setattr("efficientllm.data.images.decode.decode", lambda *_: pytest.fail("decoded again"))
    assert same(take(opened(spec), 3), first)
    (folder / "ant" / "00.png").touch()
    with pytest.raises(BaseException, match="decoded again"):
        take(opened(spec), 1)


def test_a_file_that_changes_during_a_run_is_named(spec, folder, opened, monkeypatch):
    monkeypatch.setattr(read_source, "CACHED_BYTES", 1000)
    read = ImageData(spec)
    pictures = read.pictures
    for change in (lambda path: path.write_bytes(b"no picture"), lambda path: path.unlink()):
        change(folder / "ant" / "00.png")
        with pytest.raises(UserError, match="ant/00.png: (has changed since|cannot be read)"):
            for index in range(len(pictures)):
                pictures[index]
    batches = read.train(8, 0)
    with pytest.raises(UserError, match="ant/00.png: cannot be read"):  # from the threads that decode ahead
        take(batches, 10)
    batches.close()


def test_another_process_makes_the_same_batches(spec, tmp_path, opened):
    script = (
        "import sys, hashlib, itertools\nfrom efficientllm.data.images import ImageData\n"
        "found = hashlib.sha256()\n"
        "for batch in itertools.islice(ImageData(sys.argv[1]).train(4, 0), 20):\n"
        "    for key in sorted(batch):\n        found.update(batch[key].tobytes())\n"
        "print(found.hexdigest())\n"
    )
    cache = str(tmp_path / "other")
    env = {**os.environ, "PYTHONHASHSEED": "77", "EFFICIENTLLM_CACHE": cache, "PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, "-c", script, spec], env=env, capture_output=True, text=True, check=True)
    digest = hashlib.sha256()
    for batch in take(opened(spec, 4), 20):
        for key in sorted(batch):
            digest.update(batch[key].tobytes())
    assert run.stdout.strip() == digest.hexdigest()
    assert run.stderr == ""  # nor does an iterator that nobody closed say anything on the way out


def test_damaged_files_are_counted_and_named(folder, spec):
    (folder / "ant" / "torn.png").write_bytes((folder / "ant" / "00.png").read_bytes()[:200])
    (folder / "bee" / "empty.jpg").touch()
    (folder / "bee" / "text.gif").write_text("no picture")
    (folder / "bee" / "notes.txt").write_text("not read, since its name is no picture's")
    read = ImageData(spec)
    assert len(read.pictures) == 48
    torn, empty, text = read.notes()[1:]
    assert torn.startswith(f"skipped 1: damaged pictures (the first: {folder}/ant/torn.png (")
    assert empty == f"skipped 1: files that are empty (the first: {folder}/bee/empty.jpg)"
    assert text == f"skipped 1: files that are no pictures (the first: {folder}/bee/text.gif)"
    assert read.notes() == ImageData(spec).notes()  # of the cache


@pytest.mark.parametrize(
    "spec, message",
    [
        ("python_docs()", "holds text, and images are needed; write glyphs()"),
        ("hf(path='x')", "holds text, and images are needed; name its column of images, hf(path=..., image='image')"),
        ("hf(path='x', image='image', streaming=True)", "images cannot be streamed"),
        ("stranger_pictures", "has no pictures(); derive it from efficientllm.data.ImageSource"),
        ("glyphs(channels=2)", "channels = 2: must be 3 (RGB) or 1 (gray)"),
        ("glyphs(size=0)", "size = 0: must be at least 1"),
        ("odd_pictures(size=-3)", "size = -3: must be a whole number from 1 to 16384"),
        ("eager_pictures(held_out=1.0)", "held_out must be at least 0 and below 1"),
        ("glphs()", "did you mean 'glyphs'?"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_before_anything_is_read(spec, message):
    with pytest.raises(UserError) as error:
        ImageData(spec)
    assert "data = " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("odd_pictures(what='tuple')", "picture 1 is of type tuple; pictures() yields Picture(content, label=...)"),
        ("odd_pictures(what='array')", "picture 1: is an array float64 [4, 4]; uint8 [h, w]"),
        ("odd_pictures(what='no label')", "picture 1 has no label, and others have"),
        (
            "odd_pictures(what='beyond')",
            "label 'c' of config.data = \"odd_pictures(what='beyond')\": picture 1: is none",
        ),
        ("odd_pictures(what='number')", "picture 1: labels are all names, or all numbers"),
        ("odd_pictures(what='list')", "picture 1: labels are all names, or all numbers"),
        ("eager_pictures(count=0)", "training and held-out pictures need two different ones, there is none"),
        ("eager_pictures(count=1)", "training and held-out pictures need two different ones, there is one"),
        ("glyphs(letters='')", "name the letters to draw"),
        ("images(path='/nowhere')", "data: path = '/nowhere': no file matches"),
    ],
)
def test_data_that_cannot_be_trained_on_is_named(spec, message):
    with pytest.raises(UserError) as error:
        ImageData(spec).notes()
    assert message in str(error.value)


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"size = 30: is no multiple of the 8 pixels of a token; write 24 or 32"):
        ImageData("glyphs(size=30)", multiple=8)
    with pytest.raises(UserError, match=r"size = 6: is no multiple of the 8 pixels of a token; write 8$"):
        ImageData("glyphs(size=6)", multiple=8)
    assert ImageData("glyphs(size=32)", multiple=8).image_shape == (32, 32, 3)


def test_a_batch_the_processes_cannot_share_is_refused(spec):
    read = ImageData(spec)
    message = r"train.batch_size = 6: not divisible by the 4 processes; the next that is: 8"
    for batches in (lambda: read.train(6, 0, 0, 4), lambda: read.held_out(6, 0, 4)):
        with pytest.raises(UserError, match=message):
            batches()


def test_nothing_held_out_is_said_when_it_is_needed(opened):
    read = ImageData("eager_pictures(held_out=0.0)")
    next(opened(read.spec))
    with pytest.raises(UserError, match="no picture is held out; raise held_out"):
        read.held_out(4)


def test_text_and_images_are_told_apart():
    assert data.modality("python_docs()") == data.modality("hf(path='x')") == "text"
    assert data.modality("glyphs()") == data.modality("hf(path='x', image='image')") == "images"
    with pytest.raises(UserError, match=r"^data = 'glyphs\(\)': holds images, and text is needed"):
        Corpus("glyphs()")
    with pytest.raises(UserError, match="config.data = 'glyps': no data of that name"):
        data.modality("glyps")


def test_pillow_is_asked_for_in_one_line(monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "PIL" else find(name))
    with pytest.raises(UserError, match=r"needs Pillow: pip install .*images"):
        ImageData("glyphs()")


class Encoder:
    """A linear 'autoencoder' of factor 2: means are box averages, and counts its calls."""

    def __init__(self, scale=1.0):
        self.calls, self.scale = 0, scale

    def __call__(self, images):
        self.calls += 1
        assert images.shape == (16, 8, 8, 3) and images.dtype == np.float32
        mean = images.reshape(16, 4, 2, 4, 2, 3).mean((2, 4)) * self.scale
        return mean, mean - 3


def test_latents_are_computed_once_and_belong_to_their_pictures(spec, opened):
    encode = Encoder()
    read = ImageData(spec, encode=encode, encode_key="sha")
    assert read.image_shape == (4, 4, 3) and encode.calls == 6  # 48 pictures and their mirror images
    again = ImageData(spec, encode=encode, encode_key="sha")
    batches, pixels = again.train(8, 0), opened(spec)
    for _ in range(12):
        latents, batch = next(batches), next(pixels)
        expected = batch["images"].reshape(8, 4, 2, 4, 2, 3).mean((2, 4))
        np.testing.assert_allclose(latents["images"], expected, atol=1e-6)
        np.testing.assert_allclose(latents["logvar"], expected - 3, atol=1e-6)
        assert all(np.array_equal(latents[key], batch[key]) for key in ("labels", "identity", "weights"))
    batches.close()
    for latents, batch in zip(again.held_out(8), ImageData(spec).held_out(8), strict=True):
        expected = batch["images"].reshape(8, 4, 2, 4, 2, 3).mean((2, 4)) * batch["weights"][:, None, None, None]
        np.testing.assert_allclose(latents["images"], expected, atol=1e-6)
    assert encode.calls == 6 and again.describe()["latents_of"] == "sha"
    other = ImageData(spec, encode=Encoder(2.0), encode_key="sha2")
    assert not np.array_equal(other.latents[0].means, again.latents[0].means)


def test_latents_that_are_not_finite_are_refused(spec):
    with pytest.raises(UserError, match="latents of pictures from 0 on are not finite"):
        print(ImageData(spec, encode=lambda images: (images + np.nan, images), encode_key="nan").image_shape)
    with pytest.raises(ValueError, match="encode_key"):
        ImageData(spec, encode=Encoder())
