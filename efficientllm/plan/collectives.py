"""What the devices of a mesh send in a training step, by closed formula: what a compiled program is held against, and
the network's share of a plan where no compiler is.

Gradients are summed over the devices that hold other tokens (Li et al. 2020, arXiv:2006.15704). What `fsdp` splits is
gathered for each pass, and its gradient summed into its parts (ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054,
Section 7), and so is what `expert` splits but for the experts, to which it sends the rows of tokens and back (GShard:
Lepikhin et al. 2020, arXiv:2006.16668, Section 3.2). `tensor` sums the outputs of a mixer and an ffn forward, and the
gradients of their inputs backward (Shoeybi et al. 2019, arXiv:1909.08053, Section 3); `sequence` gathers keys and
values. Scalars are left out: the loss, its counts, a router's statistics, and the norms of gradients.
"""

import dataclasses
import math

import numpy as np

from efficientllm import model, sharding
from efficientllm.cost import formulas
from efficientllm.objectives import cross_entropy
from efficientllm.plan.hlo_cost import Collective
from efficientllm.weights import Precision, activation_dtype


def closed(one):
    """The Collectives of a `steps.Step`, or None where the formula does not hold: mixers other than attention, KV heads
    that `tensor` does not divide, experts on a TPU or beside `sequence`, activations made again, frozen parameters."""
    return tuple(_Sum(one).all()) if _holds(one) else None


def _holds(one):
    lm, shape = one.lm, one.mesh.shape
    if not one.method.trains_all or one.config.quant != "float32" or lm.remat != "none" or not lm.scan:
        return False
    with_experts = one.platform != "tpu" and shape["sequence"] == 1
    return all(
        _is_counted(mixer, shape["tensor"]) and _is_counted_ffn(ffn, with_experts) for mixer, ffn in model.parts(lm)
    )


def _is_counted(mixer, tensor):
    return mixer.gathered_heads() is not None and mixer.gathered_heads()[0] % tensor == 0


def _is_counted_ffn(ffn, with_experts):
    return ffn is not None and ffn.has_counted_traffic and (with_experts or ffn.expert_traffic(1) is None)


