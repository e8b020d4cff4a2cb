"""The study's techniques and axes: which of them a row belongs to, and its name in the study's tables."""

from efficientllm.report.rows import Row, spec_name

AXES = ("attention", "position", "moe", "attention_free", "tuning", "inference", "images")
_FREE = ("mamba", "mamba2", "rwkv")
# The study's tables by axis.
TABLES = {
    "attention": ("attention_1.5b",),
    "position": ("position_1.5b",),
    "moe": ("moe",),
    "attention_free": ("attention_free_1.5b",),
    "tuning": ("tune_llama-3.2-1b_o1-sft", "tune_qwen2.5-14b_o1-sft"),
    "inference": (
        "quantization_deepseek-r1-distill-qwen-14b",
        "quantization_phi-4",
        "quantization_yi-34b",
        "quantization_qwen2.5-32b",
    ),
    "images": ("dit-xl-2_attention",),
}
# The study's name of a technique, by axis, where it differs from the registered name.
_STUDY_NAMES = {
    ("moe", "dense"): "dense-1.5b",
    ("moe", "moe"): "moe-1.5bx8-top2",
    ("attention_free", "gqa"): "transformer",
    ("images", "moe"): "moe-x8",
}
_KEYS = {
    "attention": "attention",
    "position": "position",
    "moe": "ffn",
    "attention_free": "attention",
    "tuning": "tuning",
    "inference": "precision",
    "images": "attention",
}


def techniques(row: Row) -> dict[str, str | None]:
    """`{"attention": "mla", "position": "rope", "ffn": "dense", ...}` of a row's config."""
    return {
        "attention": "pythia" if _is_pythia(row) else _mixers(row),
        "position": row.spec("model.position"),
        "ffn": "moe" if "moe" in _ffns(row) else "dense",
        "tuning": _tuning(row),
        "precision": row.spec("quant") or row.spec("infer.precision") or row.spec("model.precision"),
        "reads": row.reads,
        "scale": row.config.get("model.size"),
        "model": row.config.get("model.pretrained"),
    }


def _mixers(row):
    """The mixers in the blocks of `model.pattern`, joined where they differ: a hybrid is of none of its kinds."""
    names = dict.fromkeys(spec_name(block.partition("|")[0]) or row.spec("model.mixer") for block in _blocks(row))
    return "+".join(map(str, names)) if len(names) > 1 else next(iter(names))


def _ffns(row):
    return {spec_name(block.partition("|")[2]) or row.spec("model.ffn") for block in _blocks(row)}


def _blocks(row):
    """The blocks of `model.pattern`; what one does not name is `model.mixer` and `model.ffn`, as all without one."""
    pattern = row.config.get("model.pattern")
    return [str(block) for block in pattern] if isinstance(pattern, list) and pattern else [""]


def _tuning(row):
    if row.kind != "tune":
        return None
    return (row.spec("adapter") or "full").replace("_", "-")


def _is_pythia(row):
    """True for GPT-NeoX's block, recognised by its layers, not by the run's name."""
    layers = {"mixer": "mha", "ffn": "gelu", "norm": "layernorm", "residual": "parallel"}
    return all(row.spec(f"model.{key}") == name for key, name in layers.items())


def study_axis(row: Row) -> str:
    """The study's axis of a row: its sweep's name if that is an axis, else derived from the config."""
    if row.sweep.get("name") in AXES:
        return row.sweep["name"]
    if row.kind in ("tune", "infer"):
        return {"tune": "tuning", "infer": "inference"}[row.kind]
    if row.reads == "images":
        return "images"
    used = techniques(row)
    if used["ffn"] == "moe":
        return "moe"
    if used["attention"] in (*_FREE, "pythia"):
        return "attention_free"
    return "attention" if used["position"] in ("rope", None) else "position"


def study_name(row: Row, axis: str) -> str | None:
    """The name of this row's technique in the study's tables of `axis`."""
    used = techniques(row)
    name = used["ffn"] if axis == "images" and used["ffn"] == "moe" else used[_KEYS[axis]]
    return _STUDY_NAMES.get((axis, name), name)
