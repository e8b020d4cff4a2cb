"""Collectives of a training step by closed formula: the network traffic of a plan without a compiler.

Tests compare the formula with compiled programs.

By mesh axis:
  data       Gradients are all-reduced (Li et al. 2020, arXiv:2006.15704).
  fsdp       Parameters are all-gathered for the forward and the backward pass, gradients reduce-scattered (ZeRO-3,
             Rajbhandari et al. 2020, arXiv:1910.02054, Section 7).
  expert     Tokens go to the experts and back by all-to-all (GShard, Lepikhin et al. 2020, arXiv:2006.16668, Section
             3.2). All other parameters are sharded as by fsdp.
  tensor     The outputs of a mixer and an ffn are all-reduced forward, the gradients of their inputs backward (Shoeybi
             et al. 2019, arXiv:1909.08053, Section 3).
  sequence   Keys and values are all-gathered.

Scalars are left out: the loss, its counts, router statistics, and gradient norms.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence

import numpy as np

from efficientllm import model, sharding
from efficientllm.cost import formulas
from efficientllm.objectives import cross_entropy
from efficientllm.plan.hlo_cost import Collective
from efficientllm.typing import Mesh
from efficientllm.weights import Precision, activation_dtype


def closed(step: typing.Any) -> tuple[Collective, ...] | None:
    """The Collectives of a `training_step.Step`, or None where the formula does not hold.

    It does not hold for mixers other than attention, KV heads that `tensor` does not divide, experts on a TPU or with
    `sequence`, models of pictures with `tensor` or `sequence`, rematerialization, and frozen parameters.
    """
    return tuple(_Formula(step).all()) if _holds(step) else None


def _holds(step):
    lm, shape = step.lm, step.mesh.shape
    if not step.method.trains_all or step.config.quant != "float32" or lm.remat != "none" or not lm.scan:
        return False
    if lm.reads == "images" and shape["tensor"] * shape["sequence"] > 1:
        return False
    with_experts = step.platform != "tpu" and shape["sequence"] == 1
    return all(
        all(_is_counted(mixer, shape["tensor"]) for mixer in mixers)
        and _is_counted_ffn(ffn, with_experts, shape["expert"])
        for mixers, ffn in model.parts(lm)
    )


def _is_counted(mixer, tensor):
    return mixer.gathered_heads() is not None and mixer.gathered_heads()[0] % tensor == 0


def _is_counted_ffn(ffn, with_experts, axis_size):
    if ffn is None or not ffn.has_counted_traffic:
        return False
    traffic = ffn.expert_traffic(1)
    # Rounds in which tokens travel without a capacity are data.
    return traffic is None or (with_experts and (axis_size == 1 or traffic.rounds_kernels))


@dataclasses.dataclass(frozen=True)
class _Formula:
    """The terms of the formula for a `training_step.Step`; bytes are of one device."""

    step: object

    def all(self):
        """All terms, without those of groups of one device."""
        ends = [*self._tables(), *self._loss()] if self.step.lm.reads == "text" else self._labels()
        terms = [*ends, *self._activations(), *self._keys_and_values(), *self._expert_tokens()]
        for path, shape, names in formulas.leaves(self.step.boxed):
            if path not in ("embedding", "label_table"):
                terms += self._parameter(path, shape, names)
        return [term for term in terms if len(term.groups[0]) > 1]

    @property
    def _tokens(self):
        """`(rows, tokens of a row)` of a micro-batch on one device."""
        rows, sequence = self.step.rows[0], self.step.mesh.shape["sequence"]
        return rows // sharding.count_row_shards(self.step.mesh), self.step.length // sequence

    @property
    def _width(self):
        """Bytes of an activation; XLA on CPUs sends bfloat16 as float32."""
        return 4 if self.step.platform == "cpu" else activation_dtype(self.step.lm.precision).itemsize

    @property
    def _product(self):
        """Bytes of an element of a kernel as sent: cast to the product's dtype before, but not on CPUs."""
        return 4 if self.step.platform == "cpu" else Precision.of(self.step.lm.precision).product.itemsize

    def _send(self, kind, axes, size, times=1, once=False):
        """The Collective of `size` bytes over the mesh `axes`, `times` in each micro-batch.

        `once` says that it does not depend on the micro-batch: XLA on CPUs hoists it out of their loop.
        """
        micros = 1 if once and self.step.platform == "cpu" else self.step.config.train.accumulate
        return Collective(kind, times * micros, size, groups(self.step.mesh, axes))

    def _scatter(self, axes, size, times=1):
        """A reduce-scatter. XLA on CPUs has none: it all-reduces and slices."""
        return self._send("all-reduce" if self.step.platform == "cpu" else "reduce-scatter", axes, size, times)

    def _parameter(self, path, shape, names):
        """All-gathers of a parameter in both passes and the reduction of its gradient.

        The backward pass reads no bias, and no kernel that multiplies the batch's own arrays.
        """
        count, split = self._sharded(shape, names)
        is_read_again = not path.endswith("bias") and self.step.lm.has_input_gradient(path, lambda _: True)
        passes = 1 + is_read_again
        if "expert" in names:
            yield from self._experts(path, count, split, passes)
            return
        head, router = path == "head/kernel", path.endswith("router/kernel")  # a router is float32 under every policy
        if head:
            yield from self._head(count, split)
        elif split:
            width = 4 if router else self._product if path.endswith("kernel") else self._width
            yield self._send("all-gather", split, count * width, times=passes, once=names[0] != "layers")
        yield from self._gradient(count * (4 if head or router else self._width), split)

    def _experts(self, path, count, split, passes):
        """All-gathers of experts' kernels or biases and reductions of their gradients, as in the layer's shard_map.

        Kernels of a batched product are cast before they are sent. Gradients are reduce-scattered on every platform.
        """
        traffic = self.step.lm.layer_of(path).expert_traffic(1)
        if split:
            width = self._product if traffic.rounds_kernels else 4
            yield self._send("all-gather", split, count * width, times=passes)
            yield self._send("reduce-scatter", split, count * 4)
        others = [axis for axis in ("data", "fsdp") if axis not in split]
        if path.endswith("down/bias") and traffic.hidden % self.step.mesh.shape["tensor"] == 0:
            others.append("tensor")  # devices with a part of the hidden width add it once
        yield self._send("all-reduce", others, count * 4 / self._axes_size(split))

    def _sharded(self, shape, names):
        """`(elements of a parameter after all-gathering it, mesh axes it is gathered over)`.

        Shards over `tensor`, and experts over `expert`, are never gathered.
        """
        mesh, split = self.step.mesh, []
        for name, axes in zip(names, sharding.spec(names, shape, self.step.mesh), strict=True):
            split += [(axis, name) for axis in ([axes] if isinstance(axes, str) else axes or ())]
        permanent = [axis for axis, name in split if axis == "tensor" or (axis, name) == ("expert", "expert")]
        gathered = tuple(axis for axis, _ in split if axis in sharding.BATCH and axis not in permanent)
        return math.prod(shape) // math.prod(mesh.shape[axis] for axis in permanent), gathered

    def _axes_size(self, axes):
        return math.prod(self.step.mesh.shape[axis] for axis in axes)

    def _gradient(self, size, split):
        others = [axis for axis in (*sharding.BATCH, "sequence") if axis not in split]
        if split:
            yield self._scatter(split, size)
        yield self._send("all-reduce", others, size / self._axes_size(split))

    def _head(self, count, split):
        """All-gathers of the head: in both passes; once where the loss is computed in chunks, on GPUs rounded."""
        rows, _ = self.step.rows
        sequence, is_gpu = self.step.mesh.shape["sequence"], self.step.platform == "gpu"
        stored = activation_dtype(self.step.lm.precision) if is_gpu else np.dtype(np.float32)
        with self.step.scope():
            shape = rows * sequence, self.step.length // sequence, self.step.lm.vocab_size
            whole = cross_entropy.count_chunks(*shape, stored) == 1
        if split:
            once = self._product if is_gpu else 4
            yield self._send("all-gather", split, count * (2 * self._product if whole else once), once=True)

    def _tables(self):
        """The embedding look-up in a sharded table: ids are all-gathered, and each device's columns exchanged for rows.

        The gradient is reduced separately from that of a tied head.
        """
        (B, T), D, lm = self._tokens, self.step.lm.dim, self.step.lm
        shape, names = {path: rest for path, *rest in formulas.leaves(self.step.boxed)}["embedding"]
        count, split = self._sharded(shape, names)
        if "tensor" in sharding.spec(names, shape, self.step.mesh):
            yield self._send("all-reduce", ("tensor",), 4 * B * T * D)
        if split:
            yield self._send("all-gather", split, 4 * B * self._axes_size(split) * T)
            yield self._send("all-to-all", split, self._width * B * T * D, times=2)
        others = [axis for axis in (*sharding.BATCH, "sequence") if axis not in split]
        yield self._send("all-reduce", others, 4 * count / self._axes_size(split))
        if lm.tied:
            yield from self._head(count, split)
            yield from self._gradient(4 * count, split)

    def _labels(self):
        """The look-up in the label table, of one row a picture, as that of tokens in the embedding.

        A model that reads texts has none.
        """
        (B, _), D = self._tokens, self.step.lm.dim
        tables = {path: rest for path, *rest in formulas.leaves(self.step.boxed)}
        if "label_table" not in tables:
            return
        shape, names = tables["label_table"]
        count, split = self._sharded(shape, names)
        if split:
            yield self._send("all-gather", split, 4 * B * self._axes_size(split))
            yield self._send("all-to-all", split, 4 * B * D, times=2)
        others = [axis for axis in (*sharding.BATCH, "sequence") if axis not in split]
        yield self._send("all-reduce", others, 4 * count / self._axes_size(split))

    def _expert_tokens(self):
        """Tokens to the experts and back, in both passes; router weights to the experts, and their gradients back.

        With `tensor` each device has a part of those gradients, which are all-reduced.
        """
        (B, T), lm = self._tokens, self.step.lm
        for (_, ffn), layers in zip(model.parts(lm), map(len, lm.stacks.layer_numbers), strict=True):
            if traffic := ffn.expert_traffic(self.step.length):
                size = self._width * B * traffic.rows
                yield self._send("all-to-all", ("expert",), size * lm.dim, 4 * layers)
                yield self._send("all-to-all", ("expert",), size, 2 * layers)
                if traffic.hidden % self.step.mesh.shape["tensor"] == 0:
                    yield self._send("all-reduce", ("tensor",), 4 * B * T * traffic.assignments, layers)

    def _loss(self):
        """Loss over a sharded vocabulary: the maximum, the sum of exponentials, the target's logit, and dx."""
        if self.step.lm.vocab_size % self.step.mesh.shape["tensor"] == 0:
            B, T = self._tokens
            yield self._send("all-reduce", ("tensor",), 4 * B * T, times=3)
            yield self._send("all-reduce", ("tensor",), 4 * B * T * self.step.lm.dim)

    def _activations(self):
        """All-reduces over `tensor`: outputs of kernels sharded along their input, forward; gradients of the input of
        kernels sharded along their output, backward.

        Kernels that read the same input share one backward all-reduce; on CPUs XLA does one for each. Experts need
        two: gradients of their output, and once those of their input.
        """
        (B, T), readers = self._tokens, {}
        for path, shape, names in formulas.leaves(self.step.boxed):
            if names[0] == "layers" and path.endswith("kernel"):
                where, size = sharding.spec(names, shape, self.step.mesh), self._width * B * T
                if where[-2] == "tensor":
                    yield self._send("all-reduce", ("tensor",), size * shape[-1], shape[0])
                if where[-1] == "tensor":
                    readers.setdefault(path.rsplit("/", 2)[0], []).append((size * shape[-2], shape[0]))
        for layer, kernels in readers.items():
            if layer.endswith("experts"):  # as many with a gate as without
                kernels = 2 * kernels[:1]
            elif self.step.platform != "cpu":
                kernels = kernels[:1]
            for size, layers in kernels:
                yield self._send("all-reduce", ("tensor",), size, layers)

    def _keys_and_values(self):
        """All-gathers of keys, values and document ids over `sequence`; reductions of their gradients."""
        (B, _), shape, lm = self._tokens, self.step.mesh.shape, self.step.lm
        tokens = B * self.step.length
        yield self._send("all-gather", ("sequence",), 4 * tokens)
        for (mixers, _), layers in zip(model.parts(lm), map(len, lm.stacks.layer_numbers), strict=True):
            for mixer in mixers:
                size = self._width * tokens * math.prod(mixer.gathered_heads()) // shape["tensor"]
                yield self._send("all-gather", ("sequence",), size, 2 * layers)
                yield self._scatter(("sequence",), size, 2 * layers)


def groups(mesh: Mesh, axes: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Groups of devices that differ only in `axes`: tuples of positions in the mesh, all of equal length."""
    ids, names = np.arange(mesh.size).reshape(tuple(mesh.shape.values())), tuple(mesh.shape)
    moved = np.moveaxis(ids, [names.index(axis) for axis in axes], range(-len(axes), 0))
    members = math.prod(mesh.shape[axis] for axis in axes)
    return tuple(map(tuple, moved.reshape(-1, members).tolist()))
