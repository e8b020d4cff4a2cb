"""Training rows of conversations about pictures: packed as if alone, deterministic, resumable, and what is refused."""

import dataclasses
import json
import re
import struct
import threading
import time
import zlib

import flax.linen as nn
import grain
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from convert.test_vision_parity import loaded
from efficientllm import base_config, model
from efficientllm.adapters.base import tuned
from efficientllm.cost import formulas
from efficientllm.cost.jaxpr_flops import count_program_flops
from efficientllm.data.base import Example
from efficientllm.data.text import TextData
from efficientllm.data.tokenizers import Bytes
from efficientllm.embeds.vision_language import BATCH_KEYS
from efficientllm.errors import UserError
from efficientllm.objectives.next_token import NEXT_TOKEN
from efficientllm.ops.native import flash
from efficientllm.optim import from_config
from efficientllm.registry import build
from efficientllm.train.step import gradients
from efficientllm.vision.conversations import encode_example, place_pictures
from efficientllm.vision.examples import ExampleData, first_groups
from efficientllm.vision.image_headers import picture_size
from efficientllm.vision.processors import AnySize, load_picture, read_processor, within
from vision.records import write_records

pytestmark = pytest.mark.xdist_group("vision")


@pytest.fixture(scope="module", params=["qwen2.5", "llava", "internvl"])
def made(request, tmp_path_factory, monkeypatch_module):
    """`(data, model with the row's slots, parameters)`."""
    folder = tmp_path_factory.mktemp("records")
    monkeypatch_module.setenv("EFFICIENTLLM_CACHE", str(folder / "cache"))
    _, lm, params = loaded(request.param)
    lm = lm.clone(vocab_size=lm.vocab_size)
    data = ExampleData(TextData(write_records(folder), _Letters(), 96), lm, read_processor(None, lm))
    return data, data.model(lm), params


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


class _Letters(Bytes):
    """Bytes below 128, within the vocabulary of the random models."""

    vocab_size, eos_id, end_ids, fingerprint = 129, 128, (128,), "letters"

    def __init__(self):
        self.token_bytes = np.array([1] * 128 + [0], np.int32)


def hidden(lm, params, batch):
    return np.asarray(
        lm.apply({"params": params}, batch["tokens"], lm.context(batch), readout=False)[0].astype(np.float32)
    )


@pytest.mark.slow
def test_packed_examples_are_as_if_alone(made):
    """Of a row with several examples, each has the hidden vectors of a row with it alone; so has padding no effect."""
    data, lm, params = made
    batch = next(data.train(4, seed=0))
    together = hidden(lm, params, batch)
    compared = several = 0
    for row in range(4):
        for segment in range(1, batch["segments"][row].max() + 1):
            of_text = batch["segments"][row] == segment
            alone = next(
                encoded
                for encoded in data.sides["train"]
                if encoded.ids[:-1].tolist() == batch["tokens"][row][of_text].tolist()
            )
            single = data.join({key: value[None] for key, value in _packed(data, alone).items()})
            expected = hidden(lm, params, single)[0, : of_text.sum()]
            np.testing.assert_allclose(together[row][of_text], expected, rtol=2e-4, atol=2e-5)
            compared += 1
            several += len(alone.example.pictures) > 1
    assert compared > 4 and several and batch["segments"].max() > 1


def _packed(data, encoded):
    """A row of one example, as the packer makes it."""
    (row,) = data._fit(grain.MapDataset.source([data._document(encoded)]).to_iter_dataset())
    return row


def test_answers_alone_are_learnt_and_images_never(made):
    data, lm, _ = made
    batch = next(data.train(4, seed=0))
    learnt = batch["weights"] > 0
    assert not np.any(learnt & (batch["targets"] == lm.image_token))
    for row in range(4):
        text = bytes(id for id in batch["targets"][row][learnt[row]].tolist() if id < 128).decode()
        assert text.count("It is ") == batch["segments"][row].max() and "Number" not in text
    # Every image token has a feature of its own, in order, and every other token none.
    is_image = batch["tokens"] == lm.image_token
    np.testing.assert_array_equal(batch["slots"] >= 0, is_image)
    for row in range(4):
        assert len(set(slots := batch["slots"][row][is_image[row]].tolist())) == len(slots)


