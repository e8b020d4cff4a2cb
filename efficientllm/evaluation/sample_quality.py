"""Quality of sampled pictures: their distance from training pictures, and how new they are."""

import hashlib
import logging
import typing

import jax
import numpy as np

from efficientllm.data import cache
from efficientllm.errors import UserError
from efficientllm.evaluation import frechet, own_features, picture_reference
from efficientllm.evaluation.picture_reference import Reference
from efficientllm.metrics.reading import Reading, missing
from efficientllm.typing import Params, Record

if typing.TYPE_CHECKING:
    from efficientllm.data.images import ImageData

FRECHET, KERNEL = frechet.columns("own")
NEWNESS = "nearest_ratio"
COVERAGE = {
    "precision": "sample_precision",
    "recall": "sample_recall",
}  # as `frechet.compare` and as the row calls them
DISTANCES = (FRECHET, f"{FRECHET}_floor", KERNEL, f"{KERNEL}_floor", *COVERAGE.values())
KEYS = (*DISTANCES, NEWNESS)
FORMAT = 1  # of a cache entry: raise it with every change of the network or of its training
Readings = dict[str, Reading]
log = logging.getLogger("efficientllm")


def measure(images_BhwC: np.ndarray, data: "ImageData", how: str = "") -> tuple[Readings, Record]:
    """Computes the readings of samples (uint8 `[B, h, w, C]`) and the facts on which they depend.

    `fd_own` and `kd_own` are the Frechet and the kernel distance of the samples from training pictures, over features
    of a classifier of the same pictures. Their `..._floor` is that of as many other training pictures, which a perfect
    model would get. `sample_precision` and `sample_recall` say how many samples look like training pictures, and how
    many of those have a sample like them. `nearest_ratio` is the median distance of a sample's pixels from the nearest
    training picture over that of held-out pictures: near 0 samples are copies, at 1 as new as pictures never seen.

    `how` says how the samples were drawn.
    """
    local = jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("local",))
    with jax.set_mesh(local):  # one process measures, also where many train
        reference = picture_reference.load_reference(data)
        drawn = f"{len(images_BhwC):,} samples{how and f' ({how})'}"
        facts: Record = {"count": len(images_BhwC), "reference": len(reference), "how": how}
        readings = {NEWNESS: _newness(images_BhwC, reference, drawn)}
        try:
            distances, measured = _distances(images_BhwC, reference, load_parameters(data, reference), drawn)
        except UserError as error:
            return readings | {key: missing("1", str(error)) for key in DISTANCES}, facts
        return readings | distances, facts | measured


def load_parameters(data: "ImageData", reference: Reference) -> Params:
    """Trains the classifier of the reference's training pictures, or reads it from the cache.

    It does not depend on a run's seed: runs on the same data are measured by the same network. Raises UserError where
    the pictures have fewer than two classes.
    """
    name = cache.digest(FORMAT, data.pictures.summary["fingerprint"], len(reference), reference.flipped)

    def write(folder):
        log.info(f"quality: training a classifier of {len(reference):,} pictures")
        images_BhwC, labels_B = reference.training, reference.labels
        if reference.flipped:
            images_BhwC = np.concatenate([images_BhwC, images_BhwC[:, :, ::-1]])
            labels_B = np.concatenate([labels_B, labels_B])
        params = own_features.train(images_BhwC, labels_B, data.num_classes)
        flat = {f"{module}/{name}": leaf for module, leaves in params.items() for name, leaf in leaves.items()}
        np.savez(folder / "parameters.npz", **flat)

    params: dict[str, typing.Any] = {}
    with np.load(cache.entry(data.cache, f"own-features-{name}", write) / "parameters.npz") as stored:
        for path in stored:
            module, _, name = path.partition("/")
            params.setdefault(module, {})[name] = stored[path]
    return params


def _newness(images_BhwC, reference, drawn):
    unseen = picture_reference.unseen_distance(reference)
    if not unseen:
        why = "no picture is held out" if unseen is None else "held-out pictures are copies of training pictures"
        return missing("1", f"nothing to compare with: {why}")
    distance = float(np.median(picture_reference.find_nearest(images_BhwC, reference).distances))
    source = f"median pixel distance of {drawn} from the nearest of {len(reference):,} training pictures"
    return Reading(distance / unseen, "1", f"{source}, {distance:.1f}, over that of held-out pictures, {unseen:.1f}")


def _distances(images_BhwC, reference, params, drawn):
    """Readings of distances, of their floors and of coverage, and facts."""
    extractor = own_features.extractor(params)
    others, chosen = _split(reference.training, len(images_BhwC))
    compared = frechet.compare(extractor, picture_reference.shrink(images_BhwC), chosen, others)
    network = f"features of a classifier of the training pictures, sha256 {extractor.sha256[:12]}"
    sources = dict.fromkeys(DISTANCES, f"{drawn}, {len(chosen):,} training pictures; {network}")
    for name in (FRECHET, KERNEL):
        sources[f"{name}_floor"] = f"{len(others):,} other training pictures in place of the samples; {network}"
    values = compared | {COVERAGE[name]: compared[name] for name in COVERAGE}
    accuracy = None
    if len(reference.held_out):
        accuracy = own_features.accuracy(params, reference.held_out, reference.held_out_labels)
    facts = {
        "extractor": extractor.name,
        "sha256": extractor.sha256,
        "accuracy": accuracy,
        "interval": [values[f"{FRECHET}_low"], values[f"{FRECHET}_high"]],
        "compared": len(chosen),
        "compared_sha256": hashlib.sha256(np.ascontiguousarray(chosen).tobytes()).hexdigest(),
    }
    return {key: Reading(values[key], "1", sources[key]) for key in DISTANCES}, facts


def _split(training, samples):
    """`(as many training pictures as there are samples, half of them at most; the others)`."""
    order = np.random.default_rng(0).permutation(len(training))
    return np.split(training[order], [min(samples, len(training) // 2)])
