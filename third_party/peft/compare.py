"""Step time and memory of fine-tuning with transformers + peft and with efficientllm.

  python third_party/peft/compare.py --model=smollm2-135m --methods=lora,dora,full --steps=5

Each contestant is a process with one model. Only one works at a time. A block is a step of each, in random order.
Ratios are of medians over blocks, with a 95 % bootstrap interval. Both read the same weights, start from B = 0 and see
the same batches; their first losses must agree before anything is timed. Memory is the peak of a process's resident
memory less that before the model was read. Methods run one after another.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import pydoc_data.topics
import statistics
import tempfile
import time

from efficientllm.errors import exit_with
from efficientllm.metrics import race
from efficientllm.runtime import malloc

TOLERANCES = {"float32": 2e-3, "mixed": 2e-2, "bfloat16": 2e-2}  # nats, of the first loss
RANK, ALPHA, RATE = 16, 32, 1e-4


def main(argv=None):
    options = _options(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = _folder(options.model, pathlib.Path(folder) / "model")
        results = {method: compare(method, model, options) for method in options.methods.split(",")}
    print(table(results))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="as config.model.pretrained")
    parser.add_argument("--methods", default="lora,dora,full")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each contestant")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--precision",
        choices=TOLERANCES,
        default="float32",
        help="of efficientllm; peft multiplies in bfloat16 for the other two; for the last, frozen weights are too",
    )
    parser.add_argument("--json", help="file for every number")
    return parser.parse_args(argv)


def _folder(model, folder):
    """The model as a folder that transformers reads."""
    from efficientllm import convert

    source = convert.open_source(model)
    if source.path.is_dir():
        return str(source.path)
    convert.convert(source, folder, dtype="float32")
    return str(folder)


def compare(method, model, options):
    """Runs the race of one method: losses, seconds and peaks by contestant, and the ratios peft / efficientllm."""
    settings = {"ours": malloc.settings()}  # as efficientllm.main
    processes = {
        name: race.Process(_trainer, name, method, model, options, environment=settings.get(name))
        for name in ("peft", "ours")
    }
    first = {name: process.ask(0)[1] for name, process in processes.items()}
    if abs(first["peft"] - first["ours"]) > TOLERANCES[options.precision]:
        raise SystemExit(f"{method}: the first losses differ: {first}")
    steppers = {name: functools.partial(_step, process) for name, process in processes.items()}
    seconds, _ = race.columns(race.race(steppers, options.steps))
    peaks = {name: process.ask("peak") for name, process in processes.items()}
    for process in processes.values():
        process.close()
    return {
        "first_loss": first,
        "step_s": seconds,
        "peak_bytes": peaks,
        "time_ratio": race.ratio_of_medians(seconds["peft"], seconds["ours"]),
        "memory_ratio": peaks["peft"] / peaks["ours"],
    }


def _step(process, block):
    return process.ask(block + 1)  # the first loss was step 0


def _trainer(name, method, model, options):
    """Builds a contestant in its process: a function of "peak" (bytes) or of a step's number (seconds, loss)."""
    from efficientllm.metrics import host

    trainer, before = (_peft if name == "peft" else _ours)(method, model, options, host)

    def answer(question):
        if question == "peak":
            return host.peak_rss_bytes() - before
        batch = _batch(question, options)
        begin = time.perf_counter()
        loss = trainer(batch)
        return time.perf_counter() - begin, loss

    return answer


def _batch(step, options):
    """Token ids of a step, equal for both: bytes of the Python documentation, so that no tokenizer is needed."""
    import numpy as np

    text = "".join(pydoc_data.topics.topics.values()).encode()
    size = options.batch * options.length
    return np.frombuffer(text[step * size : (step + 1) * size], np.uint8).astype(np.int32).reshape(options.batch, -1)


def _peft(method, model, options, host):
    import peft
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    before = host.rss_bytes()
    dtype = torch.bfloat16 if options.precision == "bfloat16" and method != "full" else torch.float32
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
    if method != "full":
        kinds = {"use_dora": method == "dora", "use_rslora": method == "rslora"}
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **kinds)
        plain = peft.get_peft_model(plain, config)
    plain.train()
    learnt = [tensor for tensor in plain.parameters() if tensor.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(tokens):
        # Both train on the same positions. Else transformers would run the last token too, which has no target.
        ids = torch.from_numpy(tokens).long()
        inputs, targets = ids[:, :-1], ids[:, 1:].contiguous()
        half = options.precision != "float32"
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            loss = plain(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step, before


def _ours(method, model, options, host):
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np

    from efficientllm import base_config, sharding
    from efficientllm import model as models
    from efficientllm.objectives.next_token import NEXT_TOKEN
    from efficientllm.run_description import describe_run
    from efficientllm.runtime import malloc
    from efficientllm.train import setup, step

    before = host.rss_bytes()
    config = base_config.get_config()
    config.model.pretrained, config.model.precision = model, options.precision
    config.quant = "bfloat16" if options.precision == "bfloat16" and method != "full" else "float32"
    config.adapter = method if method == "full" else f"{method}(rank={RANK}, alpha={ALPHA})"
    config.train.schedule, config.train.decay = f"constant(peak={RATE})", ((".*", 0.0),)
    config.train.optimizer, config.train.length = "adamw(b1=0.9, b2=0.95)", options.length - 1
    config.train.batch_size = options.batch
    config.mesh, config.tokenizer = "data=1", "bytes"  # no text is read
    described = describe_run(config, jax.devices()[:1])
    source, tuned, lm, mesh = described.source, described.method, described.lm, described.mesh
    jax.set_mesh(mesh)
    boxed = models.abstract_params(lm)
    abstract = jax.eval_shape(step.init_state(lm, config.train, 0, options.length - 1, tuned, config.quant))
    where = sharding.shardings(abstract, mesh)
    run = setup.Setup(
        config=config, mesh=mesh, objective=NEXT_TOKEN, objective_spec="next_token()", dataset=None, lm=lm,
        models=(lm,), length=options.length - 1, batches=None, eval_batches=None, also_batches=(), method=tuned,
        source=source, boxed=boxed, shaped=None, shardings=where, new_parts=(), data={}, rss_before=before,
    )  # fmt: skip
    shaped = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), nn.unbox(abstract), where
    )
    batch = NEXT_TOKEN.batch_shapes(lm, options.batch, options.length - 1, mesh)
    # As in a run, the step is compiled from shapes before weights are read.
    train = step.jit_train_step(lm, config.train, mesh, where, tuned).lower(shaped, batch).compile()
    malloc.trim()
    state = setup.create_state(run)

    def step_once(tokens):
        nonlocal state
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": np.ones((rows, length), np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
            "weights": np.ones((rows, length), np.float32),
        }
        state, metrics = train(state, jax.tree.map(jnp.asarray, batch))
        jax.block_until_ready(state.params)
        return float(metrics["loss"])

    return step_once, before


def table(results):
    lines = [
        f"{'method':8}{'peft s':>9}{'ours s':>9}{'time ratio (95 %)':>24}{'peft GB':>10}{'ours GB':>10}{'ratio':>8}"
    ]
    for method, result in results.items():
        theirs, ours = (statistics.median(result["step_s"][name]) for name in ("peft", "ours"))
        sizes = [result["peak_bytes"][name] / 1e9 for name in ("peft", "ours")]
        lines.append(
            f"{method:8}{theirs:9.2f}{ours:9.2f}{str(result['time_ratio']):>24}{sizes[0]:10.2f}"
            f"{sizes[1]:10.2f}{result['memory_ratio']:8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