def test_batches_resume_bit_for_bit_and_are_shared_by_processes(made):
    data, _, _ = made
    whole = data.train(4, seed=1)
    batches = [next(whole) for _ in range(3)]
    state = json.loads(json.dumps(whole.get_state()))
    after = [next(whole) for _ in range(2)]
    again = data.train(4, seed=1)
    again.set_state(state)
    for expected in after:
        jax.tree.map(np.testing.assert_array_equal, next(again), expected)
    shares = [next(data.train(4, seed=1, process_index=i, process_count=2)) for i in range(2)]
    jax.tree.map(lambda whole, *parts: np.testing.assert_array_equal(np.concatenate(parts), whole), batches[0], *shares)


def test_the_fill_of_rows_is_that_of_the_rows_that_are_made(made):
    """Of their tokens and of their slots of patches; it is counted without decoding a picture."""
    data, _, _ = made
    documents = [data._document(encoded) for encoded in data.sides["train"]]
    rows = list(data._fit(grain.MapDataset.source(documents).to_iter_dataset()))
    frames = BATCH_KEYS["frames_BS"]
    expected = [np.mean([row[f"{key}_segment_ids"] > 0 for row in rows]) for key in ("tokens", frames)]
    described = data.describe()
    assert [described["token_fill"], described["slot_fill"]] == pytest.approx(expected, rel=1e-12)
    assert all(0.2 < share < 1 for share in expected)


def test_pictures_are_decoded_in_threads_ahead_of_the_step(made, monkeypatch):
    """A batch is taken while later ones are being made, in other threads than the step's."""
    data, _, _ = made
    threads, prepare = [], ExampleData._prepare

    def noted(self, picture, name):
        threads.append(threading.get_ident())
        return prepare(self, picture, name)

    monkeypatch.setattr(ExampleData, "_prepare", noted)
    batches = data.train(2, seed=0)
    first = next(batches)
    of_batch, end = int(first["segments"].max(-1).sum()), time.monotonic() + 30
    while len(threads) <= 2 * of_batch and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.get_ident() not in threads and len(set(threads)) > 1
    assert len(threads) > 2 * of_batch
    batches.close()


def test_each_held_out_example_comes_once(made):
    data, _, _ = made
    seen = []
    held_out = data.held_out(2)
    batches = list(held_out)
    assert len(batches) == len(held_out) == len(list(held_out))
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            seen += [tokens[segments == segment].tolist() for segment in range(1, segments.max() + 1)]
    assert sorted(seen) == sorted(encoded.ids[:-1].tolist() for encoded in data.sides["held_out"])
    assert len(data.sides["train"]) + len(data.sides["held_out"]) == 12


@pytest.mark.parametrize("made", ["qwen2.5"], indirect=True)
def test_parts_learn_at_rates_of_their_own(made):
    """One update of each part is that of a common rate times its factor, to the last bit: factors are powers of 2."""
    data, lm, params = made
    batch, train = next(data.train(2, seed=0)), base_config.get_config().train
    train.update({"optimizer": "sgd(momentum=0.0)", "schedule": "constant(peak=0.5)", "clip": 0.0})
    grads, _ = jax.jit(lambda params, batch: gradients(lm, params, batch, 1))(params, batch)
    factors = {"^vision/projector/": 4.0, "^vision/": 0.25, ".*": 0.5}

    def update(rates):
        train.rates, train.decay = rates, ((".*", 0.0),)
        optimizer = from_config.optimizer(train, params)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    common, updates = (flatten_dict(update(r), sep="/") for r in (((".*", 1.0),), tuple(factors.items())))
    seen = set()
    for path, change in updates.items():
        pattern, factor = next(item for item in factors.items() if re.search(item[0], path))
        np.testing.assert_array_equal(change, factor * common[path])
        seen |= {pattern} if np.any(change) else set()
    assert seen == set(factors)


def count_step(lm, boxed, adapter):
    """`(FLOPs by formula, FLOPs of the step's jaxpr)`."""
    method = build("adapter", adapter)
    trainable, frozen = jax.eval_shape(
        lambda: nn.unbox(tuned(method, lm, boxed, model.init_params(lm, jax.random.key(0), 8), jax.random.key(1)))
    )
    step = jax.make_jaxpr(lambda *parts: gradients(lm, parts[0], parts[2], 1, parts[1])[0])
    program = count_program_flops(step(trainable, frozen, NEXT_TOKEN.batch_shapes(lm, 2, 96)))
    return formulas.step_flops(lm, boxed, 96, 2, method), program


