"""Tensor name tables of vision-language models; see `name_tables`. Paths of the tower begin with `vision/`.

Files have several generations of names. A table has those of the hub, which every version of transformers reads, and
`rename` maps the others to them. `..._MODULES` map them to the names of transformers' modules of today, by which
adapters are saved.
"""

import re
from collections.abc import Sequence

from efficientllm.convert.tensors.headless_names import RenamedTensors
from efficientllm.convert.tensors.name_tables import LLAMA
from efficientllm.convert.tensors.table_entries import Table, linear, norm, patches, plain, swiglu, within
from efficientllm.convert.tensors.tensor_reader import TensorReader

Renames = Sequence[tuple[str, str]]  # (regular expression, replacement), in turn

_QWEN_TOWER = within(
    "visual.",
    {"patch_embed.proj.weight": (("vision/patch/kernel",), "video_patch")},
    norm("merger.ln_q", "vision/projector/norm"),
    linear("merger.mlp.0", "vision/projector/0"),
    linear("merger.mlp.2", "vision/projector/2"),
    within(
        "blocks.{layer}.",
        norm("norm1", "vision/mixer_norm"),
        norm("norm2", "vision/ffn_norm"),
        linear("attn.qkv", "vision/mixer/q", "vision/mixer/k", "vision/mixer/v"),
        linear("attn.proj", "vision/mixer/o"),
    ),
)
QWEN2_5_VL = LLAMA | _QWEN_TOWER | within("visual.blocks.{layer}.", swiglu("mlp.", "vision/ffn"))
QWEN2_VL = LLAMA | _QWEN_TOWER
QWEN2_VL |= within("visual.blocks.{layer}.mlp.", linear("fc1", "vision/ffn/up"), linear("fc2", "vision/ffn/down"))
QWEN_MODULES: Renames = ((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual."))
QWEN_RENAMES: Renames = (
    (r"^model\.visual\.", "visual."),
    (r"^(model\.)?language_model\.", "model."),
)


def _blocks(prefix: str, norms: Sequence[str], attention: Sequence[str]) -> Table:
    """The blocks of CLIP's and InternViT's towers: two norms, four projections, two maps of the ffn."""
    tables = [norm(disk, f"vision/{path}") for disk, path in zip(norms, ("mixer_norm", "ffn_norm"), strict=True)]
    tables += [linear(disk, f"vision/mixer/{path}") for disk, path in zip(attention, "qkvo", strict=True)]
    tables += [linear(f"mlp.{disk}", f"vision/ffn/{path}") for disk, path in (("fc1", "up"), ("fc2", "down"))]
    return within(prefix, *tables)


_PROJECTOR = within(
    "multi_modal_projector.",
    norm("layer_norm", "vision/projector/norm"),
    linear("linear_1", "vision/projector/0"),
    linear("linear_2", "vision/projector/2"),
)
_DECODER = within("language_model.", LLAMA)
LLAVA = (
    _DECODER
    | _PROJECTOR
    | within(
        "vision_tower.vision_model.",
        plain("embeddings.class_embedding", "vision/class_token"),
        patches("embeddings.patch_embedding", "vision/patch"),
        plain("embeddings.position_embedding.weight", "vision/position/table"),
        norm("pre_layrnorm", "vision/embed_norm"),
        _blocks(
            "encoder.layers.{layer}.",
            ("layer_norm1", "layer_norm2"),
            [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")],
        ),
    )
)
INTERNVL = (
    _DECODER
    | _PROJECTOR
    | within(
        "vision_tower.",
        {"embeddings.cls_token": (("vision/class_token",), "leading")},
        patches("embeddings.patch_embeddings.projection", "vision/patch"),
        {"embeddings.position_embeddings": (("vision/position/table",), "tables")},
        norm("layernorm", "vision/norm"),
        _blocks(
            "encoder.layer.{layer}.",
            ("layernorm_before", "layernorm_after"),
            [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "projection_layer")],
        ),
        within(
            "encoder.layer.{layer}.",
            norm("attention.q_norm", "vision/mixer/q_norm"),
            norm("attention.k_norm", "vision/mixer/k_norm"),
            plain("lambda_1", "vision/modulation/mixer_gate"),
            plain("lambda_2", "vision/modulation/ffn_gate"),
        ),
    )
)
# InternVL as OpenGVLab publishes it.
INTERNVL_CHAT = (
    _DECODER
    | norm("mlp1.0", "vision/projector/norm")
    | linear("mlp1.1", "vision/projector/0")
    | linear("mlp1.3", "vision/projector/2")
    | within(
        "vision_model.",
        {"embeddings.class_embedding": (("vision/class_token",), "leading")},
        patches("embeddings.patch_embedding", "vision/patch"),
        {"embeddings.position_embedding": (("vision/position/table",), "tables")},
        within(
            "encoder.layers.{layer}.",
            norm("norm1", "vision/mixer_norm"),
            norm("norm2", "vision/ffn_norm"),
            linear("attn.qkv", "vision/mixer/q", "vision/mixer/k", "vision/mixer/v"),
            linear("attn.proj", "vision/mixer/o"),
            norm("attn.q_norm", "vision/mixer/q_norm"),
            norm("attn.k_norm", "vision/mixer/k_norm"),
            plain("ls1", "vision/modulation/mixer_gate"),
            plain("ls2", "vision/modulation/ffn_gate"),
            linear("mlp.fc1", "vision/ffn/up"),
            linear("mlp.fc2", "vision/ffn/down"),
        ),
    )
)
_LLAVA_LIKE: Renames = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)
LLAVA_RENAMES: Renames = (*_LLAVA_LIKE, (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."))
INTERNVL_RENAMES: Renames = _LLAVA_LIKE
_OF_LLAVA_LIKE: Renames = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
LLAVA_MODULES: Renames = (
    *_OF_LLAVA_LIKE,
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
INTERNVL_MODULES: Renames = (*_OF_LLAVA_LIKE, (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."))


def renamed(name: str, renames: Renames) -> str:
    """Returns a name after all replacements, in turn."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def rename(tensors: TensorReader, renames: Renames) -> TensorReader:
    """Gives tensors the names of the hub's files; a tensor whose name another has already keeps its own."""
    names: dict[str, str] = {}
    for stored in tensors.shapes:
        name = renamed(stored, renames)
        names[stored if name in names or (name != stored and name in tensors.shapes) else name] = stored
    return tensors if all(name == stored for name, stored in names.items()) else RenamedTensors(tensors, names)
