"""The study's techniques and axes: which of them a row belongs to, and its name in the study's tables."""

from efficientllm.report.rows import Row

AXES = ("attention", "position", "moe", "attention_free", "tuning", "inference")
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
}
# The study's name of a technique, by axis, where it differs from the registered name.
_STUDY_NAMES = {
    ("moe", "dense"): "dense-1.5b",
    ("moe", "moe"): "moe-1.5bx8-top2",
    ("attention_free", "gqa"): "transformer",
}
_KEYS = {
    "attention": "attention",
    "position": "position",
    "moe": "ffn",
    "attention_free": "attention",
    "tuning": "tuning",
    "inference": "precision",
}


def techniques(row: Row) -> dict[str, str | None]:
    """`{"attention": "mla", "position": "rope", "ffn": "dense", ...}` of a row's config."""
    text = f"{row.config.get('model.ffn')} {row.config.get('model.pattern')}"
    return {
        "attention": "pythia" if _is_pythia(row) else row.spec("model.mixer"),
        "position": row.spec("model.position"),
        "ffn": "moe" if "moe" in text else "dense",
        "tuning": _tuning(row),
        "precision": row.spec("quant") or row.spec("infer.precision") or row.spec("model.precision"),
        "scale": row.config.get("model.size"),
        "model": row.config.get("model.pretrained"),
    }


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
    used = techniques(row)
    if used["ffn"] == "moe":
        return "moe"
    if used["attention"] in (*_FREE, "pythia"):
        return "attention_free"
    return "attention" if used["position"] in ("rope", None) else "position"


def study_name(row: Row, axis: str) -> str | None:
    """The name of this row's technique in the study's tables of `axis`."""
    name = techniques(row)[_KEYS[axis]]
    return _STUDY_NAMES.get((axis, name), name)
