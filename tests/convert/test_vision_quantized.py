"""Vision-language folders whose language model is packed by AWQ or GPTQ, beside a tower of floats."""

import json
import re
import shutil

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import vision_folders as folders
from convert.files import test_quantized
from convert.vision_folders import IMAGE
from efficientllm import convert, model
from efficientllm.convert import __main__ as command
from efficientllm.errors import UserError
from efficientllm.quant.int4 import Int4
from efficientllm.vision.token_rows import Prompt, make_batch
from tiers import slow_except

pytestmark = pytest.mark.xdist_group("vision")


@pytest.fixture
def packed(monkeypatch, tmp_path):
    """`packed(name, kind, where)`: a packed folder of a model, and one of the weights that it stands for."""
    is_language = re.compile(r"^(?!.*(visual|vision_tower)).*_proj\.weight$")
    monkeypatch.setattr(test_quantized, "is_linear", lambda name: is_language.match(name) is not None)

    def build(name, kind, where=None):
        rounded, plain = tmp_path / "rounded", tmp_path / "plain"
        for folder in (rounded, plain):
            shutil.copytree(folders.saved(name), folder)
        exact, keys = test_quantized.packed(kind)(rounded, load_file(plain / "model.safetensors"))
        save_file(exact, plain / "model.safetensors")
        keys |= {"modules_to_not_convert": ["visual"]} if kind == "awq" else {}
        change_config(rounded, lambda config: (config[where] if where else config).update(quantization_config=keys))
        return rounded, plain

    return build


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def loaded(folder, scan=True):
    source = convert.open_source(folder)
    lm = source.lm(scan=scan)
    return source, lm, nn.unbox(model.abstract_params(lm))


CASES = [(name, kind) for name in folders.MODELS for kind in ("awq", "gptq")]


@pytest.mark.parametrize("name, kind", slow_except(CASES, ("qwen2.5", "awq"), ("internvl", "gptq")))
def test_the_language_model_is_read_as_stored_and_the_tower_as_floats(name, kind, packed):
    rounded, plain = packed(name, kind)
    (source, _, abstract), (floats, _, _) = loaded(rounded), loaded(plain)
    jax.tree.map(np.testing.assert_array_equal, source.load(abstract), floats.load(abstract))
    source, lm, abstract = loaded(rounded, scan=False)
    leaves = flax.traverse_util.flatten_dict(source.load_stored(abstract, lm), sep="/")
    is_packed = {path for path, leaf in leaves.items() if isinstance(leaf, Int4)}
    assert len(is_packed) == 14 and not any(path.startswith("vision/") for path in is_packed)


@pytest.mark.parametrize("name", slow_except(["qwen2", "qwen2.5", "internvl", "llava"], "qwen2"))
def test_packed_kernels_multiply_beside_images(name, packed):
    rounded, plain = packed(name, "awq")
    source, lm, abstract = loaded(rounded, scan=False)
    stored, exact = source.load_stored(abstract, lm), loaded(plain)[0].load(abstract)
    grids = [(1, 10, 14), (1, 8, 4)] if name.startswith("qwen") else [(1, 4, 4), (2, 4, 4)]
    made = make_batch(lm, [Prompt([5, IMAGE, 6, IMAGE, 7], folders.pictures(name, grids), "a record")])
    apply = jax.jit(lm.apply)
    logits = [apply({"params": params}, jnp.asarray(made.tokens_BT), made.ctx)[0] for params in (stored, exact)]
    np.testing.assert_allclose(*logits, atol=1e-3)


def test_a_quantization_that_the_language_models_part_describes(packed):
    """Some files have it there, or in both places."""
    rounded, plain = packed("internvl-plain", "awq", "text_config")
    source, _, abstract = loaded(rounded)
    jax.tree.map(np.testing.assert_array_equal, source.load(abstract), loaded(plain)[0].load(abstract))
    inner = source.config["quantization_config"]
    change_config(rounded, lambda config: config.update(quantization_config=inner | {"zero_point": True}))
    convert.open_source(rounded)
    change_config(rounded, lambda config: config["quantization_config"].update(bits=8))
    with pytest.raises(UserError, match=r"text_config.quantization_config = .* differ; keep the one") as refused:
        convert.open_source(rounded)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 8}, r'"bits": 8.* bits must be 4; take the unquantized model'),
        ({"quant_method": "compressed-tensors"}, "known are quant_method fp8 .* take the unquantized model"),
        ({"version": "marlin"}, "version 'marlin'; only gemm's layout is known; take the unquantized model"),
    ],
)
def test_other_forms_are_refused_in_one_line(change, message, packed):
    rounded, _ = packed("qwen2.5", "awq")
    change_config(rounded, lambda config: config["quantization_config"].update(change))
    with pytest.raises(UserError, match=message) as refused:
        convert.open_source(rounded)
    assert "\n" not in str(refused.value)


def test_what_transformers_cannot_load_is_written_dequantized_and_checked(packed, capsys, tmp_path):
    rounded, _ = packed("qwen2.5", "gptq")
    status = command.main(["check", str(rounded)])
    message = capsys.readouterr().err
    if status == 2:  # without the package that it needs for such files
        assert re.search(r"quant_method = 'gptq': transformers cannot load it here .*--out=FOLDER", message)
        assert message.count("\n") == 1
    assert command.main([str(rounded), f"--out={tmp_path / 'floats'}"]) == 0
    assert command.main(["check", str(tmp_path / "floats")]) == 0
