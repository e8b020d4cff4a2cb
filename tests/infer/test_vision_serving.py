"""Inference runs with images: the completions of transformers, the row, FLOPs of towers, and what is refused."""

import json

import jax
import numpy as np
import pytest

import runs
from convert import vision_folders as folders
from convert.test_vision_parity import loaded
from convert.vision_folders import torch
from data import kinds
from efficientllm import convert, main, model
from efficientllm.config.presets import infer_vl
from efficientllm.convert.check_vision import draw_picture, reference_inputs
from efficientllm.cost.jaxpr_flops import count_program_flops
from efficientllm.embeds.vision_language import encode_images
from efficientllm.errors import UserError
from efficientllm.infer import setup
from efficientllm.infer.prompts import PromptLine
from efficientllm.infer.vision_serving import encode_requests, image_flops
from efficientllm.vision.processors import read_processor
from efficientllm.vision.token_rows import Prompt, make_batch
from efficientllm.vision.tower_rows import tower_rows

pytestmark = pytest.mark.xdist_group("vision")
IMAGE, NEW = 290, 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaVA for bytes, a text, two pictures, and prompts about them."""
    where = tmp_path_factory.mktemp("vision")
    text = folders.MODELS["llava"][1]["text_config"] | {"vocab_size": 300}
    folders.build("llava", text_config=text, image_token_index=IMAGE).save_pretrained(where / "model")
    runs.corpus(where / "texts")
    random = np.random.default_rng(0)
    for name, size in (("a", (60, 80)), ("b", (56, 56))):
        draw_picture(*size, random).save(where / f"{name}.png")
    lines = [{"prompt": "What is this?", "image": "a.png"}, {"prompt": "Two", "images": ["b.png", "a.png"]}]
    (where / "prompts.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"prompt": "No image"}])))
    return where


def run(base, workdir, **overrides):
    values = {
        "model.pretrained": base / "model",
        "tokenizer": "bytes",
        "data": f"text(path='{base}/texts/*.txt')",
        "train.length": 32,
        "eval.batches": 1,
        "infer.chat": False,
        "infer.prompts": (str(base / "prompts.jsonl"),),
        "infer.max_new_tokens": NEW,
        "infer.prompt_length": 8,
        "infer.repeats": 2,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return main.main([f"--config={runs.ROOT}/configs/infer_vl.py:float32", f"--workdir={workdir}", *flags])


def expected(base):
    """What transformers generates for each prompt, and the prompts."""
    source = convert.open_source(base / "model")
    lm, processor = source.lm(), read_processor(base / "model", source.lm())
    reference = folders.transformers.LlavaForConditionalGeneration.from_pretrained(base / "model").eval()
    prompts, completions = [], []
    for line in map(json.loads, (base / "prompts.jsonl").read_text().splitlines()):
        files = line.get("images") or [line[key] for key in ("image",) if key in line]
        pictures = [processor.prepare(folders.opened(base / file)) for file in files]
        prompts.append(Prompt([*[IMAGE] * len(files), *line["prompt"].encode()], pictures))
        inputs = reference_inputs(lm, made := make_batch(lm, prompts[-1:]), prompts[-1:])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 256, "pad_token_id": 0}
        with torch.no_grad():
            ids = reference.generate(**inputs, **options)[0, made.tokens_BT.shape[1] :].tolist()
        completions.append(bytes(id for id in ids if id < 256).decode(errors="replace"))
    return prompts, completions


def test_completions_are_those_of_transformers_and_a_row_is_written(base, tmp_path, capsys):
    assert run(base, tmp_path / "run", infer__batch_size=2) == 0
    answers = [json.loads(line) for line in (tmp_path / "run/samples/generated.jsonl").read_text().splitlines()]
    prompts, completions = expected(base)
    assert [answer["answer"] for answer in answers] == completions
    row = json.loads((tmp_path / "run/record.json").read_text())
    physical, tokens = row["physical"], sum(picture.tokens for prompt in prompts for picture in prompt.pictures)
    assert row["provenance"]["images"] == 3 and row["provenance"]["image_tokens"] == tokens
    assert physical["ttft_s"] > 0 and physical["tokens_per_s"] > 0 and row["quality"]["bits_per_byte"] > 0
    # The tower is timed alone; the first prompt has one image.
    (picture,), lm = prompts[0].pictures, convert.open_source(base / "model", weights=False).lm()
    assert 0 < physical["image_encode_s"] < 1.5 * physical["ttft_s"]
    assert physical["flops_per_image"] == image_flops(lm.vision, model.abstract_params(lm)["vision"], picture)
    source = row["sources"]["j_per_image"]
    assert physical["j_per_image"] is not None or source["reason"] == row["sources"]["j_per_token"]["reason"]
    assert "of it the tower" in capsys.readouterr().out
    # A token of text multiplies no kernel of the tower.
    kernels = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(lm)["groups"]) if leaf.ndim > 2)
    assert physical["flops_per_token"] < 2 * (kernels + 64 * 300) + 4 * 2 * 64 * 64


@pytest.mark.parametrize("name, grid", [("llava", (1, 4, 4)), ("qwen2.5", (1, 8, 16))])
def test_flops_of_a_tower_are_those_of_its_program(name, grid):
    """Where windows fill their bins, nothing that is computed is dropped."""
    _, lm, params = loaded(name)
    (picture,) = folders.pictures(name, [grid])
    patches = tower_rows(lm.vision, [[picture]]).patches
    program = jax.jit(lambda params: encode_images(lm, params, patches)).trace(params).jaxpr
    assert count_program_flops(program) == image_flops(lm.vision, model.abstract_params(lm)["vision"], picture)


def test_what_is_refused(base, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    cases = [
        ({"prompt": "a", "image": 3}, "line 1: 'image' = 3: must be the name of a file"),
        ({"prompt": "a", "image": "none.png"}, "none.png: cannot be read"),
        ({"prompt": "a", "video": "a.mp4"}, "video = 'a.mp4': videos are not read; give frames of it as images"),
        ({"prompt": "<video>a"}, "<video> in its text: videos are not read"),
        ({"prompt": "a", "image": "broken.png"}, "broken.png: files that are no pictures are not read"),
    ]
    for number, (line, message) in enumerate(cases):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(line))
        assert run(base, tmp_path / "refused", infer__prompts=(str(file),)) == 2
        error = capsys.readouterr().err
        assert message in error and ", line 1: " in error and len(error.strip().splitlines()) == 1


def test_a_limit_of_pixels_shrinks_the_images_of_prompts(base, tmp_path):
    text = folders.MODELS["qwen2.5"][1]["text_config"] | {"vocab_size": 300}
    ids = {"image_token_id": IMAGE, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}
    folders.build("qwen2.5", text_config=text, **ids).save_pretrained(tmp_path)
    counts = []
    for limit in (0, 56 * 56):
        config = infer_vl.get_config("float32")
        values = {
            "model.pretrained": str(tmp_path),
            "tokenizer": "bytes",
            "infer.chat": False,
            "infer.max_pixels": limit,
        }
        config.update_from_flattened_dict(values | {"infer.prompts": (str(base / "prompts.jsonl"),)})
        records = setup.prepare(config, with_text=False).records
        counts.append([picture.tokens for record in records for picture in record.pictures])
    assert counts == [[6, 4, 6], [2, 4, 2]]  # tokens of 28 x 28: 56 x 84 pixels and 28 x 56 of 60 x 80


TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def test_a_chat_template_places_images(base, tmp_path):
    """InternVL's tokens stand between its marks; a text that spells the token is refused."""
    marks = ("<IMG_CONTEXT>", "<img>", "</img>")
    kinds.save(tmp_path, add=marks, eos_token="<eos>", template=TEMPLATE)
    tokenizer, lm = kinds.ours(tmp_path), loaded("internvl")[1]
    token = tokenizer.backend.token_to_id("<IMG_CONTEXT>")
    lm = lm.clone(image_token=token, vocab_size=max(lm.vocab_size, tokenizer.vocab_size))
    processor = read_processor(None, lm)
    request = PromptLine("Hi", (base / "b.png", base / "a.png"), "line 1")
    (prompt,) = encode_requests([request], lm, tokenizer, processor, chat=True)
    first, second = (picture.tokens for picture in prompt.pictures)
    images = [f"<img>{'<IMG_CONTEXT>' * count}</img>\n" for count in (first, second)]
    assert [*prompt.ids] == tokenizer.encode_template(f"user: {''.join(images)}Hi")
    assert first == 4 and second > first  # the second is cut into tiles
    with pytest.raises(UserError, match="line 1: 3 image tokens .* and 2 images"):
        encode_requests([request._replace(text="<IMG_CONTEXT>")], lm, tokenizer, processor, chat=True)


def test_a_chat_template_of_texts_has_images_where_their_parts_are(base, tmp_path):
    """As that of a language model that was given a tower, which adds a content to a text."""
    texts = "{% for message in messages %}{{ message.role + ': ' + message.content }}{% endfor %}"
    kinds.save(tmp_path, add=("<image>",), eos_token="<eos>", template=texts)
    tokenizer, lm = kinds.ours(tmp_path), loaded("internvl")[1]
    token = tokenizer.backend.token_to_id("<image>")
    lm = lm.clone(image_token=token, vocab_size=max(lm.vocab_size, tokenizer.vocab_size))
    request = PromptLine("Hi", (base / "b.png",), "line 1")
    (prompt,) = encode_requests([request], lm, tokenizer, read_processor(None, lm), chat=True)
    assert [*prompt.ids] == tokenizer.encode_template(f"user: {'<image>' * prompt.pictures[0].tokens}Hi")
