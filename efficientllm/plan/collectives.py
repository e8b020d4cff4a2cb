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

from efficientllm import accounting, model, sharding
from efficientllm.adapters.selected import Full
from efficientllm.ffns.dense import GELU, SwiGLU
from efficientllm.mixers.attention import Attention
from efficientllm.plan.program import Collective
from efficientllm.registry import build
from efficientllm.train import loss
from efficientllm.weights import activation_dtype


def closed(one):
    """The Collectives of a `steps.Step`, or None where the formula does not hold: parts other than attention and dense
    ffns, KV heads that `tensor` does not divide, the axis `expert`, activations made again, frozen parameters."""
    return tuple(_Sum(one).all()) if _holds(one) else None


def _holds(one):
    lm, tensor = one.lm, one.mesh.shape["tensor"]
    if not isinstance(one.method, Full) or one.config.quant != "float32" or lm.remat != "none" or not lm.scan:
        return False
    if one.mesh.shape["expert"] > 1:
        return False
    known = all(isinstance(mixer, Attention) and isinstance(ffn, SwiGLU | GELU) for mixer, ffn in model.parts(lm))
    return known and all(mixer.kv_heads % tensor == 0 for mixer, _ in model.parts(lm))


@dataclasses.dataclass(frozen=True)
class _Sum:
    """The formula's terms; bytes of one device."""

    one: object

    def all(self):
        """Every term, without those of groups of one device."""
        terms = [*self._tables(), *self._loss(), *self._activations(), *self._keys_and_values()]
        for path, shape, names in accounting.leaves(self.one.boxed):
            if path != "embedding":
                terms += self._parameter(path, shape, names)
        return [term for term in terms if len(term.groups[0]) > 1]

    @property
    def _tokens(self):
        """Rows of a micro-batch on a device, and tokens of a row on it."""
        (rows, _), shape = self.one.rows, self.one.mesh.shape
        return rows // (shape["data"] * shape["fsdp"]), self.one.config.train.length // shape["sequence"]

    @property
    def _width(self):
        """Bytes of an activation."""
        return activation_dtype(self.one.lm.precision).itemsize

    @property
    def _product(self):
        """Bytes of an operand of a product: a kernel is rounded before it is sent."""
        return np.dtype(build("precision", self.one.lm.precision).product).itemsize

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
        kernel, head = path.endswith("kernel"), path == "head/kernel"
        count, split = self._held(shape, names)
        if head:
            yield from self._head(count, split)
        elif split > 1:
            width, once = self._product if kernel else self._width, names[0] != "layers"
            yield self._send("all-gather", ("fsdp",), count * width, times=2, once=once)
        yield from self._gradient(count * (4 if head else self._width), split)

    def _held(self, shape, names):
        """(elements of a parameter that the devices of an fsdp group hold together, their number)."""
        where = sharding.spec(names, shape, self.one.mesh)
        tensor = self.one.mesh.shape["tensor"] if "tensor" in where else 1
        return math.prod(shape) // tensor, self.one.mesh.shape["fsdp"] if "fsdp" in where else 1

    def _gradient(self, size, split):
        if split == 1:
            yield self._send("all-reduce", (*sharding.BATCH, "sequence"), size)
        else:
            yield self._scatter(("fsdp",), size)
            yield self._send("all-reduce", ("data", "sequence"), size / split)

    def _head(self, count, split):
        """Its kernel for both passes; whole and as it is where the loss is made in chunks, which have one visit."""
        with self.one.scope():
            (rows, _), train = self.one.rows, self.one.config.train
            sequence = self.one.mesh.shape["sequence"]
            whole = loss.count_chunks(rows * sequence, train.length // sequence, self.one.lm.vocab_size) == 1
        if split > 1:
            yield self._send("all-gather", ("fsdp",), count * (2 * self._product if whole else 4), once=True)

    def _tables(self):
        """The look-up: fsdp trades the ids of its rows for columns of the table, and those for rows. Its gradient is
        summed apart from that of a head which is the same table."""
        (B, T), D, lm = self._tokens, self.one.lm.dim, self.one.lm
        shape, names = {path: rest for path, *rest in accounting.leaves(self.one.boxed)}["embedding"]
        count, split = self._held(shape, names)
        if "tensor" in sharding.spec(names, shape, self.one.mesh):
            yield self._send("all-reduce", ("tensor",), 4 * B * T * D)
        if split > 1:
            yield self._send("all-gather", ("fsdp",), 4 * B * split * T)
            yield self._send("all-to-all", ("fsdp",), self._width * B * T * D, times=2)
        others = ("data", "sequence") if split > 1 else (*sharding.BATCH, "sequence")
        yield self._send("all-reduce", others, 4 * count / split)
        if lm.tied:
            yield from self._head(count, split)
            yield from self._gradient(4 * count, split)

    def _loss(self):
        """A vocabulary in parts: the greatest logit, the sum of exponentials, the target's logit, and dx."""
        if self.one.lm.vocab_size % self.one.mesh.shape["tensor"] == 0:
            B, T = self._tokens
            yield self._send("all-reduce", ("tensor",), 4 * B * T, times=3)
            yield self._send("all-reduce", ("tensor",), 4 * B * T * self.one.lm.dim)

    def _activations(self):
        """Kernels cut along their input give sums to add; those cut along their output, gradients of their input. The
        latter are added first where several read one input, but XLA on CPUs sends each."""
        (B, T), readers = self._tokens, {}
        for path, shape, names in accounting.leaves(self.one.boxed):
            if names[0] == "layers" and path.endswith("kernel"):
                where, size = sharding.spec(names, shape, self.one.mesh), self._width * B * T
                if where[-2] == "tensor":
                    yield self._send("all-reduce", ("tensor",), size * shape[-1], shape[0])
                if where[-1] == "tensor":
                    readers.setdefault(path.rsplit("/", 2)[0], []).append((size * shape[-2], shape[0]))
        for found in readers.values():
            for size, layers in found if self.one.platform == "cpu" else found[:1]:
                yield self._send("all-reduce", ("tensor",), size, layers)

    def _keys_and_values(self):
        """Of whole rows, and which document each of their tokens belongs to."""
        (B, _), shape, lm = self._tokens, self.one.mesh.shape, self.one.lm
        tokens = B * self.one.config.train.length
        yield self._send("all-gather", ("sequence",), 4 * tokens)
        for mixer, _ in model.parts(lm):
            size = self._width * tokens * mixer.head_dim * mixer.kv_heads // shape["tensor"]
            yield self._send("all-gather", ("sequence",), size, 2 * lm.num_groups)
            yield self._scatter(("sequence",), size, 2 * lm.num_groups)


def groups(mesh, axes):
    """The devices, by their place in the mesh, that differ in `axes` alone: tuples of equal length."""
    ids, names = np.arange(mesh.size).reshape(tuple(mesh.shape.values())), tuple(mesh.shape)
    moved = np.moveaxis(ids, [names.index(axis) for axis in axes], range(-len(axes), 0))
    members = math.prod(mesh.shape[axis] for axis in axes)
    return tuple(map(tuple, moved.reshape(-1, members).tolist()))
