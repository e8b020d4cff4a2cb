"""`Sweep`, the description of a comparison, and its runs: variants in randomised blocks around a baseline."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import random
import traceback
import typing
from collections.abc import Collection, Iterator, Sequence

from efficientllm.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A comparison of variants; returned by a sweep config's `get_config()`.

    Args:
      name: of the sweep.
      variants: `{name: "configs/attention.py:mla"}`, or `{name: ("configs/base.py", {"model.mixer": "mla"})}` with
        overrides of `config`.
      baseline: the variant that the others are compared with; it runs first and last in each block.
      seeds: one block for each.
      repeats: blocks of each seed.
      overrides: of `config`, for every variant.
      equal: `{"tokens": 0.0, "parameters": 0.02}`: the allowed relative difference from the baseline of `tokens`,
        `parameters`, `active` (parameters) or `flops` (of a step).
      twice: run the baseline at both ends of a block, which shows drift within the block.
      timeout_s: of a run, in seconds.
      memory_gb: a run with more resident memory is stopped as out of memory; 0 is nine tenths of the machine's.
      search: `("train.batch_size", 1, 4096)` or `("train.length", 128, 1048576)`: instead of blocks, find the
        largest value between the two with which each variant runs.
      grid: `("train.schedule", ("constant(peak=1e-4)", "constant(peak=1e-3)"))`: before the blocks, every variant runs
        with every value at the first seed, and keeps the value with the least held-out loss.
      measures: "quality" for long runs whose losses alone count, on any machine beside any work; "cost" for short
        runs on a machine at rest whose times, energy and memory alone count; "" for both. A report joins a quality
        sweep and a cost sweep of the same variants.
    """

    name: str
    variants: dict[str, str | tuple[str, dict]]
    baseline: str
    seeds: tuple[int, ...] = (0, 1, 2)
    repeats: int = 1
    overrides: dict[str, typing.Any] = dataclasses.field(default_factory=dict)
    equal: dict[str, float] = dataclasses.field(default_factory=dict)
    twice: bool = True
    timeout_s: float = 3600.0
    memory_gb: float = 0.0
    search: tuple = ()
    grid: tuple = ()
    measures: str = ""

    def __post_init__(self):
        self._check_types()
        if self.baseline not in self.variants:
            hint = did_you_mean(self.baseline, self.variants)
            raise UserError(f"sweep {self.name}: baseline = {self.baseline!r} is none of its variants{hint}")
        if unknown := set(self.equal) - set(EQUAL):
            raise UserError(f"sweep {self.name}: equal = {sorted(unknown)}: known are {', '.join(EQUAL)}")
        if not self.seeds or self.repeats < 1 or self.timeout_s <= 0:
            raise UserError(f"sweep {self.name}: it needs a seed, repeats of at least 1 and a timeout_s above 0")
        if self.search:
            self._check_search()
        if self.grid:
            self._check_grid()

    def _check_types(self):
        """Raises UserError for a field of a wrong type."""
        for key, (is_right, wanted) in FIELDS.items():
            if not is_right(getattr(self, key)):
                raise UserError(f"sweep {self.name}: {key} = {getattr(self, key)!r}: needed is {wanted}")

    def _check_search(self):
        key, least, most = self.search if len(self.search) == 3 else ("", 0, 0)
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (least, most))
        if key not in SEARCHED or not whole or not 1 <= least <= most:
            raise UserError(
                f"sweep {self.name}: search = {self.search!r}: needed are a key ({', '.join(SEARCHED)}), the least "
                "value and the largest one"
            )

    def _check_grid(self):
        key, values = self.grid if len(self.grid) == 2 else ("", ())
        if self.search or not key or not isinstance(values, tuple | list) or len(values) < 2:
            raise UserError(
                f"sweep {self.name}: grid = {self.grid!r}: needed are a key and two values or more, without a search"
            )


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_name(value):
    """True for a name that can be a folder's: no path, no separator."""
    return isinstance(value, str) and value.strip() not in ("", ".", "..") and not set(value) & set("/\\\0\n")


def _are_seeds(seeds):
    whole = isinstance(seeds, tuple | list) and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds)
    return whole and len(set(seeds)) == len(seeds)


def _are_variants(variants):
    def is_entry(entry):
        if isinstance(entry, tuple | list):
            return len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], dict)
        return isinstance(entry, str)

    return isinstance(variants, dict) and all(_is_name(k) and is_entry(v) for k, v in variants.items()) and variants


