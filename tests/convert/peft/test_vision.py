"""Adapters of vision-language models: loaded by peft around transformers' models, and read under names old and new."""

import json
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import vision_folders as folders
from convert.peft.test_adapter_kinds import written
from convert.test_vision_parity import loaded, prompts
from efficientllm import convert, model
from efficientllm.convert import peft as folder
from efficientllm.convert.check_vision import reference_inputs
from efficientllm.errors import UserError
from efficientllm.vision.token_rows import make_batch
from tiers import slow_case, slow_except

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.xdist_group("vision")
FILE = "adapter_model.safetensors"
GRIDS = [(1, 4, 4), (1, 4, 4), (1, 4, 4)]
# As files and modules were named before transformers 5, of each family.
_LLAVA_LIKE = [
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.(vision_tower|multi_modal_projector)\.", r"\1."),
]
OLD = {
    "qwen2.5": [(r"model\.language_model\.", "model."), (r"model\.visual\.", "visual.")],
    "llava": _LLAVA_LIKE,
    "internvl": _LLAVA_LIKE,
}


def our_logits(lm, params, made):
    return np.asarray(jax.jit(lm.apply)({"params": params}, made.tokens_BT, made.ctx)[0])


def their_logits(tuned, lm, made, rows):
    with torch.no_grad():
        return tuned(**reference_inputs(lm, made, rows)).logits.numpy()


def close(ours, theirs, made):
    for i, row in enumerate(made.rows):
        length = len(row.ids_T)
        assert np.abs(ours[i, :length] - theirs[i, :length]).max() <= 1e-4 * np.abs(theirs).max()


@pytest.fixture(params=slow_except(list(OLD), "qwen2.5"))
def case(request):
    """`(family, source, model, a batch of rows with images, the rows)`."""
    source, lm, _ = loaded(request.param)
    rows = prompts(request.param, GRIDS)
    return request.param, source, lm, make_batch(lm, rows), rows


def read(lm, source, where):
    return folder.around(source, lm, source.load(nn.unbox(model.abstract_params(lm))), where)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["lora(rank=2)", slow_case("dora(rank=2, target='/mixer/(q|v)/')")])
def test_what_we_write_peft_loads_and_names_are_those_of_its_modules(case, spec, tmp_path):
    name, source, lm, made, rows = case
    _, params = written(source, spec, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(folders.build(name), tmp_path / "adapter").eval()
    modules = {module for module, _ in theirs.get_base_model().named_modules()}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] and set(config["target_modules"]) <= modules
    ours = our_logits(lm, params, made)
    close(ours, their_logits(theirs, lm, made, rows), made)
    close(our_logits(lm, read(lm, source, tmp_path / "adapter"), made), ours, made)
    assert np.abs(ours - our_logits(lm, loaded(name)[2], made)).max() > 1e-3


def test_names_of_older_files_are_read_and_no_tensor_is_passed_over(case, tmp_path):
    name, source, lm, made, _ = case
    _, params = written(source, "lora(rank=2, target='/mixer/(q|v)/')", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / FILE)

    def renamed(tensor):
        inner = tensor.removeprefix(folder.PREFIX)
        for pattern, old in OLD[name]:
            inner = re.sub(f"^{pattern}", old, inner)
        return folder.PREFIX + inner

    old = {renamed(tensor): array for tensor, array in tensors.items()}
    assert not old.keys() & tensors.keys()
    save_file(old, tmp_path / "adapter" / FILE)
    close(our_logits(lm, read(lm, source, tmp_path / "adapter"), made), our_logits(lm, params, made), made)
    save_file(
        {f"base_model.model.other.{i}.lora_A.weight": a for i, a in enumerate(tensors.values())},
        tmp_path / "adapter" / FILE,
    )
    with pytest.raises(UserError, match="belongs to nothing in the model: an adapter of another model"):
        read(lm, source, tmp_path / "adapter")


def test_peft_s_own_folder_is_read_and_merged(case, tmp_path):
    """The tower's modules too; a rank of one module is another."""
    name, source, lm, made, rows = case
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=r".*language_model.*(q_proj|down_proj)|.*multi_modal_projector.linear_1|.*merger.mlp.0",
        rank_pattern={"layers.1.self_attn.q_proj": 3},
        alpha_pattern={"layers.1.self_attn.q_proj": 6},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    tuned = peft.get_peft_model(folders.build(name), config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    convert.merge_into(source, tmp_path / "adapter", tmp_path / "merged")
    merged = convert.open_source(tmp_path / "merged")
    params = merged.load(nn.unbox(model.abstract_params(lm)))
    close(our_logits(lm, params, made), their_logits(tuned, lm, made, rows), made)
