"""Which of the study's techniques a row uses, and on which of its axes it lies."""

AXES = ("attention", "position", "moe", "attention_free", "tuning", "inference")
_FREE = ("mamba", "mamba2", "rwkv")
# The study's groups of rows by axis; a table's name for a technique of ours where it has another.
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


def techniques(row):
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
    """GPT-NeoX's block, by what it is made of and not by what it is called."""
    parts = {"mixer": "mha", "ffn": "gelu", "norm": "layernorm", "residual": "parallel"}
    return all(row.spec(f"model.{key}") == name for key, name in parts.items())


def axis(row):
    """The study's axis of a row: its sweep's name where that is one, else what the config changes."""
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


def study_name(row, axis):
    """What the study's tables of `axis` call this row's technique."""
    name = techniques(row)[_KEYS[axis]]
    return _STUDY_NAMES.get((axis, name), name)
