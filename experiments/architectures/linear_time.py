"""How the time of one layer grows with the length of the row, forward and backward.

  python experiments/architectures/linear_time.py --specs="gqa;mamba;mamba2;rwkv(head_dim=64)"

As attention_crossover.py measures, all in one process and in turn. A layer's time grows with the power of the length
that is printed: 1 is linear, 2 quadratic; fitted over the last four lengths.
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
    ours = parser.parse_args(argv)
    arguments = [f"--dim={ours.dim}", f"--blocks={ours.blocks}", "--heads=4", "--kv_heads=2"]
    options = attention_crossover.parse_options(arguments)
    specs = {spec.partition("(")[0]: spec for spec in ours.specs.split(";")}
    lengths = [int(length) for length in ours.lengths.split(",")]
    rows = [attention_crossover.measure(specs, length, options) for length in lengths]
    print("| layer | " + " | ".join(f"{length}" for length in lengths) + " | power | temporaries MB |")
    print("|---" * (len(lengths) + 3) + "|")
    for name in specs:
        seconds = [row["seconds"][name] for row in rows]
        print(
            f"| {name} | "
            + " | ".join(f"{value:.3f}" for value in seconds)
            + f" | {power(lengths[-4:], seconds[-4:]):.2f} | {rows[-1]['temporary_mb'][name]:.0f} |"
        )
    print(json.dumps(provenance.summary() | vars(ours)))


def power(lengths, seconds):
    """The slope of log time over log length."""
    return np.polyfit([math.log(length) for length in lengths], [math.log(value) for value in seconds], 1)[0]


if __name__ == "__main__":
    exit_with(main)
