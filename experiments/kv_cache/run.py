"""Time of a decode step and bytes of decode state for each mixer, at contexts of 512 to 16,384 tokens.

  python experiments/kv_cache/run.py --out=runs/kv_cache.jsonl
  python experiments/kv_cache/run.py --size=tiny --lengths=64,128 --blocks=2 --steps=4

Weights are random, and the batch is one row. The contestants of a context run in one process. A block decodes
`--steps` tokens with each in random order, from a state with room for the context. The state is zeros; values do not
change the time. Contexts that are already in the file are skipped, so that the same command resumes after a stop.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm import model
from efficientllm import model as models
from efficientllm.architecture import from_config
from efficientllm.config.presets import attention, mixers
from efficientllm.cost import device_peaks, formulas
from efficientllm.errors import UserError, exit_with
from efficientllm.infer import engine as engines
from efficientllm.infer.samplers import Greedy
from efficientllm.metrics import race
from efficientllm.record import provenance
from efficientllm.runtime.atomic_write import write_atomically

MIXERS = ("mha", "gqa", "mqa", "mla", "nsa", "mamba", "rwkv")
VOCABULARY = 2048  # for sizes without a vocabulary


def main(argv=None):
    options = _options(argv)
    settings = {"size": options.size, "precision": options.precision, "steps": options.steps, "blocks": options.blocks}
    file = pathlib.Path(options.out)
    rows = _read(file, settings)
    bandwidth = device_peaks.measure_copy_bandwidth().value
    for length in map(int, options.lengths.split(",")):
        if {row["mixer"] for row in rows if row["length"] == length} >= set(MIXERS):
            print(f"{length} tokens: measured before", file=sys.stderr)
            continue
        new = [settings | row | provenance.summary() for row in measure(length, options, bandwidth)]
        rows = [row for row in rows if row["length"] != length] + new
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))


def _options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--precision", default="float32", help="float32, mixed or bfloat16 (default: %(default)s)")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384", help="tokens of context")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded in one call")
    parser.add_argument("--blocks", type=int, default=11, help="timed calls of each contestant")
    parser.add_argument("--out", default="runs/kv_cache.jsonl", help="rows, one a line (default: %(default)s)")
    return parser.parse_args(argv)


def _read(file, settings):
    """Reads the rows of `file`. Raises UserError where they were measured with other settings."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if any(row[key] != value for row in rows for key, value in settings.items()):
        raise UserError(f"--out = {file}: has rows of other settings than {settings}; give another file")
    return rows


def described(name, size, precision):
    """The model with one mixer and as many parameters as with gqa."""
    config = (mixers if name in mixers.VARIANTS else attention).get_config(name)
    if name == "nsa" and size != "tiny":  # with the paper's blocks, tiny cannot match the parameters
        config.model.mixer = "nsa"
    config.model.size, config.model.precision = size, precision
    return from_config.from_config(config.model, VOCABULARY)


class Contestant:
    """A model whose state has `length` slots, of which the last `steps` are decoded."""

    def __init__(self, name, length, options):
        self.lm = described(name, options.size, options.precision)
        self.boxed = models.abstract_params(self.lm)
        self.params = jax.jit(lambda: nn.unbox(model.init_params(self.lm, jax.random.key(0), 8)))()
        self._engine = engines.Engine(self.lm, self.params, Greedy(), -1, length)
        self._length, self._steps = length, options.steps
        states = jax.jit(lambda: models.init_states(self._engine.lm, 1, length))()  # separate arrays: each is donated
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(states))
        keys_B = jax.random.split(jax.random.key(0), 1)
        at_B, done_B, seen_BV = jnp.zeros(1, jnp.int32), jnp.zeros(1, bool), jnp.zeros((1, 1), bool)
        logits_BV = jnp.zeros((1, self.lm.vocab_size))
        self._carry = engines.Carry(logits_BV, states, at_B, done_B, seen_BV, keys_B)

    def __call__(self, block):
        """Seconds per step, from one call of `steps` steps."""
        # A new array, because the last call donated the old one.
        carry = self._carry.replace(positions_B=jnp.array(np.array([self._length - self._steps], np.int32)))
        jax.block_until_ready(carry)
        begin = time.perf_counter()
        self._carry, tokens = self._engine.decode(carry, [[0]], self._steps)
        jax.block_until_ready((self._carry, tokens))
        return (time.perf_counter() - begin) / self._steps


def measure(length, options, bandwidth):
    """Measures every mixer at one context: a row each."""
    if options.steps >= length:
        raise UserError(f"--steps={options.steps} must be below the {length} tokens of context")
    contestants = {}
    for name in MIXERS:
        print(f"{length} tokens: {name}", file=sys.stderr, flush=True)
        contestants[name] = Contestant(name, length, options)
    progress = race.print_progress(options.blocks, label=f"{length} tokens: ")
    times = race.race(contestants, options.blocks, seed=length, after_block=progress)
    return [_row(name, length, contestants[name], times[name], bandwidth) for name in MIXERS]


def _row(name, length, contestant, seconds, bandwidth):
    lm, boxed, params = contestant.lm, contestant.boxed, contestant.params
    moved = formulas.decode_bytes(lm, boxed, params, 1, length)
    return {
        "mixer": name,
        "length": length,
        "parameters": formulas.count_parameters(lm, boxed)["total"],
        "step_s": seconds,
        "state_bytes": contestant.state_bytes,
        "state_bytes_model": formulas.state_bytes(lm, length),
        "bytes_a_step_model": moved,
        "least_s": moved / bandwidth,
        "copy_bandwidth": bandwidth,
    }


def table(rows):
    """Formats the rows as Markdown, with times relative to gqa at the same context."""
    lines = [
        "| tokens | mixer | parameters | state bytes | / formula | ms per token | / gqa | share of the memory bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    medians = {(row["length"], row["mixer"]): statistics.median(row["step_s"]) for row in rows}
    for row in rows:
        taken = medians[row["length"], row["mixer"]]
        ratio = taken / medians[row["length"], "gqa"]
        lines.append(
            f"| {row['length']:,} | {row['mixer']} | {row['parameters']:,} | {row['state_bytes']:,} | "
            f"{row['state_bytes'] / row['state_bytes_model']:.3f} | {1e3 * taken:.2f} | {ratio:.2f} | "
            f"{row['least_s'] / taken:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
