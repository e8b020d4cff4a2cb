"""Plans of vision-language models: FLOPs of published shapes, traced programs, training rows, and what is refused."""

import json

import jax
import pytest

from configs import infer_vl, tune_vl
from convert.hf_config.test_vision_language import PUBLISHED
from efficientllm import registry
from efficientllm.cost.jaxpr_flops import count_program_flops
from efficientllm.errors import UserError
from efficientllm.plan import hardware
from tiers import slow_case

LIMITS = {"min_pixels": 3136, "max_pixels": 12845056}  # as published: the class has others


@pytest.fixture
def folder(tmp_path):
    """A folder of files that say what a model is, without weights."""

    def make(name):
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][0]))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(LIMITS if name.startswith("qwen") else {}))
        return str(tmp_path)

    return make


def planned(config, devices=1):
    kind, cpu = registry.lookup("planned", config.plan.of), hardware.find("cpu", 1)
    return kind.describe(config, jax.devices()[:devices], cpu.platform, cpu.capability)


def request(folder, **changes):
    config = infer_vl.get_config("bfloat16")
    values = {"model.pretrained": folder, "plan.of": "infer", "plan.images": ((1000, 1000),)}
    config.update_from_flattened_dict(values | {"infer.prompt_length": 1328, "infer.max_new_tokens": 8} | changes)
    config.model.precision = "bfloat16"
    return planned(config)


# TFLOP of the tower and of prefill with one picture of 1000 x 1000 and 30 tokens beside it; bytes of the KV cache a
# token in bfloat16: closed formulas of the published shapes.
@pytest.mark.parametrize(
    "name, length, tower, prefill, kv_bytes",
    [("qwen2.5-vl-7b", 1328, 7.26, 17.69, 57_344), slow_case("llava-1.5-7b", 616, 0.366 + 0.024, 8.1, 524_288)],
)
def test_flops_and_cache_of_published_models(folder, name, length, tower, prefill, kv_bytes):
    made = request(folder(name), **{"infer.prompt_length": length})
    parts = {part.name: part for part in made.programs()}
    assert list(parts) == ["images", "prefill", "first logits", "decode"]
    assert parts["images"].model_flops == pytest.approx(tower * 1e12, rel=0.01)
    total = parts["prefill"].model_flops + parts["first logits"].model_flops
    assert total == pytest.approx(prefill * 1e12, rel=0.01)
    assert made.readings()["kv_bytes_per_token"].value == kv_bytes
    assert made.readings()["flops_per_image"].value == parts["images"].model_flops


@pytest.mark.slow
def test_the_traced_tower_has_the_products_of_the_formula(folder):
    """The program multiplies the pairs of padded bins too: it is above the formula, by little."""
    (images, *_) = request(folder("qwen2.5-vl-3b"), **{"plan.images": ((448, 448), (448, 448))}).plain_programs
    counted = count_program_flops(images.trace.jaxpr)
    assert 1 <= counted / images.model_flops < 1.25


def test_a_training_row_has_the_patches_of_its_pictures(folder):
    config = tune_vl.get_config("lora")
    values = {"model.pretrained": folder("qwen2.5-vl-7b"), "model.embed": "tokens()", "plan.images": ((1000, 1000),)}
    config.update_from_flattened_dict(values | {"train.batch_size": 1, "train.length": 1328, "train.accumulate": 1})
    step = planned(config)
    assert step.lm.row_slots == 5184 and step.shaped.params
    # A frozen tower's forward pass, and of the language model its forward pass and the gradients of activations.
    frozen = 7.26e12 + 2 * 19.13e12
    assert frozen < step.model_flops < 1.02 * frozen  # and the adapters, and scores whose both sides have gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"infer.prompt_length": 1000}, "1,296 tokens, in rows of 1,000; plan longer rows"),
        ({"plan.images": ((10, 4000),)}, "over 200 times"),
    ],
)
def test_what_is_refused(folder, changes, message):
    with pytest.raises(UserError, match=message):
        request(folder("qwen2.5-vl-3b"), **changes)


def test_a_model_of_text_has_no_pictures(tmp_path):
    config = infer_vl.get_config("bfloat16")
    size = (
        "custom(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=48, rope_base=1e4, "
        "vocab_size=264)"
    )
    config.update_from_flattened_dict(
        {"model.pretrained": "", "model.size": size, "plan.of": "infer", "plan.images": ((56, 56),)}
    )
    with pytest.raises(UserError, match="the model reads no pictures"):
        planned(config)
