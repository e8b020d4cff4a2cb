"""Setup of an inference run: prompts, model, mesh, and loading weights in a quantized form. Cheap checks come first."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np

from efficientllm import data, sharding
from efficientllm import model as models
from efficientllm.convert.files import stored_form
from efficientllm.cost import formulas
from efficientllm.errors import UserError
from efficientllm.infer import prompts, random_weights
from efficientllm.infer.engine import check_prompts
from efficientllm.infer.row import baseline_of
from efficientllm.metrics import host, memory
from efficientllm.ops import rematerialization
from efficientllm.quant import apply as quant
from efficientllm.quant import calibrate
from efficientllm.registry import build, parse_spec
from efficientllm.run_description import RunDescription, describe_run
from efficientllm.runtime.log import Countdown
from efficientllm.typing import Config, Mesh, Params, PyTree
from efficientllm.untrusted import patterns
from efficientllm.weights import box, is_box, path_of, resident_bytes

if typing.TYPE_CHECKING:
    from efficientllm.convert.source import Source
    from efficientllm.data.pipeline import EvalBatches


class OutOfMemory(RuntimeError):
    """Weights and states exceed the device memory."""


@dataclasses.dataclass
class Serving:
    """Everything that an inference run needs before its first token.

    lm:             the model, unrolled (no scan over layers).
    source:         the checkpoint, or None for random weights.
    boxed:          abstract float32 parameters, boxed with their logical axes.
    texts:          the prompts; `prompts` are their ids.
    length:         cache length: tokens of the longest prompt and its completion.
    rss_before:     resident bytes of the process before weights are loaded.
    max_positions:  of the checkpoint, or None.
    """

    config: Config
    source: Source | None
    lm: models.LM
    boxed: PyTree
    tokenizer: typing.Any
    sampler: typing.Any
    texts: list[str]
    prompts: list[list[int]]
    length: int
    mesh: Mesh
    rss_before: int
    max_positions: int | None = None

    @property
    def devices(self) -> list[jax.Device]:
        """The devices of the mesh."""
        return list(self.mesh.devices.flat)

    def load(self, spec: str, rules: Sequence[tuple[str, str]] = ()) -> Params:
        """Loads the parameters onto the mesh in the form `spec`, some in another by `rules`. Raises OutOfMemory."""
        if spec == "stored":
            return jax.block_until_ready(self._place_all(self._load_stored()))
        self._check_memory(spec, rules)
        if not _is_calibrated(spec, rules):
            return jax.block_until_ready(self._load_each(self._rounder(spec, rules)))
        dense = self._load_each(lambda path, array: array)
        calibrated = calibrate.quantize(self.lm, dense, spec, self._calibration(), rules)
        return jax.block_until_ready(self._place_all(calibrated))

    def history(self, spec: str) -> str:
        """How quantized weights of the files were converted to the form `spec`, or ""."""
        return stored_form.history(self.source, spec)

    @functools.cached_property
    def _shaped(self):
        """The abstract unquantized parameters, with shardings."""
        return sharding.abstract_shards(self.boxed, self.mesh)

    def _rounder(self, spec, rules):
        """`quant.rounder`, which also places each leaf on its shards before the next is read."""
        flat = jax.tree_util.tree_flatten_with_path(self.boxed, is_leaf=is_box)[0]
        boxes, quantize = {path_of(keys): boxed for keys, boxed in flat}, quant.rounder(spec, rules)
        return lambda path, array: self._place(boxes[path], quantize(path, array))

    def _place_all(self, params):
        return jax.tree.map(self._place, self.boxed, params, is_leaf=is_box)

    def _place(self, boxed, leaf):
        """Places `leaf`, an array or a Weight, on the mesh by the logical axes of `boxed`."""
        boxed_leaf = box(leaf, boxed.names)
        return jax.device_put(nn.unbox(boxed_leaf), sharding.shardings(boxed_leaf, self.mesh))

    def weights_bytes(self, spec: str, rules: Sequence[tuple[str, str]] = ()) -> tuple[int, int] | None:
        """`(resident, peak while loading)` bytes of the weights as `spec`, over all devices; None for `stored`.

        Weights are quantized one by one as they are read, so the peak adds the largest unquantized one (for random
        weights, the largest group of layers). Calibrated forms are loaded whole in float32 first.
        """
        if spec == "stored":
            return None
        plain, copies = nn.unbox(self.boxed), self.mesh.shape["data"]  # replicated over the axis `data`
        resident = resident_bytes(jax.eval_shape(lambda params: quant.quantize(params, spec, rules), plain))
        largest = max(map(resident_bytes, jax.tree.leaves(plain) if self.source else plain.values()))
        peak = resident_bytes(self.boxed) if _is_calibrated(spec, rules) else resident + largest
        return resident * copies, peak * copies

    @property
    def states_bytes(self) -> int:
        """Bytes of the decode states (KV caches, recurrences) of all rows."""
        return self.config.infer.batch_size * formulas.state_bytes(self.lm, self.length)

    def _load_each(self, each):
        """Reads or draws the parameters one at a time; keeps `each(path, array)` of each."""
        countdown = Countdown("weights", sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(self.boxed))))

        def counted(path, array):
            leaf = each(path, array)
            countdown.add(math.prod(array.shape))
            return leaf

        if self.source is None:
            return random_weights.draw(self.lm, self.config.seed, counted)
        return self.source.load(self._shaped, lm=self.lm, transform=counted)

    def _load_stored(self):
        if self.source is None:
            raise UserError("config.quant = 'stored' needs config.model.pretrained, whose files hold rounded weights")
        return self.source.load_stored(nn.unbox(self.boxed), self.lm)

    def _check_memory(self, spec, rules):
        """Raises OutOfMemory if states and weights, at the peak while loading, exceed the memory."""
        weights, states, shared = self.weights_bytes(spec, rules)[1], self.states_bytes, self._shares_memory
        limit = host.memory_total_bytes() if shared else memory.limit_bytes(self.devices)
        if self.config.memory_gb:
            limit = self.config.memory_gb * 1e9 * (1 if shared else len(self.devices))
        if limit is not None and weights + states > limit:
            raise OutOfMemory(
                f"out of memory: {spec or 'float32'} weights of {weights / 1e9:.1f} GB and states of "
                f"{states / 1e9:.1f} GB for {self.config.infer.batch_size} x {self.length} tokens, "
                f"{len(self.devices)} x {self.devices[0].platform} has {limit / 1e9:.1f} GB"
            )

    @property
    def _shares_memory(self):
        return self.devices[0].platform == "cpu"

    @functools.cached_property
    def held_out(self) -> EvalBatches:
        """Batches of held-out text."""
        train = self.config.train
        limit = self.config.eval.batches or None
        return data.eval_batches(self.config.data, self.tokenizer, train.batch_size, train.length, limit=limit)

    def held_out_ids(self) -> np.ndarray:
        """Tokens of the held-out text, without padding; measured prompts are spans of it."""
        return np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in self.held_out])

    def _calibration(self):
        """Rows of training text, for calibrated forms (GPTQ, AWQ)."""
        return data.calibration_rows(self.config.data, self.tokenizer, self.config.train.length, self.config.seed)


def _is_calibrated(spec, rules):
    specs = (spec, *(form for _, form in rules))
    return any(quant.form_of(form).calibrated for form in specs)


def check_request(config: Config) -> None:
    """Raises UserError for counts below 1, and for rules that conflict with `config.quant`."""
    for key in ("max_new_tokens", "batch_size", "prompt_length", "repeats"):
        if config.infer[key] < 1:
            raise UserError(f"config.infer.{key} = {config.infer[key]}: must be at least 1")
    if config.quant == "stored" and config.infer.rules:
        raise UserError("config.infer.rules: config.quant = 'stored' takes all weights as the files hold them; take ()")
    quant.chooser(config.quant, config.infer.rules, "config.infer.rules")


def prepare(config: Config, with_text: bool = True) -> Serving:
    """Builds the Serving of a config: reads the prompts, makes no array of the model.

    Without `with_text` the held-out text is not checked. Raises UserError.
    """
    infer = config.infer
    check_request(config)
    description = describe_run(config, devices_of(config))
    check_mesh(config, description.mesh)
    _check_baseline(infer.baseline)
    sampler = build("sampler", infer.sampler, where="config.infer.sampler")
    texts = prompts.read(infer.prompts)
    if with_text:
        data.check_data(config.data)  # before a checkpoint is read, which can take a minute
    ids = prompts.encode(texts, description.lm and description.tokenizer, infer.chat)
    check_prompts(ids)
    prompts.check_lengths(ids, infer.max_new_tokens, description.max_positions)
    length = max(infer.prompt_length, *map(len, ids)) + infer.max_new_tokens
    lm = serving_lm(description, length)
    return Serving(
        config=config,
        source=description.source,
        lm=lm,
        boxed=models.abstract_params(lm),
        tokenizer=description.tokenizer,
        sampler=sampler,
        texts=texts,
        prompts=ids,
        length=length,
        mesh=description.mesh,
        rss_before=host.rss_bytes(),
        max_positions=description.max_positions,
    )


def serving_lm(description: RunDescription, length: int) -> models.LM:
    """The LM that serves rows of `length` tokens: that of the RunDescription, unrolled and without rematerialization.

    Raises UserError for more tokens than its positions, and for a rule that matches no weight.
    """
    infer, lm = description.config.infer, description.lm.clone(scan=False, remat=rematerialization.SAVEABLE)
    where = f"config.infer.prompt_length = {infer.prompt_length}, config.infer.max_new_tokens = {infer.max_new_tokens}"
    if description.max_positions and length > description.max_positions:
        raise UserError(f"{where}: {length} tokens; the model has {description.max_positions} positions")
    models.check_length(lm, length, where)
    _check_rules(models.abstract_params(lm), infer.rules)
    return lm


def _check_rules(boxed, rules):
    """Raises UserError for a rule whose pattern matches no weight."""
    paths = [path for path, _, _ in formulas.leaves(boxed) if quant.is_weight(path)]
    for pattern, form in rules:
        if not any(map(patterns.compile(pattern, "config.infer.rules").search, paths)):
            raise UserError(
                f"config.infer.rules: {pattern!r} ({form}) matches no kernel or table; there are {paths[0]}, "
                f"{paths[1]}...; norms, biases and routers keep their own type"
            )


def devices_of(config: Config) -> list[jax.Device]:
    """The first devices, as many as the axis sizes of `config.mesh` give (-1 counts as 1).

    Raises UserError for several processes.
    """
    _, axes = parse_spec(f"mesh({config.mesh})", "config.mesh")
    if jax.process_count() > 1:
        raise UserError("inference runs in one process, on as many of its devices as config.mesh names")
    sizes = [size for size in axes.values() if isinstance(size, int) and size > 0]
    return jax.devices()[: math.prod(sizes)]


def check_mesh(config: Config, mesh: Mesh, batches: Sequence[str] = ("infer", "train")) -> None:
    """Raises UserError for a mesh with a `sequence` axis, or one that does not divide a batch size of the config.

    `batches` names the groups of the config: requests (`infer`) and held-out text (`train`).
    """
    where, shards = f"config.mesh = {config.mesh!r}", sharding.count_row_shards(mesh)
    if mesh.shape["sequence"] > 1:
        raise UserError(
            f"{where}: a step of decoding has one token, which 'sequence' cannot divide; take tensor or data"
        )
    for key in batches:
        if (rows := config[key].batch_size) % shards:
            raise UserError(
                f"config.{key}.batch_size = {rows}: {where} divides rows over {shards} devices; "
                f"take a multiple of {shards}"
            )


def _check_baseline(baseline):
    """Raises UserError unless `baseline` is a row (.json), a `quant` spec, or empty."""
    if baseline.endswith(".json"):
        baseline_of(baseline)
    elif baseline:
        build("quant", baseline, where="config.infer.baseline")
