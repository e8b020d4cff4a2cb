"""Everything an inference run needs before its first token, in the order that finds errors first."""

import dataclasses
import functools
import math

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
from efficientllm.untrusted import patterns
from efficientllm.weights import box, is_box, path_of, resident_bytes


class OutOfMemory(RuntimeError):
    """What is asked for cannot fit into the device's memory."""


@dataclasses.dataclass
class Serving:
    """The parts of a run. `lm` has its layers apart; `boxed` are its abstract float32 parameters with their axes;
    `length` is the tokens of the longest prompt and answer."""

    config: object
    source: object
    lm: object
    boxed: dict
    tokenizer: object
    sampler: object
    texts: list
    prompts: list
    length: int
    mesh: object
    rss_before: int
    max_positions: int = None

    @property
    def devices(self):
        """The devices that serve."""
        return list(self.mesh.devices.flat)

    def load(self, spec, rules=()):
        """The parameters in the form `spec`, and those that `rules` name in theirs. Raises OutOfMemory."""
        if spec == "stored":
            return jax.block_until_ready(self._placed(self._stored()))
        self._check_memory(spec, rules)
        if not _is_calibrated(spec, rules):
            return jax.block_until_ready(self._each(self._rounder(spec, rules)))
        dense = self._each(lambda path, array: array)
        found = calibrate.quantize(self.lm, dense, spec, self._calibration(), rules)
        return jax.block_until_ready(self._placed(found))

    def history(self, spec):
        """What weights in the form `spec` went through where the files hold rounded ones, or ""."""
        return stored_form.history(self.source, spec)

    @functools.cached_property
    def _shaped(self):
        """The plain parameters' shapes, on their shards."""
        return sharding.on_shards(self.boxed, self.mesh)

    def _rounder(self, spec, rules):
        """As `quant.rounder`, and each leaf on its shards before the next is read."""
        flat = jax.tree_util.tree_flatten_with_path(self.boxed, is_leaf=is_box)[0]
        boxes, one = {path_of(keys): boxed for keys, boxed in flat}, quant.rounder(spec, rules)
        return lambda path, array: self._place(boxes[path], one(path, array))

    def _placed(self, params):
        return jax.tree.map(self._place, self.boxed, params, is_leaf=is_box)

    def _place(self, boxed, leaf):
        """`leaf`, an array or a Weight, where the axes of `boxed` put it on the mesh."""
        held = box(leaf, boxed.names)
        return jax.device_put(nn.unbox(held), sharding.shardings(held, self.mesh))

    def weights_bytes(self, spec, rules=()):
        """`(kept, at most)` bytes of weights in the form `spec` over all devices, while they are loaded: those that are
        rounded one by one as they are read, and the largest as it was; of drawn ones, which come by groups of layers,
        the largest group; calibrated ones begin as float32. None for `stored`, whose files say."""
        if spec == "stored":
            return None
        plain, copies = nn.unbox(self.boxed), self.mesh.shape["data"]  # each device of `data` has its own
        kept = resident_bytes(jax.eval_shape(lambda params: quant.quantize(params, spec, rules), plain))
        largest = max(map(resident_bytes, jax.tree.leaves(plain) if self.source else plain.values()))
        most = resident_bytes(self.boxed) if _is_calibrated(spec, rules) else kept + largest
        return kept * copies, most * copies

    @property
    def states_bytes(self):
        """Bytes of the states of all rows."""
        return self.config.infer.batch_size * formulas.state_bytes(self.lm, self.length)

    def _each(self, each):
        """The parameters, read or drawn, of each of which `each(path, array)` is kept before there are more."""
        countdown = Countdown("weights", sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(self.boxed))))

        def counted(path, array):
            kept = each(path, array)
            countdown.add(math.prod(array.shape))
            return kept

        if self.source is None:
            return random_weights.draw(self.lm, self.config.seed, counted)
        return self.source.load(self._shaped, lm=self.lm, each=counted)

    def _stored(self):
        if self.source is None:
            raise UserError("config.quant = 'stored' needs config.model.pretrained, whose files hold rounded weights")
        return self.source.load_stored(nn.unbox(self.boxed), self.lm)

    def _check_memory(self, spec, rules):
        """States must fit beside the weights, as many as there ever are at a time. Raises OutOfMemory."""
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
    def held_out(self):
        """Batches of held-out text."""
        train = self.config.train
        limit = self.config.eval.batches or None
        return data.eval_batches(self.config.data, self.tokenizer, train.batch_size, train.length, limit=limit)

    def held_out_ids(self):
        """The tokens of the held-out text, of which measured prompts are cut."""
        return np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in self.held_out])

    def _calibration(self):
        """Rows of the text that is not held out."""
        return data.calibration_rows(self.config.data, self.tokenizer, self.config.train.length, self.config.seed)


