"""Features of pictures by a small classifier that is trained on the same set: the extractor `own`.

No weights are downloaded, and the features know this set's classes. Distances of different sets, or of classifiers of
different hashes, cannot be compared.
"""

import functools
import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficientllm.errors import UserError
from efficientllm.evaluation.frechet import Extractor
from efficientllm.typing import Params, PyTree

WIDTHS = (32, 64, 64)  # the last is the number of features
BATCH, RATE = 128, 2e-3
BLOCK = 512  # pictures of a forward pass


class Classifier(nn.Module):
    """Convolutions of stride 2, the mean over places (the features), and a linear layer over the classes."""

    classes: int

    @nn.compact
    def __call__(self, images_BhwC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns `(logits, features)` of pictures in [-1, 1]."""
        x_BhwC = images_BhwC
        for width in WIDTHS:
            x_BhwC = nn.gelu(nn.Conv(width, (3, 3), (2, 2))(x_BhwC))
        features_BD = jnp.mean(x_BhwC, (1, 2))
        return nn.Dense(self.classes)(features_BD), features_BD


def train(images_BhwC: np.ndarray, labels_B: np.ndarray, classes: int, steps: int = 400, seed: int = 0) -> Params:
    """Trains the classifier on uint8 pictures with Adam and returns its parameters; the same on the same machine.

    Raises UserError for pictures of one class, whose features would tell nothing.
    """
    if len(np.unique(labels_B)) < 2:
        raise UserError("features of a trained classifier need pictures of two classes at least")
    model, optimizer = Classifier(classes), optax.adam(optax.cosine_decay_schedule(RATE, steps))
    params = model.init(jax.random.key(seed), to_float(images_BhwC[:1]))["params"]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, images, labels):
        def loss(params):
            logits, _ = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(images_BhwC), BATCH)
        params, state = step(params, state, to_float(images_BhwC[rows]), labels_B[rows])
    return jax.tree.map(np.asarray, params)


def accuracy(params: Params, images_BhwC: np.ndarray, labels_B: np.ndarray) -> float:
    """Computes the share of pictures whose class the classifier finds: features of a poor one tell little."""
    logits = _blocks(params, images_BhwC, 0)
    return float(np.mean(np.argmax(logits, -1) == labels_B))


def extractor(params: Params) -> Extractor:
    """Returns the extractor `own` with the hash of its weights."""
    return Extractor("own", functools.partial(_blocks, params, output=1), sha256(params))


def sha256(params: PyTree) -> str:
    """Hashes names, shapes and values of parameters."""
    digest = hashlib.sha256()
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def to_float(images_BhwC: np.ndarray) -> np.ndarray:
    """Converts uint8 pictures to [-1, 1]."""
    return np.asarray(images_BhwC, np.float32) / 127.5 - 1


@functools.partial(jax.jit, static_argnums=0)
def _apply(classes, params, images_BhwC):
    return Classifier(classes).apply({"params": params}, images_BhwC)


def _blocks(params: Params, images_BhwC: np.ndarray, output: int) -> np.ndarray:
    """Computes the logits (0) or the features (1) of uint8 pictures, a block at a time."""
    classes, outputs = params["Dense_0"]["bias"].shape[0], []
    for start in range(0, len(images_BhwC), BLOCK):
        block = images_BhwC[start : start + BLOCK]
        padded = np.pad(block, ((0, BLOCK - len(block)), (0, 0), (0, 0), (0, 0)))  # one program for all blocks
        outputs.append(np.asarray(_apply(classes, params, to_float(padded))[output])[: len(block)])
    return np.concatenate(outputs)