_DICT = (lambda value: isinstance(value, dict), "a dict")
_TUPLE = (lambda value: isinstance(value, tuple | list), "a tuple")
# Check of each field of a Sweep, and its description; conditions between fields are checked later.
FIELDS = {
    "name": (_is_name, "a name that can be a folder's, without a slash"),
    "variants": (_are_variants, "a dict of names (no slash in them) to 'configs/FILE.py:ARG' or (that, {key: value})"),
    "seeds": (_are_seeds, "a tuple of whole numbers, each once, such as (0, 1, 2)"),
    "repeats": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "overrides": _DICT,
    "equal": (
        lambda value: isinstance(value, dict) and all(_is_number(share) and share >= 0 for share in value.values()),
        "a dict of a number to the share that it may differ by, such as {'tokens': 0.0}",
    ),
    "twice": (lambda value: isinstance(value, bool), "True or False"),
    "timeout_s": (_is_number, "a number of seconds"),
    "memory_gb": (lambda value: _is_number(value) and value >= 0, "a number of GB, 0 for nine tenths of the machine's"),
    "search": _TUPLE,
    "grid": _TUPLE,
    "measures": (lambda value: value in ("", "quality", "cost"), "'quality', 'cost', or '' for both"),
}
SEARCHED = ("train.batch_size", "train.length")
EQUAL = ("tokens", "parameters", "active", "flops")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, one process: a variant at its place in a block."""

    sweep: str
    variant: str
    baseline: str
    block: int
    order: int
    seed: int
    argv: tuple[str, ...]
    grid: str = ""  # the flag under trial in a grid search
    search: str = ""  # the flag under trial in a search for the largest value
    measures: str = ""

    @property
    def folder(self) -> str:
        """Name of the run's folder; a hash makes it different for any other run."""
        content = json.dumps([self.block, self.order, self.seed, self.argv])
        return f"{self.block:02}-{self.order:02}-{self.variant}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    @property
    def place(self) -> dict[str, typing.Any]:
        """The `sweep` entry of the run's row."""
        return {
            "name": self.sweep,
            "variant": self.variant,
            "baseline": self.baseline,
            "block": self.block,
            "order": self.order,
            "seed": self.seed,
            **{key: flag for key, flag in self._flags().items() if flag},
        }

    def _flags(self):
        return {"grid": self.grid, "search": self.search, "measures": self.measures}


def argv_of(sweep: Sweep, variant: str, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """The command line of a variant without seed and workdir; flags in `extra` override any value."""
    entry = sweep.variants[variant]
    file, overrides = (entry, {}) if isinstance(entry, str) else entry
    values = {**sweep.overrides, **overrides}
    return (f"--config={file}", *(f"--config.{key}={value}" for key, value in values.items()), *extra)


def keep_variants(sweep: Sweep, only: str) -> Sweep:
    """The sweep of the baseline and the variants `only`, names with commas between. Raises UserError."""
    names = only.split(",")
    for name in names:
        if name not in sweep.variants:
            hint = did_you_mean(name, sweep.variants)
            raise UserError(f"--only={only}: {name!r} is none of the variants {', '.join(sweep.variants)}{hint}")
    variants = {key: entry for key, entry in sweep.variants.items() if key in (sweep.baseline, *names)}
    return dataclasses.replace(sweep, variants=variants)


def list_runs(
    sweep: Sweep,
    extra: Sequence[str] = (),
    chosen: dict[str, tuple[str, ...]] | None = None,
    only: Collection[str] | None = None,
) -> Iterator[Run]:
    """Lists the runs in order. In each block the baseline is first (and last), the others between in random order.

    The order depends only on the sweep's name, its variants and the block. `chosen` are additional flags by variant.
    The runs of the variants `only` are the same as in the list of all.
    """
    blocks = [seed for _ in range(sweep.repeats) for seed in sweep.seeds]
    for block, seed in enumerate(blocks):
        others = [name for name in sweep.variants if name != sweep.baseline]
        random.Random(f"{sweep.name} {block}").shuffle(others)
        order = [sweep.baseline, *others, *([sweep.baseline] if sweep.twice else [])]
        for place, variant in enumerate(order):
            if only is not None and variant not in only:
                continue
            argv = (*argv_of(sweep, variant, extra), *(chosen or {}).get(variant, ()), f"--config.seed={seed}")
            yield Run(sweep.name, variant, sweep.baseline, block, place, seed, argv, measures=sweep.measures)


def _error_text(error, path):
    """An error's message on one line, with its line in the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return " ".join(str(error).split()) + (f" (line {lines[-1]})" if lines else "")


def load_sweep(file: str | os.PathLike[str]) -> Sweep:
    """Loads the Sweep of `FILE[:ARG]`, what its `get_config()` or `get_config(ARG)` returns. Raises UserError."""
    from efficientllm.registry.plugins import import_file
    from efficientllm.untrusted.files import is_file

    text, _, argument = (str(file), "", "") if is_file(file) else str(file).partition(":")
    path = pathlib.Path(text)
    if not is_file(path):
        raise UserError(f"--config={file}: no such file")
    try:
        sweep = import_file(path).get_config(*filter(None, [argument]))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # of the user's own code
        raise UserError(f"--config={file}: {type(error).__name__}: {_error_text(error, path)}") from None
    if not isinstance(sweep, Sweep):
        raise UserError(
            f"--config={file}: get_config() must return an efficientllm.sweep.Sweep, not a {type(sweep).__name__}"
        )
    return sweep
