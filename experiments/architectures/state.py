"""Bytes of decode state of every mixer, by closed formula and in the arrays.

python experiments/architectures/state.py --size=1.5b --precision=bfloat16
"""

import argparse
import math

import jax

from efficientllm import base_config, model
from efficientllm.architecture import from_config
from efficientllm.config.presets import attention, mixers
from efficientllm.cost import formulas
from efficientllm.errors import exit_with

LENGTHS = (512, 4096, 16384)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.5b")
    parser.add_argument("--precision", default="bfloat16")
    options = parser.parse_args(argv)
    print(f"{options.size}, {options.precision}: bytes of state in all layers for one row, by tokens")
    print(f"{'':10}{'parameters':>16}" + "".join(f"{length:>16,}" for length in LENGTHS) + f"{'a token':>12}")
    for name, lm in models(options.size, options.precision).items():
        count = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(lm)))
        sizes = [state_bytes(lm, length) for length in LENGTHS]
        growth = (sizes[2] - sizes[1]) / (LENGTHS[2] - LENGTHS[1])
        print(f"{name:10}{count:>16,}" + "".join(f"{value:>16,}" for value in sizes) + f"{growth:>12,.0f}")


def models(size, precision):
    """The study's architectures at one size, with the block sizes of the papers."""
    names = {"mha": "mha", "gqa": "gqa", "mqa": "mqa", "mla": "mla", "nsa": "nsa", "window": "window(window=1024)"}
    configs = {name: attention.get_config("gqa") for name in names}
    for name, config in configs.items():
        config.model.mixer = names[name]
    configs |= {name: mixers.get_config(name) for name in mixers.VARIANTS}
    lms = {}
    for name, config in configs.items():
        config.model.size, config.model.precision, config.model.parameters_of = size, precision, ""
        lms[name] = from_config.from_config(config.model, base_vocabulary(size))
    return lms


def base_vocabulary(size):
    """A vocabulary for a size without one."""
    config = base_config.get_config()
    config.model.size = size
    return 2048 if from_config.from_config(config.model, 8).vocab_size == 8 else None


def state_bytes(lm, length):
    """Bytes of the state's arrays. Asserts that the formula gives the same."""
    states = jax.eval_shape(lambda: model.init_states(lm, 1, length))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))
    assert size == formulas.state_bytes(lm, length)
    return size


if __name__ == "__main__":
    exit_with(main)
