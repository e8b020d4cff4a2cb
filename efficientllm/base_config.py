"""Base config: every config key, with defaults that train a dense `tiny` model on any machine.

A config file calls `get_config()` and changes some values. `config.schema` refuses keys that are not here.
"""

import typing

from ml_collections import ConfigDict

from efficientllm.errors import UserError, did_you_mean


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "base"
    config.task = "pretrain"
    config.seed = 0
    config.imports = ()  # files or modules that register techniques of your own
    config.mesh = "data=-1"  # sizes of the axes data, fsdp, expert, tensor, sequence; -1 is all remaining devices
    config.compile_cache = True  # compiled programs are kept in the user's cache folder, and loaded by later runs
    config.memory_gb = 0.0  # memory a run may take, in GB per accelerator; 0 is what is free

    config.model = ConfigDict()
    config.model.pretrained = ""  # a folder, a GGUF file, a hub id or smollm2-135m: where the model comes from
    config.model.size = "tiny"
    config.model.mixer = "gqa"
    config.model.ffn = "swiglu"
    # For hybrids: ("gqa", "mqa | moe(...)"), repeated over the layers; ("2 * gqa", "10 * mqa | moe(...)") one after
    # another; "gqa + mamba" are parallel mixers.
    config.model.pattern = ()
    config.model.parameters_of = ""  # "mixer | ffn": chooses widths so that a block has as many parameters as this one
    config.model.residual = "sequential"  # or parallel: mixer and ffn read the same input
    config.model.position = "rope"
    config.model.norm = "rmsnorm"
    config.model.tied = True
    config.model.embed_norm = False  # a norm after the embedding
    config.model.precision = "float32"  # float32, bfloat16, mixed; auto is what the machine has instructions for
    config.model.attention_kernel = "auto"
    config.model.kv_cache = "activation"  # dtype of the KV cache: activation, bfloat16, float16, int8
    config.model.remat = "none"  # none, full, or a policy of jax.checkpoint_policies
    config.model.scan = True
    # A CPU compiles up to so many groups of layers one after another, one GPU more; 0 is always a loop.
    config.model.unroll = 12

    config.model.embed = "tokens"  # the ends: tokens, or patches(...) of pictures
    config.model.modulation = "plain"  # or linear (adaLN-Zero), table, layerscale: how conditioning reaches the blocks

    config.objective = "next_token()"  # or flow(...), ddpm(...), pretrained: what is, or was, minimised

    config.adapter = "full"  # trainable parameters: full, freeze(last=2), lora(rank=8), dora, pissa...

    config.quant = "float32"  # format of frozen weights: bfloat16, int8(...), int4(...), nf4(...), stored...

    config.data = "python_docs()"
    config.autoencoder = "pixels"  # of pictures: what their model sees; or kl(path=...), wan(path=...)
    config.text_states = ""  # of prompts and captions: encoders(...) of the model's pipeline, or folder(path=...)
    config.tokenizer = "bpe(vocab_size=2048)"  # or pretrained: that of the checkpoint

    config.train = ConfigDict()
    config.train.steps = 200
    config.train.batch_size = 8  # sequences per step, over all devices and micro-batches
    config.train.length = 128  # tokens per sequence
    config.train.accumulate = 1  # micro-batches per step; the load-balance loss is computed within each
    config.train.log_every = 10
    config.train.optimizer = "adamw(b1=0.9, b2=0.95)"
    config.train.schedule = "cosine(peak=0.003, warmup=0.1, final=0.1)"  # warmup as a share of steps, final of peak
    config.train.clip = 1.0  # global gradient norm; 0 does not clip
    config.train.ema = 0.0  # decay of a moving average of the parameters, which is then what is evaluated; 0 is none
    config.train.decay = (("kernel$", 0.1), (".*", 0.0))  # weight decay: first match wins, all must match
    config.train.rates = ((".*", 1.0),)  # learning-rate factors, matched likewise

    config.eval = ConfigDict()
    config.eval.every = 100
    config.eval.also = ""  # other data, whose held-out loss is read at the end: what tuning has not forgotten
    config.eval.batches = 16  # 0 is all of the held-out text; of pictures in buckets, batches of each

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 100
    config.checkpoint.keep = 2  # keeps the last n and the best by held-out loss; 0 removes all at the end

    config.sample = ConfigDict()
    config.sample.prompt = "The function returns"
    config.sample.tokens = 64  # 0 for no sample
    config.sample.temperature = 0.8
    config.sample.images = 16  # pictures of a diffusion model, of each prompt if it has any; 0 for none

    config.infer = ConfigDict()
    config.infer.prompts = ("What is a context manager?",)  # texts, or a file: .txt, or .jsonl with `prompt`
    config.infer.negative_prompt = ""  # of pictures: what guidance leads away from
    config.infer.chat = False  # prompts go through the tokenizer's chat template
    config.infer.max_new_tokens = 64
    config.infer.sampler = "greedy"  # or sample(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05)
    config.infer.solver = ""  # of diffusion models: euler(steps=28), ddim(steps=50)...; "" is the objective's
    config.infer.guidance = 1.0  # classifier-free guidance; 1 is none
    config.infer.guidance_channels = 0  # the first channels that are guided; 0 is all
    config.infer.size = ()  # of pictures: (height, width) in pixels, of clips (frames, height, width); () is the usual
    config.infer.fps = 16.0  # frames of a clip a second
    config.infer.offload = False  # weights of a pipeline that are not needed at a time live in the host's memory
    config.infer.max_pixels = 0  # what pictures in prompts are shrunk to at most; 0 is the model's own limit
    config.infer.stop = ()  # texts that end a completion
    config.infer.batch_size = 1  # prompts per measured batch
    config.infer.prompt_length = 128  # tokens of a measured prompt
    config.infer.repeats = 5  # measured batches
    config.infer.rules = ()  # (regex, format) pairs that override config.quant for matching kernels and tables
    config.infer.baseline = "float32"  # baseline of MCR: a weight format scored in the same run, or a record.json

    config.plan = ConfigDict()  # for task = plan
    config.plan.hardware = "cpu"  # or h100, gh200_96, v5e... of cost/data/hardware.json
    config.plan.devices = 1
    config.plan.of = "pretrain"  # or tune, infer: the task whose step or request is planned
    config.plan.images = ()  # (height, width) of each picture in a row or prompt of a vision-language model
    config.plan.calibration = ""  # a folder of runs measured on that hardware, or the file made from one

    config.quality = ConfigDict()
    config.quality.tasks = ()  # of the lm-evaluation-harness; "study" is the study's six and their mean
    config.quality.limit = 0  # examples a task; 0 is all of them
    config.quality.batch_size = 8
    config.quality.include = ""  # a folder with your own tasks
    config.quality.fd = 0  # pictures sampled at the end for the distance from the training set, fd_own; 0 for none
    config.quality.results = ""  # a results.json of the harness, added to the row

    config.profile = ConfigDict()
    config.profile.steps = ""  # FIRST:LAST, such as 10:13: steps that are traced, and whose operations are shown

    config.metrics = ConfigDict()
    config.metrics.meter = ""  # a CSV of (unix time in s, W) that a power meter writes during the run
    config.metrics.interval_s = 0.1  # seconds between samples of power, memory and utilisation
    config.metrics.price = 0.0  # $ per device hour; 0 is unknown. A CPU's cores are one device
    config.metrics.carbon = ""  # GRAMS g/kWh, SOURCE, such as "381 g/kWh, Ember 2025, Germany"; "" is unknown
    return config


def variant(variants: dict[str, typing.Any], name: str) -> typing.Any:
    """Selects the variant of a config file, `--config=FILE:NAME`. Raises UserError that lists the names."""
    if name not in variants:
        raise UserError(f"no variant {name!r}; known: {', '.join(variants)}{did_you_mean(name, variants)}")
    return variants[name]
