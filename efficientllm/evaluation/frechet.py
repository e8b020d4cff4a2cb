"""Distances between sets of pictures by their features: Frechet distance, kernel distance, nearest neighbours.

All are pure functions of feature arrays `[pictures, dimensions]`, in float64 on the host. The extractor of the features
names the number: a Frechet distance is an FID only of InceptionV3's features.
"""

import typing

import numpy as np

from efficientllm.errors import UserError

INCEPTION = "inception_v3"  # pool_3 (2048 features) of the graph that ADM's evaluator reads


class Extractor(typing.NamedTuple):
    """A function from pictures (uint8 `[B, h, w, C]`) to features `[B, dimensions]`, its name, and its weights' hash.

    `sha256` is empty for a function without weights.
    """

    name: str
    features: typing.Callable[[np.ndarray], np.ndarray]
    sha256: str = ""


class FeatureMoments(typing.NamedTuple):
    """The mean `[d]` and the covariance `[d, d]` of features."""

    mean: np.ndarray
    covariance: np.ndarray


def columns(extractor: str) -> tuple[str, str]:
    """Returns the columns of the Frechet and the kernel distance: `fid` and `kid` of InceptionV3's features alone."""
    return ("fid", "kid") if extractor == INCEPTION else (f"fd_{extractor}", f"kd_{extractor}")


def moments(features: np.ndarray) -> FeatureMoments:
    """Computes the mean and the unbiased covariance (ddof 1). Raises UserError for fewer than two pictures."""
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise UserError(f"a covariance of {len(features)} pictures: needs two at least; raise the number of samples")
    return FeatureMoments(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Computes the squared Frechet (Wasserstein-2) distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500).

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)`. The last trace is the sum of the square roots of the eigenvalues of
    the symmetric `S1^1/2 S2 S1^1/2`, which has those of `S1 S2`. Unlike a general matrix square root it needs no
    ridge and gives no imaginary part where a covariance is singular.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(array, np.float64) for array in (mean1, cov1, mean2, cov2))
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Computes the Frechet distance of two sets of features. It is biased upwards by few pictures."""
    first, second = moments(features), moments(reference)
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Computes the unbiased squared MMD with the kernel `(x.y / d + 1)^3`, the KID of Binkowski et al. 2018.

    arXiv:1801.01401, equation 4 with all pictures in one block. Unbiased, so it may be negative. Raises UserError for
    fewer than two pictures on a side.
    """
    features, reference = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    m, n = len(features), len(reference)
    if min(m, n) < 2:
        raise UserError(f"a kernel distance of {m} and {n} pictures: needs two of each at least")
    within = sum(_off_diagonal_mean(side) for side in (features, reference))
    return float(within - 2 * _kernel(features, reference).mean())


def _kernel(first, second):
    return (first @ second.T / first.shape[1] + 1) ** 3


def _off_diagonal_mean(features):
    kernel = _kernel(features, features)
    return (kernel.sum() - np.trace(kernel)) / (len(features) * (len(features) - 1))


def interval(
    statistic: typing.Callable[[np.ndarray, np.ndarray], float],
    features: np.ndarray,
    reference: np.ndarray,
    draws: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of `statistic(features, reference)` over draws of the samples' pictures.

    A resampled set repeats pictures, which raises a Frechet distance: the interval lies above a small distance.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(features[rng.integers(0, len(features), len(features))], reference) for _ in range(draws)]
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def floor(statistic: typing.Callable[[np.ndarray, np.ndarray], float], reference: np.ndarray, seed: int = 0) -> float:
    """Returns `statistic` of two random halves of the reference: what a perfect model of so many pictures would get."""
    order = np.random.default_rng(seed).permutation(len(reference))
    half = len(order) // 2
    return statistic(reference[order[:half]], reference[order[half : 2 * half]])


def precision_recall(features: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Computes `(precision, recall)` of Kynkaanniemi et al. 2019 (arXiv:1904.06991).

    Precision is the share of samples within the distance of a reference picture to its k-th neighbour; recall is the
    share of reference pictures so covered by samples.
    """
    features, reference = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    distances = _distances(features, reference)
    reach, covered = (_neighbour(side, k) for side in (reference, features))
    return float(np.mean((distances <= reach).any(1))), float(np.mean((distances <= covered[:, None]).any(0)))


def _neighbour(features, k):
    """The distance of each picture to its k-th neighbour in its own set."""
    if len(features) <= k:
        raise UserError(f"precision and recall of {len(features)} pictures: need more than k = {k}")
    return np.partition(_distances(features, features), k, 1)[:, k]  # the first is itself


def _distances(first, second):
    squares = np.sum(first**2, 1)[:, None] + np.sum(second**2, 1) - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0))


def compare(
    extractor: Extractor, samples: np.ndarray, training: np.ndarray, held_out: np.ndarray, draws: int = 100
) -> dict[str, float]:
    """Compares uint8 samples with training pictures by the features of an extractor.

    Returns the Frechet distance with its bootstrap interval, the kernel distance, precision and recall; and, as
    `..._floor`, both distances of held-out from training pictures, which is what samples of the data's own
    distribution would get in that number. The number of samples is part of the result: a Frechet distance falls with
    it. Raises UserError for no more samples than features: their covariance is singular, and the distance mostly bias.
    """
    features, reference, others = (extractor.features(images) for images in (samples, training, held_out))
    if len(features) <= features.shape[1]:
        raise UserError(
            f"{len(features)} samples: {extractor.name} has {features.shape[1]} features, and a Frechet distance needs "
            "more samples than those; raise config.quality.fd"
        )
    frechet, kernel = columns(extractor.name)
    low, high = interval(distance, features, reference, draws)
    precision, recall = precision_recall(features, reference)
    return {
        frechet: distance(features, reference),
        f"{frechet}_low": low,
        f"{frechet}_high": high,
        f"{frechet}_floor": distance(others, reference),
        kernel: kernel_distance(features, reference),
        f"{kernel}_floor": kernel_distance(others, reference),
        "precision": precision,
        "recall": recall,
        "samples": len(features),
    }


def nearest(samples: np.ndarray, training: np.ndarray, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(indices, distances)` of the training picture nearest to each sample, by Euclidean distance.

    Rows may be features or flattened pixels. `block` samples are compared at a time.
    """
    training = np.asarray(training, np.float64).reshape(len(training), -1)
    squares = np.sum(training**2, 1)
    indices, distances = [], []
    for start in range(0, len(samples), block):
        rows = np.asarray(samples[start : start + block], np.float64).reshape(-1, training.shape[1])
        chosen = np.argmin(squares - 2 * rows @ training.T, 1)
        indices.append(chosen)
        distances.append(np.linalg.norm(rows - training[chosen], axis=1))  # exact where the expanded square cancels
    return np.concatenate(indices), np.concatenate(distances)
