"""Command lines of the golden cases: tiny models of every family, in flags that a user could type.

Paths are relative to the repository's root, so that they are the same in every clone.
"""

DATA = "tests/golden/data"
STORED_RUN = f"{DATA}/run_v0.1"  # written once by the code of version 0.1 with the flags of STORED, and never again
STORED_MODEL = f"{DATA}/llama_v0.1"  # likewise: that run as the folder that efficientllm.convert makes of it
STORED_ADAPTER = f"{DATA}/adapter_v0.1"  # likewise: the adapter folder of the case lora
STORED_STEPS = 60

SIZE = "custom(num_layers=2, dim=32, num_heads=2, num_kv_heads=1, head_dim=16, hidden=64, rope_base=1e4)"
WITH_VOCABULARY = SIZE.replace("rope_base=1e4", "rope_base=1e4, vocab_size=257")
TRAIN = {
    "model.size": SIZE,
    "model.parameters_of": "",
    "data": f"text(path='{DATA}/texts/*.txt')",
    "tokenizer": "bytes",
    "train.steps": 3,
    "train.length": 32,
    "train.batch_size": 2,
    "train.log_every": 1,
    "eval.every": 3,
    "eval.batches": 2,
    "checkpoint.every": 3,
    "sample.tokens": 0,
}
STORED = TRAIN | {
    "train.steps": STORED_STEPS,
    "train.schedule": "constant(peak=0.01)",
    "eval.every": 30,
    "checkpoint.every": STORED_STEPS,
    "checkpoint.keep": 1,
}
TUNE = TRAIN | {"model.pretrained": STORED_MODEL, "model.size": "tiny", "train.schedule": "constant(peak=0.001)"}
TUNE["adapter"] = "lora(rank=4, alpha=8)"
INFER = {
    "model.pretrained": STORED_RUN,
    "tokenizer": "bytes",
    "data": TRAIN["data"],
    "train.length": 32,
    "eval.batches": 2,
    "infer.chat": False,
    "infer.prompts": ("Document 3. the", "quick brown fox"),
    "infer.max_new_tokens": 12,
    "infer.prompt_length": 8,
    "infer.repeats": 2,
}
ONE_LAYER = TRAIN | {"model.size": SIZE.replace("num_layers=2", "num_layers=1")}  # of what takes long to compile
EXPERTS = "hidden=32, load_balance=0.01, z_loss=0.001"

TRAINED = {
    "gqa": ("base", TRAIN | {"train.accumulate": 2, "sample.tokens": 4}),
    "mla": ("attention:mla", TRAIN | {"model.mixer": "mla(kv_rank=16, rope_dim=8)"}),
    "nsa": (
        "attention:nsa",
        ONE_LAYER
        | {"model.mixer": "nsa(compress_block=4, compress_stride=2, select_block=8, select_count=3, window=8)"},
    ),
    "moba_window": (
        "base",
        TRAIN
        | {
            "model.pattern": ("moba(block=8, block_count=2) | swiglu", "window(window=8) | swiglu"),
            "model.precision": "mixed",
        },
    ),
    "mamba": ("mixers:mamba", ONE_LAYER),
    "mamba2": ("mixers:mamba2", ONE_LAYER | {"model.mixer": "mamba2(state_dim=16, ssm_head_dim=16)"}),
    "rwkv": ("mixers:rwkv", ONE_LAYER | {"model.mixer": "rwkv(head_dim=16)"}),
    "pythia": ("mixers:pythia", TRAIN),
    "moe": (
        "moe",
        TRAIN
        | {
            "model.pattern": (
                f"gqa | moe(num_experts=4, top_k=2, dispatch='capacity', {EXPERTS})",
                f"gqa | moe(num_experts=4, top_k=2, dispatch='dropless', {EXPERTS})",
            )
        },
    ),
    "lora": ("tune:lora", TUNE),
    "qlora": ("tune:qlora", TUNE | {"quant": "nf4(block=32)"}),
}
SERVED = {
    "int4": ("infer:int4", INFER | {"quant": "int4(group=32)", "model.precision": "float32"}),
    "run_v0.1_served": ("infer:float32", INFER),
    "adapter_v0.1_served": ("infer:float32", INFER | {"model.pretrained": STORED_ADAPTER}),
}
PLAN = {
    "task": "plan",
    "model.size": WITH_VOCABULARY,
    "train.length": 32,
    "plan.hardware": "h100",
    "plan.devices": 8,
    "mesh": "data=2, fsdp=4",
}
NAMES = (*TRAINED, *SERVED, "run_v0.1_continued", "run_v0.1_converted", "run_v0.1_reported", "plan", "sweep")


def argv(config, values, workdir):
    """The command line of `efficientllm.main`."""
    return [f"--config={config}", f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in values.items())]
