"""Ranges of numbers, and those allowed in the fields of spec strings; `config.key_ranges` has those of config keys.

Fractions are compared after rounding to float32, as a run uses them: 0.99999999 is 1, 1e39 is infinite, 1e-50 is 0.
"""

import math
import struct
import typing

from efficientllm.errors import UserError, short_repr

INT32_MAX = 2**31 - 1
WIDEST = 2**24  # of lengths and widths: larger arrays fit no device


class Range(typing.NamedTuple):
    """Numbers from `least` to `most`, both included, or strictly `above` and `below`; `note` explains a value."""

    whole: bool
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    note: str = ""

    def __contains__(self, value: typing.Any) -> bool:
        if not self.whole:
            value = as_float32(value)
            if not math.isfinite(value):
                return False
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = f"at least {self.least:,}" if self.least is not None else None
        low = f"above {self.above:,}" if self.above is not None else low
        high = f"at most {self.most:,}" if self.most is not None else None
        high = f"below {self.below:,}" if self.below is not None else high
        kind = "whole" if self.whole else None if low and high else "finite"
        *bounds, last = filter(None, (low, high, kind))
        text = f"{', '.join(bounds)} and {last}" if bounds else last
        return text + (f" ({self.note})" if self.note else "")


class TupleOf(typing.NamedTuple):
    """A tuple of numbers of one range."""

    element: Range

    def __contains__(self, values: typing.Any) -> bool:
        types = (int,) if self.element.whole else (int, float)
        return all(type(value) in types and value in self.element for value in values)

    def __str__(self) -> str:
        return f"a tuple of numbers, each {self.element}"


class Texts(typing.NamedTuple):
    """A tuple of texts, at least one."""

    def __contains__(self, values: typing.Any) -> bool:
        return len(values) > 0 and all(isinstance(value, str) for value in values)

    def __str__(self) -> str:
        return "a tuple of texts"


Ranges = dict[str, Range | TupleOf | Texts]  # by the name of a field


def whole(least: float = 0, most: float = INT32_MAX, note: str = "") -> Range:
    """Whole numbers from `least` to `most`."""
    return Range(True, least, most, note=note)


def real(
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    note: str = "",
) -> Range:
    """Finite numbers within the bounds."""
    return Range(False, least, most, above, below, note)


FINITE = real()
POSITIVE = real(above=0)
SHARE = real(0, 1)
MOMENTUM = real(0, below=1)
WIDTH = whole(1, WIDEST)
HEADS = whole(1, 2**16)
ROPE_BASE = real(above=1, note="the base of rotary frequencies")