@dataclasses.dataclass(frozen=True)
class _Sum:
    """The formula's terms; bytes of one device."""

    one: object

    def all(self):
        """Every term, without those of groups of one device."""
        terms = [*self._tables(), *self._loss(), *self._activations(), *self._keys_and_values(), *self._travels()]
        for path, shape, names in formulas.leaves(self.one.boxed):
            if path != "embedding":
                terms += self._parameter(path, shape, names)
        return [term for term in terms if len(term.groups[0]) > 1]

    @property
    def _tokens(self):
        """Rows of a micro-batch on a device, and tokens of a row on it."""
        rows, sequence = self.one.rows[0], self.one.mesh.shape["sequence"]
        return rows // sharding.row_ways(self.one.mesh), self.one.config.train.length // sequence

    @property
    def _width(self):
        """Bytes of an activation; XLA on CPUs sends bfloat16 as float32."""
        return 4 if self.one.platform == "cpu" else activation_dtype(self.one.lm.precision).itemsize

    @property
    def _product(self):
        """Bytes of an operand of a product: a kernel is rounded before it is sent, but not on CPUs."""
        return 4 if self.one.platform == "cpu" else Precision.of(self.one.lm.precision).product.itemsize

    def _send(self, kind, axes, size, times=1, once=False):
        """A collective of `size` bytes in each micro-batch, among the devices that differ in `axes` alone.

        `once`: it is the same in all of them, and XLA on CPUs takes it out of their loop.
        """
        micros = 1 if once and self.one.platform == "cpu" else self.one.config.train.accumulate
        return Collective(kind, times * micros, size, groups(self.one.mesh, axes))

    def _scatter(self, axes, size, times=1):
        """A sum of which each device keeps its part. XLA on CPUs sums the whole and drops the rest."""
        return self._send("all-reduce" if self.one.platform == "cpu" else "reduce-scatter", axes, size, times)

    def _parameter(self, path, shape, names):
        """A parameter gathered in both passes, and its gradient summed."""
        count, split = self._held(shape, names)
        if "expert" in names:
            yield from self._experts(formulas.part_of(self.one.lm, path), count, split)
            return
        head, router = path == "head/kernel", path.endswith("router/kernel")  # a router is float32 under every policy
        if head:
            yield from self._head(count, split)
        elif split:
            width = 4 if router else self._product if path.endswith("kernel") else self._width
            yield self._send("all-gather", split, count * width, times=2, once=names[0] != "layers")
        yield from self._gradient(count * (4 if head or router else self._width), split)

    def _experts(self, ffn, count, split):
        """Kernels as the layer's own program gathers them, those of one batched product rounded, and sums their
        gradients into parts on any platform."""
        if split:
            width = self._product if ffn.expert_traffic(1).rounds_kernels else 4
            yield self._send("all-gather", split, count * width, times=2)
            yield self._send("reduce-scatter", split, count * 4)
        others = [axis for axis in ("data", "fsdp") if axis not in split]
        yield self._send("all-reduce", others, count * 4 / self._ways(split))

    def _held(self, shape, names):
        """(elements of a parameter that a group of devices holds together, the axes that split it among them).

        Over `expert` experts are held apart.
        """
        mesh, split = self.one.mesh, []
        for name, part in zip(names, sharding.spec(names, shape, self.one.mesh), strict=True):
            split += [(axis, name) for axis in ([part] if isinstance(part, str) else part or ())]
        apart = [axis for axis, name in split if axis == "tensor" or (axis, name) == ("expert", "expert")]
        together = tuple(axis for axis, _ in split if axis in sharding.BATCH and axis not in apart)
        return math.prod(shape) // math.prod(mesh.shape[axis] for axis in apart), together

    def _ways(self, axes):
        return math.prod(self.one.mesh.shape[axis] for axis in axes)

    def _gradient(self, size, split):
        others = [axis for axis in (*sharding.BATCH, "sequence") if axis not in split]
        if split:
            yield self._scatter(split, size)
        yield self._send("all-reduce", others, size / self._ways(split))

    def _head(self, count, split):
        """Its kernel for both passes; whole and as it is where the loss is made in chunks, which have one visit."""
        with self.one.scope():
            (rows, _), train = self.one.rows, self.one.config.train
            sequence = self.one.mesh.shape["sequence"]
            whole = cross_entropy.count_chunks(rows * sequence, train.length // sequence, self.one.lm.vocab_size) == 1
        if split:
            yield self._send("all-gather", split, count * (2 * self._product if whole else 4), once=True)

    def _tables(self):
        """The look-up: devices that split a table trade ids of their rows for columns of it, and those for rows. Its
        gradient is summed apart from that of a head which is the same table."""
        (B, T), D, lm = self._tokens, self.one.lm.dim, self.one.lm
        shape, names = {path: rest for path, *rest in formulas.leaves(self.one.boxed)}["embedding"]
        count, split = self._held(shape, names)
        if "tensor" in sharding.spec(names, shape, self.one.mesh):
            yield self._send("all-reduce", ("tensor",), 4 * B * T * D)
        if split:
            yield self._send("all-gather", split, 4 * B * self._ways(split) * T)
            yield self._send("all-to-all", split, self._width * B * T * D, times=2)
        others = [axis for axis in (*sharding.BATCH, "sequence") if axis not in split]
        yield self._send("all-reduce", others, 4 * count / self._ways(split))
        if lm.tied:
            yield from self._head(count, split)
            yield from self._gradient(4 * count, split)

    def _travels(self):
        """Rows of tokens to the experts and back, forward and backward; their weights there, and its gradient back, of
        which devices that hold parts of the experts' width have parts."""
        (B, T), lm = self._tokens, self.one.lm
        for _, ffn in model.parts(lm):
            if traffic := ffn.expert_traffic(self.one.config.train.length):
                size = self._width * B * traffic.rows
                yield self._send("all-to-all", ("expert",), size * lm.dim, 4 * lm.num_groups)
                yield self._send("all-to-all", ("expert",), size, 2 * lm.num_groups)
                if traffic.hidden % self.one.mesh.shape["tensor"] == 0:
                    yield self._send("all-reduce", ("tensor",), 4 * B * T * traffic.assignments, lm.num_groups)

    def _loss(self):
        """A vocabulary in parts: the greatest logit, the sum of exponentials, the target's logit, and dx."""
        if self.one.lm.vocab_size % self.one.mesh.shape["tensor"] == 0:
            B, T = self._tokens
            yield self._send("all-reduce", ("tensor",), 4 * B * T, times=3)
            yield self._send("all-reduce", ("tensor",), 4 * B * T * self.one.lm.dim)

    def _activations(self):
        """Kernels cut along their input give sums to add; those cut along their output, gradients of their input. The
        latter are added first where several read one input, but XLA on CPUs sends each. Experts send as many: their
        own program adds the gradients of its output among `tensor` and, once, those of its input."""
        (B, T), readers = self._tokens, {}
        for path, shape, names in formulas.leaves(self.one.boxed):
            if names[0] == "layers" and path.endswith("kernel"):
                where, size = sharding.spec(names, shape, self.one.mesh), self._width * B * T
                if where[-2] == "tensor":
                    yield self._send("all-reduce", ("tensor",), size * shape[-1], shape[0])
                if where[-1] == "tensor":
                    readers.setdefault(path.rsplit("/", 2)[0], []).append((size * shape[-2], shape[0]))
        for reader, found in readers.items():
            each = self.one.platform == "cpu" or reader.endswith("experts")
            for size, layers in found if each else found[:1]:
                yield self._send("all-reduce", ("tensor",), size, layers)

    def _keys_and_values(self):
        """Of whole rows, and which document each of their tokens belongs to."""
        (B, _), shape, lm = self._tokens, self.one.mesh.shape, self.one.lm
        tokens = B * self.one.config.train.length
        yield self._send("all-gather", ("sequence",), 4 * tokens)
        for mixer, _ in model.parts(lm):
            size = self._width * tokens * math.prod(mixer.gathered_heads()) // shape["tensor"]
            yield self._send("all-gather", ("sequence",), size, 2 * lm.num_groups)
            yield self._scatter(("sequence",), size, 2 * lm.num_groups)


def groups(mesh, axes):
    """The devices, by their place in the mesh, that differ in `axes` alone: tuples of equal length."""
    ids, names = np.arange(mesh.size).reshape(tuple(mesh.shape.values())), tuple(mesh.shape)
    moved = np.moveaxis(ids, [names.index(axis) for axis in axes], range(-len(axes), 0))
    members = math.prod(mesh.shape[axis] for axis in axes)
    return tuple(map(tuple, moved.reshape(-1, members).tolist()))
