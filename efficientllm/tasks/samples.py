"""Samples of a model during and after training: a text, or pictures beside the training pictures nearest to them.

The quality of many sampled pictures is measured too (`evaluation.sample_quality`).
"""

from __future__ import annotations

import itertools
import json
import logging
import pathlib
import typing

import jax
import numpy as np

from efficientllm.errors import UserError
from efficientllm.evaluation import own_features, picture_reference, sample_quality
from efficientllm.infer import clips, image_samples
from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.infer.engine import Engine
from efficientllm.infer.pictures import BORDER, grid_columns, image_grid, write_png
from efficientllm.infer.samplers import Sample
from efficientllm.metrics.reading import missing
from efficientllm.model import check_length
from efficientllm.objectives.base import Objective
from efficientllm.record.tensorboard import SummaryWriter
from efficientllm.registry.plugins import one_line_with_location
from efficientllm.runtime import distributed, stopping
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.tasks import failures
from efficientllm.train import setup as train_setup
from efficientllm.train.setup import Setup
from efficientllm.typing import Config, Params, Record

if typing.TYPE_CHECKING:
    from efficientllm.infer.picture_serving import PictureServing

NO_DATA = "no pictures to compare samples with: give config.data"
log = logging.getLogger("efficientllm")


class Painter(typing.NamedTuple):
    """What draws the pictures of a run.

    rows:     pictures drawn at a time.
    decode:   maps latents to pixels; None where the model samples pixels.
    dataset:  the ImageData that pictures are compared with, or None.
    solver:   its spec.
    prompts:  that of each picture, where they have any; they begin anew after the last.
    """

    sampler: DiffusionSampler
    params: Params
    rows: int
    decode: typing.Callable[[jax.Array], jax.Array] | None
    dataset: typing.Any
    solver: str
    prompts: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        """How pictures are drawn, in words."""
        guidance = "" if self.sampler.guidance == 1 else f", guidance {self.sampler.guidance:g}"
        return f"{self.solver} in {self.sampler.steps} steps{guidance}"

    def draw(self, count: int) -> np.ndarray:
        """Samples `count` pictures, uint8 `[count, h, w, C]`."""

        def stop(_):
            return stopping.raise_if_stopped()

        requests, rows = self._requests(count), min(count, self.rows)
        return np.concatenate(
            list(image_samples.draw_batches(self.sampler, self.params, requests, rows, self.decode, stop))
        )

    def _requests(self, count):
        states = None if self.dataset is None else self.dataset.caption_states
        if states is None:
            return image_samples.SpreadClasses(self.sampler.model, count)
        return image_samples.CaptionRequests(self.prompts, states, count, guided=self.sampler.guidance != 1)


def painter_of_training(setup: Setup, params: Params) -> Painter | None:
    """The Painter of a model in training: as many pictures at a time as a micro-batch has. None for text."""
    if setup.objective.reads != "images":
        return None
    config, encoder = setup.config, setup.objective.encoder
    sampler = image_samples.sampler_of(setup.lm, config.infer, setup.objective)
    rows = config.train.batch_size // config.train.accumulate
    decode = None if encoder is None else encoder.decode
    solver, prompts = config.infer.solver or setup.objective.solver, _captions(setup.dataset)
    return Painter(sampler, params, rows, decode, setup.dataset, solver, prompts)


def _captions(dataset):
    """The captions that a run in training draws: of held-out pictures first, where its model reads texts."""
    if dataset.caption_states is None:
        return ()
    return tuple(dict.fromkeys([*dataset.captions("held_out"), *dataset.captions("train")]))


def painter_of_serving(serving: PictureServing, params: Params) -> Painter:
    """The Painter of a model that is served."""
    config, sampler = serving.config, serving.sampler
    solver = config.infer.solver or serving.objective.solver
    prompts = () if serving.prompts is None else tuple(serving.prompts.text_of_each())
    return Painter(sampler, params, config.infer.batch_size, serving.decode, serving.dataset, solver, prompts)


def check(setup: Setup) -> None:
    """Raises UserError for samples that could not be drawn, before the run instead of at its end."""
    config = setup.config
    check_judged(config, setup.objective)
    if setup.objective.reads == "images":
        image_samples.sampler_of(setup.lm, config.infer, setup.objective)
        return
    prompt = len(setup.dataset.tokenizer.encode_prompt(config.sample.prompt))
    where = f"config.sample.tokens = {config.sample.tokens} after a prompt of {prompt}"
    check_length(setup.lm, prompt + config.sample.tokens, where)


def check_judged(config: Config, objective: Objective) -> None:
    """Raises UserError for a `config.quality.fd` from which no distance can be computed."""
    judged, features = config.quality.fd, own_features.WIDTHS[-1]
    if judged and objective.reads != "images":
        raise UserError(f"config.quality.fd = {judged}: counts pictures, and this model has none; leave it at 0")
    if 0 < judged <= features:
        raise UserError(
            f"config.quality.fd = {judged}: a distance of so few samples is mostly bias, as there are {features} "
            "features; write 0, or some hundreds"
        )


