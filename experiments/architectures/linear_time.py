"""Growth of one layer's time with sequence length, forward and backward.

  python experiments/architectures/linear_time.py --specs="gqa;mamba;mamba2;rwkv(head_dim=64)"

Measured as in attention_crossover.py. The printed power is fitted over the last four lengths: 1 is linear, 2 is
quadratic.
"""

import argparse
import json
import math

import attention_crossover
import numpy as np

from efficientllm.errors import exit_with
from efficientllm.record import provenance


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default="gqa;mamba;mamba2;rwkv(head_dim=64)", help="mixers, separated by ;")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192", help="tokens of the row")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=5, help="timed passes of each contestant")
    options = parser.parse_args(argv)
    arguments = [f"--dim={options.dim}", f"--blocks={options.blocks}", "--heads=4", "--kv_heads=2"]
    shared_options = attention_crossover.parse_options(arguments)
    specs = {spec.partition("(")[0]: spec for spec in options.specs.split(";")}
    lengths = [int(length) for length in options.lengths.split(",")]
    rows = [attention_crossover.measure(specs, length, shared_options) for length in lengths]
    print("| layer | " + " | ".join(f"{length}" for length in lengths) + " | power | temporaries MB |")
    print("|---" * (len(lengths) + 3) + "|")
    for name in specs:
        seconds = [row["seconds"][name] for row in rows]
        print(
            f"| {name} | "
            + " | ".join(f"{value:.3f}" for value in seconds)
            + f" | {power(lengths[-4:], seconds[-4:]):.2f} | {rows[-1]['temporary_mb'][name]:.0f} |"
        )
    print(json.dumps(provenance.summary() | vars(options)))


def power(lengths, seconds):
    """The slope of log time over log length."""
    return np.polyfit([math.log(length) for length in lengths], [math.log(value) for value in seconds], 1)[0]


if __name__ == "__main__":
    exit_with(main)