@pytest.mark.parametrize(
    "name, slots, adapter",
    [
        ("qwen2", 64, "full()"),
        ("qwen2", 64, "lora(rank=2)"),
        ("qwen2", 64, "freeze(train='^vision/')"),
        ("qwen2.5", 192, "full()"),  # three bins of windows in a row
    ],
)
def test_flops_of_a_step_are_those_of_its_program(name, slots, adapter, monkeypatch):
    """What images add to a step by the formula, against what they add to its jaxpr.

    Where the tower alone learns, against a step that trains its last map: gradients go through the language model in
    both.
    """
    monkeypatch.setattr(flash, "is_usable", lambda: False)  # the native attention multiplies scores twice
    _, lm, _ = loaded(name)
    lm = lm.clone(remat="everything_saveable", row_slots=slots)
    lm = lm.clone(vision=lm.vision.clone(remat="everything_saveable"))
    boxed = model.abstract_params(lm)
    of_tower = "freeze" in adapter
    other = (lm, boxed, "freeze(train='^vision/projector/2')") if of_tower else (lm.clone(row_slots=0), boxed, adapter)
    by_formula, by_program = np.subtract(count_step(lm, boxed, adapter), count_step(*other))
    assert by_formula == by_program > 0


def test_first_groups():
    segments_BT = np.array([[1, 1, 2, 3, 0]])
    segments_BS = np.array([[1, 1, 1, 1, 3, 3, 3, 3, 0, 0, 0, 0]])  # the second example has no image
    np.testing.assert_array_equal(first_groups(segments_BT, segments_BS, 4), [[0, 0, 0, 1, 2]])