# Of this package's techniques, by kind and field. A technique from elsewhere registers its own (`registry.register`).
FIELDS: dict[str, Ranges] = {
    "embed": {
        "patch": whole(1, 1024, "pixels"),
        "side": whole(0, WIDEST, "pixels; 0 is the data's"),
        "size": TupleOf(whole(1, WIDEST, "pixels, or frames")),
        "channels": whole(0, 2**16, "0 is the data's"),
        "classes": whole(0, 2**24, "0 is none"),
        "time_denominator": whole(1, 10_000),
        "ffn_norm_eps": real(0, note="0 is that of config.model.norm"),
        "tile": whole(1, 1024, "tokens"),
        "skip": whole(0, 1, "groups of blocks before the end"),
        "end_id": whole(-1, 2**31, "-1 is the largest id of a row"),
        "projection": whole(0, 2**20, "0 is none"),
        "text_length": whole(0, 2**16, "tokens of a text; 0 is none"),
        "text_dim": whole(0, 2**20, "width of the states of a text; 0 is none"),
        "pooled_dim": whole(0, 2**20, "width of the vector of a text; 0 is none"),
        "image_token": whole(0, 2**31),
    },
    "tower": {
        "num_layers": whole(1, 10_000),
        "dim": whole(1, 2**20),
        "num_heads": HEADS,
        "hidden": WIDTH,
        "projector_hidden": WIDTH,
        "patch": whole(1, 1024, "pixels"),
        "frames": whole(1, 1024),
        "channels": whole(1, 2**16),
        "grid": whole(0, 2**14, "patches; 0 is any size"),
        "window": whole(0, 2**10, "merge groups; 0 is none"),
        "merge": whole(1, 64, "patches"),
        "pattern": Texts(),
    },
    "size": {
        "num_layers": whole(1, 10_000),
        "dim": whole(1, 2**20),
        "num_heads": HEADS,
        "num_kv_heads": HEADS,
        "head_dim": HEADS,
        "hidden": WIDTH,
        "rope_base": ROPE_BASE,
        "norm_eps": POSITIVE,
        "vocab_size": WIDTH,
        "inner": WIDTH,
        "patch": whole(1, 1024, "pixels"),
    },
    "mixer": {
        **dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "ssm_head_dim", "num_groups"), HEADS),
        "text_length": whole(0, WIDEST, "tokens"),
        "hidden": WIDTH,
        "rope_dim": whole(0, 2**16, "0 rotates nothing"),
        "score_scale": real(0, note="0 is K^-1/2"),
        "bin": whole(1, 2**16, "slots"),
        **dict.fromkeys(("dim", "inner", "state_dim", "step_rank", "kv_rank", "q_rank", "v_dim"), whole(1, 2**20)),
        **dict.fromkeys(("decay_rank", "a_rank", "v_rank", "gate_rank"), whole(1, 2**20)),
        **dict.fromkeys(("chunk", "block", "block_count", "compress_block", "compress_stride", "select_block"), WIDTH),
        "select_count": whole(3, WIDEST, "the first block, the query's own and the one before it"),
        "window": whole(1, note="the query's own token is one"),
        "conv": whole(1, 1024, "taps"),
        "eps": POSITIVE,
    },
    "ffn": {
        "dim": whole(1, 2**20),
        "hidden": WIDTH,
        "num_experts": whole(1, 2**16),
        "top_k": whole(1, 2**16),
        "scale": POSITIVE,
        "groups": whole(1, 2**16),
        "top_groups": whole(1, 2**16),
        "shared_hidden": whole(0, WIDEST, "0 for no shared expert"),
        "load_balance": real(0),
        "z_loss": real(0),
        "bias_rate": real(0),
        "capacity_factor": real(above=0, most=2**16),
    },
    "position": {
        "max_length": WIDTH,
        "base": ROPE_BASE,
        "fraction": real(above=0, most=1, note="the share of a head that is rotated"),
        "wave_base": ROPE_BASE,
        "max_distance": WIDTH,
        "num_buckets": whole(2, 2**16),
        "table": whole(0, 2**17, "positions; 0 computes angles"),
        "sections": TupleOf(HEADS),
        "scale": POSITIVE,
    },
    "modulation": {"initial": real(note="of gates")},
    "rope_scaling": {
        **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "amplitude"), POSITIVE),
        **dict.fromkeys(("beta_fast", "beta_slow"), POSITIVE),
        **dict.fromkeys(("short_factor", "long_factor"), TupleOf(POSITIVE)),
        **dict.fromkeys(("mscale", "mscale_all_dim"), real(0, note="0 is not given")),
        "original_length": whole(1),
    },
    "norm": {"eps": POSITIVE},
    "quant": {
        "group": whole(0, 2**20, "0 is a whole column"),
        "block": whole(32, 2**20),
    },
    "optimizer": {"b1": MOMENTUM, "b2": MOMENTUM, "momentum": MOMENTUM, "eps": POSITIVE},
    "schedule": {
        "peak": real(0, note="the learning rate at its highest"),
        "steps": whole(1),
        "warmup": real(0, below=1, note="a share of the steps"),
        "final": real(0, 1, note="a share of the peak"),
    },
    "data": {
        "held_out": real(0, below=1, note="a share of the documents"),
        "document_size": whole(16, 2**40, "characters of a document"),
        "max_bytes": whole(1, 2**53),
        "sample": whole(1),
        "size": whole(1, 2**14, "pixels of a side"),
        "channels": whole(1, 3, "3 for RGB, 1 for gray"),
        "frames": whole(1, 10_000, "frames of a clip"),
        "stride": whole(1, 10_000, "every how many frames one is taken"),
        "shorter": TupleOf(whole(1, 10_000, "frames of a shorter clip")),
        "count": whole(1, 2**24, "charts, or records"),
        "digits": whole(1, 100),
        "max_pixels": whole(0, 2**40, "0 is the model's own limit"),
    },
    "tokenizer": {
        "vocab_size": whole(257, WIDEST, "the bytes and the end of text"),
        "sample_bytes": whole(1, 2**53),
    },
    "objective": {
        "steps": whole(2, WIDEST, "of the diffusion"),
        "beta": TupleOf(real(above=0, below=1)),
        "shift": POSITIVE,
        "mean": FINITE,
        "std": POSITIVE,
        "label_dropout": SHARE,
    },
    "solver": {
        "steps": whole(1, WIDEST),
        "eta": real(0, note="0 is deterministic, 1 has the noise of ddpm"),
        "shift": POSITIVE,
        "sigmas": TupleOf(SHARE),
    },
    "sampler": {
        "temperature": real(0, note="0 takes the likeliest token"),
        "top_k": whole(0, note="0 keeps all"),
        "top_p": real(above=0, most=1),
        "min_p": SHARE,
        "repetition_penalty": POSITIVE,
    },
    "text_states": {
        "length": whole(0, 2**16, "tokens; 0 is that of diffusers' pipeline"),
    },
    "autoencoder": {
        "tile": whole(0, WIDEST, "latent pixels; 0 computes the whole image at once"),
        "sweeps": whole(0, 1000),
        "chunk": whole(0, 2**20, "latent frames; 0 computes the whole clip at once"),
    },
    "adapter": {
        "rank": whole(1, 2**16),
        "alpha": POSITIVE,
        "dropout": real(0, below=1),
        "ratio": POSITIVE,
        "last": whole(0, 10_000),
        "first": whole(0, 10_000),
    },
}


def check_range(where: str, value: typing.Any, allowed: Range | TupleOf | Texts) -> None:
    """Raises UserError unless `value`, an int, a float or a tuple, lies in `allowed`."""
    if value not in allowed:
        raise UserError(f"{where} = {short_repr(value)}: must be {allowed}")


def as_float32(value: float) -> float:
    """Rounds to the nearest float32; infinite beyond its range."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
