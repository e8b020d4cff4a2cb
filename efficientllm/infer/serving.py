"""`Serving`: everything that an inference run needs before its first request, and its weights in a quantized form."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import typing
from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax

from efficientllm import sharding
from efficientllm.convert.files import stored_form
from efficientllm.errors import UserError
from efficientllm.infer import random_weights
from efficientllm.infer.measurement_windows import Windows
from efficientllm.metrics import host, memory
from efficientllm.metrics.energy.reader import IdlePower
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.metrics.reading import Reading
from efficientllm.metrics.sampler import Sampler
from efficientllm.objectives.base import Losses
from efficientllm.quant import apply as quant
from efficientllm.quant import calibrate
from efficientllm.record.study_metrics import Compression
from efficientllm.runtime.log import Countdown
from efficientllm.typing import Batch, Config, Mesh, Params, PyTree, Record
from efficientllm.weights import box, is_box, path_of, resident_bytes

if typing.TYPE_CHECKING:
    from efficientllm.convert.source import Source
    from efficientllm.record.tensorboard import SummaryWriter


class OutOfMemory(RuntimeError):
    """Weights and states exceed the device memory."""


@dataclasses.dataclass(kw_only=True)
class Serving:
    """A model to serve; `text_serving.TextServing` and `picture_serving.PictureServing` know what a request is.

    lm:             the model, unrolled (no scan over layers).
    source:         the checkpoint, or None for random weights.
    objective:      what the model is scored by.
    dataset:        the data that it is scored on (`data.text.TextData` and the like), or None.
    boxed:          abstract float32 parameters, boxed with their logical axes.
    rss_before:     resident bytes of the process before weights are loaded.
    """

    config: Config
    source: Source | None
    lm: typing.Any
    objective: typing.Any
    dataset: typing.Any
    boxed: PyTree
    mesh: Mesh
    rss_before: int

    @property
    def request(self) -> str:
        """What a batch of requests is, for messages."""
        raise NotImplementedError

    @property
    def states_bytes(self) -> int:
        """Bytes that the requests of a batch need beside the weights."""
        raise NotImplementedError

    def prepare_requests(self) -> None:
        """Computes what requests need before the weights are loaded, such as the states of their texts."""

    def engine(self, params: Params) -> typing.Any:
        """Builds what answers requests with `params`."""
        raise NotImplementedError

    def generate(self, engine: typing.Any, folder: pathlib.Path, windows: Windows) -> None:
        """Answers the requests of the config and writes the answers into `folder`, those that are finished included.

        `windows` measure where this is what `measure` returns.
        """
        raise NotImplementedError

    def measure(self, engine: typing.Any, reader: EnergyReader, averages: Sampler) -> typing.Any:
        """Measures batches of requests; returns what `study`, `physical` and `conditions` take."""
        raise NotImplementedError

    def study(self, measured: typing.Any, compared: Compression | None) -> dict[str, Reading]:
        """Returns the study's metrics; `compared` is a Compression or None."""
        raise NotImplementedError

    def physical(self, params: Params, measured: typing.Any, idle: IdlePower) -> dict[str, Reading]:
        """Returns the physical readings, without peak memory."""
        raise NotImplementedError

    def quality(self, losses: Losses) -> dict[str, Reading]:
        """Returns the readings of held-out losses."""
        return self.objective.readings(losses)

    def describe_data(self) -> Record:
        """Describes the data that the model is scored on."""
        return {} if self.dataset is None else self.dataset.describe()

    def facts(self) -> Record:
        """Returns provenance that only requests of this kind have."""
        return {}

    def chart(self, writer: SummaryWriter, folder: pathlib.Path) -> None:
        """Adds the answers in `folder` to the charts, where they are no text."""

    @property
    def devices(self) -> list[jax.Device]:
        """The devices of the mesh."""
        return list(self.mesh.devices.flat)

    def load(self, spec: str, rules: Sequence[tuple[str, str]] = ()) -> Params:
        """Loads the parameters onto the mesh in the form `spec`, some in another by `rules`. Raises OutOfMemory."""
        if spec == "stored":
            return jax.block_until_ready(self._place_all(self._load_stored()))
        self._check_memory(spec, rules)
        if not is_calibrated(spec, rules):
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
        resident = resident_bytes(quant.abstract(plain, spec, rules))
        largest = max(map(resident_bytes, jax.tree.leaves(plain) if self.source else plain.values()))
        peak = resident_bytes(self.boxed) if is_calibrated(spec, rules) else resident + largest
        return resident * copies, peak * copies

    def _load_each(self, transform):
        """Reads or draws the parameters one at a time; keeps `transform(path, array)`."""
        countdown = Countdown("weights", sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(self.boxed))))

        def counted(path, array):
            leaf = transform(path, array)
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
                f"{states / 1e9:.1f} GB for {self.request}, "
                f"{len(self.devices)} x {self.devices[0].platform} has {limit / 1e9:.1f} GB"
            )

    @property
    def _shares_memory(self):
        return self.devices[0].platform == "cpu"

    @functools.cached_property
    def held_out(self) -> Iterable[Batch]:
        """Batches of held-out data; none without a dataset."""
        train = self.config.train
        if self.dataset is None:
            return ()
        return self.dataset.held_out(train.batch_size, limit=self.config.eval.batches or None)

    def _calibration(self):
        """Rows of training text, for calibrated forms (GPTQ, AWQ)."""
        raise NotImplementedError


def is_calibrated(spec: str, rules: Sequence[tuple[str, str]]) -> bool:
    """Whether weights of the form `spec`, or of one of the `rules`, are calibrated on data."""
    specs = (spec, *(form for _, form in rules))
    return any(quant.form_of(form).calibrated for form in specs)