def _is_calibrated(spec, rules):
    forms = [quant.form_of(each) for each in (spec, *(form for _, form in rules))]
    return any(form.calibrated for form in forms)


def check_request(config):
    """Raises UserError for values that no model could be measured with."""
    for key in ("max_new_tokens", "batch_size", "prompt_length", "repeats"):
        if config.infer[key] < 1:
            raise UserError(f"config.infer.{key} = {config.infer[key]}: must be at least 1")
    if config.quant == "stored" and config.infer.rules:
        raise UserError("config.infer.rules: config.quant = 'stored' takes all weights as the files hold them; take ()")
    quant.chooser(config.quant, config.infer.rules, "config.infer.rules")


def prepare(config, with_text=True):
    """Reads the prompts and describes the model; makes no array of it. Without `with_text` the held-out text is not
    looked at. Raises UserError."""
    asked = config.infer
    check_request(config)
    run = describe_run(config, devices_of(config))
    check_mesh(config, run.mesh)
    _check_baseline(asked.baseline)
    sampler = build("sampler", asked.sampler, where="config.infer.sampler")
    texts = prompts.read(asked.prompts)
    if with_text:
        data.check(config.data)  # before a checkpoint is read, which can take a minute
    ids = prompts.encode(texts, run.lm and run.tokenizer, asked.chat)
    check_prompts(ids)
    prompts.check_lengths(ids, asked.max_new_tokens, run.max_positions)
    length = max(asked.prompt_length, *map(len, ids)) + asked.max_new_tokens
    lm = serving_lm(run, length)
    return Serving(
        config=config,
        source=run.source,
        lm=lm,
        boxed=models.abstract_params(lm),
        tokenizer=run.tokenizer,
        sampler=sampler,
        texts=texts,
        prompts=ids,
        length=length,
        mesh=run.mesh,
        rss_before=host.rss_bytes(),
        max_positions=run.max_positions,
    )


def serving_lm(run: RunDescription, length: int) -> models.LM:
    """The LM of a RunDescription as it serves rows of `length` tokens: layers apart, and nothing rematerialized.

    Raises UserError for more tokens than it has positions, and for a rule that names no weight.
    """
    asked, lm = run.config.infer, run.lm.clone(scan=False, remat=rematerialization.SAVEABLE)
    where = f"config.infer.prompt_length = {asked.prompt_length}, config.infer.max_new_tokens = {asked.max_new_tokens}"
    if run.max_positions and length > run.max_positions:
        raise UserError(f"{where}: {length} tokens; the model has {run.max_positions} positions")
    models.check_length(lm, length, where)
    _check_rules(models.abstract_params(lm), asked.rules)
    return lm


def _check_rules(boxed, rules):
    """Raises UserError for a rule that names no weight, which would change nothing."""
    paths = [path for path, _, _ in formulas.leaves(boxed) if quant.is_weight(path)]
    for pattern, form in rules:
        if not any(map(patterns.compile(pattern, "config.infer.rules").search, paths)):
            raise UserError(
                f"config.infer.rules: {pattern!r} ({form}) matches no kernel or table; there are {paths[0]}, "
                f"{paths[1]}...; norms, biases and routers keep their own type"
            )


def devices_of(config):
    """As many devices as `config.mesh` names, of which -1 names one. Raises UserError for several processes."""
    _, given = parse_spec(f"mesh({config.mesh})", "config.mesh")
    if jax.process_count() > 1:
        raise UserError("inference runs in one process, on as many of its devices as config.mesh names")
    named = [size for size in given.values() if isinstance(size, int) and size > 0]
    return jax.devices()[: math.prod(named)]


def check_mesh(config, mesh, batches=("infer", "train")):
    """Raises UserError for a mesh that cannot serve the config's `batches`, requests and held-out text."""
    where, ways = f"config.mesh = {config.mesh!r}", sharding.row_ways(mesh)
    if mesh.shape["sequence"] > 1:
        raise UserError(
            f"{where}: a step of decoding has one token, which 'sequence' cannot divide; take tensor or data"
        )
    for key in batches:
        if (rows := config[key].batch_size) % ways:
            raise UserError(
                f"config.{key}.batch_size = {rows}: {where} divides rows over {ways} devices; take a multiple of {ways}"
            )


def _check_baseline(baseline):
    """A row, a form of the weights, or nothing."""
    if baseline.endswith(".json"):
        baseline_of(baseline)
    elif baseline:
        build("quant", baseline, where="config.infer.baseline")