def test_sizes_are_those_of_the_loaded_picture(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.png")
    contents = [tmp_path / "turned.jpg", tmp_path / "plain.png", (tmp_path / "plain.png").read_bytes()]
    for content in [*contents, image, np.zeros((5, 7, 3), np.uint8), np.zeros((4, 6), np.uint8)]:
        loaded_picture = load_picture(content, "it")
        assert picture_size(content, "it") == (loaded_picture.height, loaded_picture.width)
    (tmp_path / "none.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="^it: cannot be read as a picture"):
        picture_size(tmp_path / "none.png", "it")


def png(width, height):
    """A PNG file that says a size, and has no pixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no known format; give another one"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no known format"),  # Ghostscript would run
        (png(60_000, 60_000), "pictures of more than 89,478,485 pixels are not read; shrink it"),
        (png(10_000, 10_000), "pictures of more than 89,478,485 pixels are not read; shrink it"),
    ],
    ids=["empty", "eps", "bomb", "large"],
)
def test_pictures_are_refused_before_a_step_by_their_headers(content, message):
    with pytest.raises(UserError, match=f"^records.jsonl, line 3: .*{message}") as refused:
        picture_size(content, "records.jsonl, line 3")
    assert len(str(refused.value).splitlines()) == 1 and "0x" not in str(refused.value)


def test_a_picture_that_is_too_long_is_named_with_its_record(made, tmp_path):
    from PIL import Image

    data, _, _ = made
    if not isinstance(data.processor, AnySize):
        pytest.skip("its pictures have one size")
    Image.new("RGB", (4000, 10)).save(tmp_path / "long.png")
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "c"}]
    (tmp_path / "records.jsonl").write_text(json.dumps({"messages": turns, "images": ["long.png"]}))
    spec = f"image_chat(path='{tmp_path}/records.jsonl')"
    with pytest.raises(UserError, match=r"records.jsonl, line 1: 4000 x 10 pixels: .* crop it"):
        dataclasses.replace(data, text=dataclasses.replace(data.text, spec=spec)).sides  # noqa: B018


def test_limits_of_pixels_that_cannot_be_met_are_refused(made):
    data, lm, _ = made
    if not isinstance(data.processor, AnySize):
        pytest.skip("its pictures have one size")
    with pytest.raises(UserError, match="^config.infer: max_pixels = 10: .* 3136 pixels at least; raise it"):
        within(data.processor, 10, "config.infer")
    spec = data.text.spec.replace("6272", "10")
    with pytest.raises(UserError, match="^config.data = .*: max_pixels = 10: "):
        dataclasses.replace(data, text=dataclasses.replace(data.text, spec=spec)).sides  # noqa: B018


def test_a_limit_of_pixels_shrinks_pictures(made):
    data, lm, _ = made
    if not isinstance(data.processor, AnySize):
        pytest.skip("its pictures have one size")
    assert data._processor.max_pixels == 6272 < data.processor.max_pixels
    free = dataclasses.replace(data, text=dataclasses.replace(data.text, spec=data.text.spec.replace("6272", "0")))
    assert free._processor == data.processor
    assert data.row_slots < free.row_slots


def test_places_for_pictures():
    question = {"role": "user", "content": "a<image>b"}
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert place_pictures([question], 1, "it")[0]["content"] == parts
    ahead = place_pictures([{"role": "user", "content": "a"}], 2, "it")[0]["content"]
    assert ahead == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a"}]
    with pytest.raises(UserError, match="^it: 1 places for images in its text and 2 images"):
        place_pictures([question], 2, "it")
    lm = loaded("llava")[1]
    messages = [question, {"role": "assistant", "content": "c"}]
    ids, learnt = encode_example(Example(messages, ("p",)), lm, _Letters())
    assert ids.tolist() == [97, lm.image_token, 98, 10, 10, 99, 128]
    assert learnt.tolist() == [False] * 5 + [True, True]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
        ({"messages": None}, "has no list 'messages' or 'conversations'"),
        ({"messages": [{"role": "alien", "content": "a"}]}, "turn 1: is {'role': 'alien'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "part {'type': 'video'}: videos are not read",
        ),
        ({"messages": [{"role": "user", "content": "<video>?"}]}, "turn 1: <video> in its text: videos are not read"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "<|video_pad|>"}]}]},
            "<|video_pad|> in its text: videos are not read; give frames of it as images",
        ),
        ({"videos": ["a.mp4"]}, "videos = ['a.mp4']: videos are not read"),
        ({"video": "a.mp4"}, "video = 'a.mp4': videos are not read"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "has a part {'type': 'audio'}"),
        ({"images": ["none.png"]}, "image = 'none.png': there is no file"),
        ({"images": ["https://example.org/a.png"]}, "must be the name of a file"),
    ],
)
def test_bad_records_are_one_line_with_their_place(record, message, tmp_path):
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "c"}]
    (tmp_path / "records.jsonl").write_text(json.dumps({"messages": turns} | record))
    source = build("data", f"image_chat(path='{tmp_path}/records.jsonl')")
    with pytest.raises(UserError) as error:
        list(source.examples())
    text = str(error.value)
    assert message in text and "records.jsonl, line 1" in text and len(text.splitlines()) == 1


def test_llava_s_form_is_read(tmp_path):
    write_records(tmp_path, 2)
    record = {"id": "1", "image": "1_0.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    record["conversations"].append({"from": "gpt", "value": "That."})
    (tmp_path / "llava.json").write_text(json.dumps([record]))
    (example,) = build("data", f"image_chat(path='{tmp_path}/llava.json')").examples()
    assert example.pictures == (tmp_path / "1_0.png",)
    assert [message["role"] for message in example.messages] == ["user", "assistant"]


def test_a_table_s_empty_column_of_videos_names_none(tmp_path):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "c"}]
    (tmp_path / "records.jsonl").write_text(json.dumps({"messages": turns, "videos": [], "video": None}))
    assert len(list(build("data", f"image_chat(path='{tmp_path}/records.jsonl')").examples())) == 1


def test_llava_s_videos_are_refused(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "1", "video": "a.mp4", "conversations": turns}]))
    with pytest.raises(UserError, match=r"llava.json.*video = 'a.mp4': videos are not read; give frames"):
        list(build("data", f"image_chat(path='{tmp_path}/llava.json')").examples())


def test_an_image_that_does_not_fit_is_left_out_and_counted(made):
    data, lm, _ = made
    ends = [np.flatnonzero(encoded.ids == lm.image_token) for side in data.sides.values() for encoded in side]
    longest = max(int(end[-1]) for end in ends if len(end))
    short = dataclasses.replace(data, text=dataclasses.replace(data.text, length=longest))
    kept = [encoded for side in short.sides.values() for encoded in side]
    assert len(kept) < 12 and short.describe()["left_out"] == 12 - len(kept)
    for encoded in kept:
        grids = [short._processor.grid(*picture_size(p, "it")) for p in encoded.example.pictures]
        expected = sum(int(np.prod(grid)) // lm.vision.merge**2 for grid in grids)
        assert np.sum(encoded.ids == lm.image_token) == expected
    with pytest.raises(UserError, match=r"^length = 2: no .* fits into so many tokens; raise it"):
        dataclasses.replace(data, text=dataclasses.replace(data.text, length=2)).sides  # noqa: B018