def complete_text(setup: Setup, params: Params) -> str | None:
    """Generates the text of `config.sample`: prompt and completion; None where it asks for no tokens."""
    sample_config = setup.config.sample
    if not sample_config.tokens:
        return None
    prompt, sampler = setup.dataset.tokenizer.encode_prompt(sample_config.prompt), Sample(sample_config.temperature)
    length = len(prompt) + sample_config.tokens
    # Compiling takes longer than 64 tokens do. In chunks a short prompt needs no program of prefill.
    end_ids = setup.dataset.tokenizer.end_ids
    engine = Engine(setup.lm, params, sampler, end_ids, length, chunked=True, in_loop=True)
    *_, (new_ids,) = engine.generate([prompt], sample_config.tokens, setup.config.seed)
    return sample_config.prompt + setup.dataset.tokenizer.decode(new_ids)


def judge_pictures(painter: Painter, count: int) -> tuple[sample_quality.Readings, Record | None]:
    """Samples `count` pictures -> their readings, and what the row keeps of them; `({}, None)` for 0.

    Null, with the reason, where they cannot be computed. Every process must call it; the main one measures.
    """
    if not count:
        return {}, None
    if painter.dataset is None:
        return {key: missing("1", NO_DATA) for key in sample_quality.KEYS}, None
    try:
        images_BhwC = painter.draw(count)
        if not distributed.is_main():
            return {}, None
        readings, facts = sample_quality.measure(images_BhwC, painter.dataset, painter.how)
        values = (f"{key} {reading.value:.4g}" for key, reading in readings.items() if reading.value is not None)
        log.info(f"samples  {'  '.join(values)}")
        return readings, facts
    except Exception as error:
        failures.warn("samples were not judged", error)
        reason = f"could not be computed: {one_line_with_location(error)}"
        return {key: missing("1", reason) for key in sample_quality.KEYS}, None


def write_grid(
    painter: Painter, count: int, folder: pathlib.Path, shown: pathlib.Path, writer: SummaryWriter | None, step: int
) -> None:
    """Samples `count` pictures into `grid.png` of a folder (`shown` is its name in the log), and into TensorBoard.

    Clips are film strips there, and move in `grid.webp`.
    `describe_grid` writes what lies beside it. Nothing for 0.
    """
    if not count:
        return
    images_BhwC = painter.draw(count)
    if not distributed.is_main():
        return
    folder.mkdir(exist_ok=True)
    grid = clips.write_grids(folder, images_BhwC)
    if writer:
        png = (folder / "grid.png").read_bytes()
        writer.image("samples", png, width=grid.shape[1], height=grid.shape[0], step=step)
    log.info(f"samples: {shown / 'grid.png'}, {count} pictures in {painter.sampler.steps} steps")
    describe_grid(painter, images_BhwC, folder)


def write_base_grid(
    setup: Setup, painter: Painter, workdir: pathlib.Path, shown: pathlib.Path, writer: SummaryWriter | None
) -> None:
    """Samples the model before tuning into `samples/base.png`: the same requests and noise as in `grid.png` beside it.

    That model is the tuned one at step 0, which no method changes: one program samples both. Nothing for no samples.
    """
    config = setup.config
    if not config.sample.images:
        return
    start = train_setup.create_state(setup).eval_params
    images_BhwC = painter._replace(params=start).draw(config.sample.images)
    if not distributed.is_main():
        return
    grid = clips.write_grids(workdir / "samples", images_BhwC, "base")
    if writer:
        png = (workdir / "samples" / "base.png").read_bytes()
        writer.image("samples of the base", png, width=grid.shape[1], height=grid.shape[0], step=config.train.steps)
    what = "captions" if painter.prompts else "classes"
    log.info(f"samples of the base model: {shown / 'samples' / 'base.png'}, of the same {what} and noise")


def describe_grid(painter: Painter, images_BhwC: np.ndarray, folder: pathlib.Path) -> None:
    """Writes `samples.json`, which tells what lies where in the grid of these pictures, and `nearest.png`.

    The latter has the training pictures nearest to them at the same places; it is left out without training pictures,
    and for clips.
    """
    is_clip = images_BhwC.ndim == 5
    *_, height, width, _ = (clips.film_strips(images_BhwC) if is_clip else images_BhwC).shape
    labels = image_samples.spread_labels(len(images_BhwC), painter.sampler.model.classes)
    names = [] if painter.dataset is None else painter.dataset.class_names
    description = {
        "count": len(images_BhwC),
        "height": height,
        "width": width,
        "border": BORDER,
        "columns": 1 if is_clip else grid_columns(len(images_BhwC)),
        "labels": labels.tolist(),
        "classes": [names[label] if label < len(names) else "" for label in labels],
        "how": painter.how,
    }
    if painter.prompts:
        prompts = itertools.cycle(painter.prompts)
        description["prompts"] = list(itertools.islice(prompts, len(images_BhwC)))
    if painter.dataset is not None and not is_clip:
        with failures.optional("no nearest training pictures are shown"):
            description["nearest"] = _write_nearest(painter.dataset, images_BhwC, folder)
    write_atomically(folder / "samples.json", json.dumps(description, indent=1) + "\n")


def _write_nearest(dataset, images_BhwC, folder):
    """Writes `nearest.png` -> the distances, the median of held-out pictures, and how many were compared."""
    reference = picture_reference.load_reference(dataset)
    nearest = picture_reference.find_nearest(images_BhwC, reference)
    write_png(folder / "nearest.png", image_grid(picture_reference.read_pictures(dataset, nearest)))
    return {
        "distances": np.round(nearest.distances, 3).tolist(),
        "unseen": picture_reference.unseen_distance(reference),
        "of": len(reference),
    }
