"""`PictureServing`: pictures of a diffusion model as the requests of an inference run."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from efficientllm.embeds.patches import Denoiser
from efficientllm.infer import clips, image_samples, offload, picture_row
from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.infer.measure_pictures import MeasuredBatches, MeasuredPictures, measure_pictures
from efficientllm.infer.measurement_windows import Windows
from efficientllm.infer.picture_costs import PictureCosts
from efficientllm.infer.serving import Serving
from efficientllm.infer.text_to_image_prompts import PicturePrompts
from efficientllm.metrics.energy.reader import IdlePower
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.metrics.reading import Reading, missing
from efficientllm.metrics.sampler import Sampler
from efficientllm.objectives.base import Losses
from efficientllm.record.study_metrics import Compression
from efficientllm.record.tensorboard import SummaryWriter
from efficientllm.runtime.log import Countdown
from efficientllm.typing import Params, Record
from efficientllm.weights import activation_dtype, resident_bytes

GRID = "grid.png"
NO_QUALITY = "random weights of a model that needs no data: there is nothing to score"
NO_SCORE = "pictures of prompts, or of a size of their own, are not scored on data"
log = logging.getLogger("efficientllm")


@dataclasses.dataclass
class Pictures:
    """What answers requests for pictures: a sampler and its parameters.

    `decode` maps latents to pixels in [-1, 1]; None where the model samples pixels.
    """

    sampler: DiffusionSampler
    params: Params | offload.OffloadedParams
    decode: Callable[[jax.Array], jax.Array] | None


@dataclasses.dataclass(kw_only=True)
class PictureServing(Serving):
    """A diffusion model to serve. `objective_spec` names its objective; without `dataset` its quality is unknown.

    `prompts` are what pictures are drawn of, None for its classes. `drawn` are the pictures that `generate` has drawn,
    uint8 `[n, h, w, C]`, `measured` what it has measured meanwhile, of prompts alone, and `moves` what offloading has
    cost.
    """

    lm: Denoiser
    sampler: DiffusionSampler
    objective_spec: str
    prompts: PicturePrompts | None = None
    drawn: np.ndarray | None = None
    moves: offload.Moves | None = None
    measured: MeasuredPictures | None = None

    @property
    def request(self) -> str:
        return image_samples.describe_batch(self.lm, self.config.infer.batch_size)

    @property
    def costs(self) -> PictureCosts:
        """The costs of its pictures."""
        return PictureCosts(self.sampler, self.boxed, self.objective.encoder)

    @property
    def states_bytes(self) -> int:
        """Bytes that a step needs at least: the pictures, the residual stream, and the autoencoder's weights."""
        lm, rows = self.lm, self.config.infer.batch_size
        residual = rows * self.sampler.rows_per_image * lm.row_length(0) * lm.dim
        encoder = 0 if self.offloads else self.autoencoder_bytes
        width = activation_dtype(lm.precision).itemsize
        return self.costs.picture_bytes(rows) + self.costs.request_bytes(rows) + residual * width + encoder

    @property
    def autoencoder_bytes(self) -> int:
        """Bytes of the autoencoder's weights; 0 where the model samples pixels."""
        return 0 if self.objective.encoder is None else resident_bytes(self.objective.encoder.abstract_params())

    @property
    def decode(self) -> Callable[[jax.Array], jax.Array] | None:
        """Maps latents to pixels in [-1, 1]; None where the model samples pixels."""
        encoder = self.objective.encoder
        return None if encoder is None else encoder.decode

    @property
    def offloads(self) -> bool:
        """Whether weights live in the host's memory, which is another than the devices'."""
        return self.config.infer.offload and offload.has_host_memory(self.devices)

    @property
    def requests(self) -> image_samples.PictureRequests:
        """The pictures to draw."""
        return self.prompts or image_samples.SpreadClasses(self.lm, self.config.sample.images)

    def prepare_requests(self) -> None:
        """Encodes the prompts. Encoders and the model are not in memory at once."""
        if self.prompts is not None:
            self.prompts.encode()

    def weights_bytes(self, spec: str, rules: Sequence[tuple[str, str]] = ()) -> tuple[int, int] | None:
        weights = super().weights_bytes(spec, rules)
        if weights is None or self.prompts is None:
            return weights
        encoders = [size for size in self.prompts.source.weights_bytes().values() if size]
        return weights[0], max(weights[1], *encoders, 0)

    def _place(self, boxed, leaf):
        placed = super()._place(boxed, leaf)
        return offload.to_host(placed) if self.offloads else placed

    def engine(self, params: Params) -> Pictures:
        if not self.offloads:
            return Pictures(self.sampler, params, self.decode)
        parts: list[offload.OffloadedParams] = []
        self.moves, encoder = offload.Moves(), self.objective.encoder
        model = offload.OffloadedParams(params, self.moves, parts)
        if encoder is None:
            return Pictures(self.sampler, model, None)
        autoencoder = offload.OffloadedParams(offload.to_host(encoder.load_params()), self.moves, parts)
        return Pictures(self.sampler, model, lambda latents: encoder.decode(latents, autoencoder.on_devices()))

    def generate(self, engine: Pictures, folder: pathlib.Path, windows: Windows) -> None:
        """Writes PNG files, or clips, of all requests as they are finished, and a grid of them at the end.

        After an interruption the grid is of those that were finished. Pictures of prompts are measured as they are
        drawn.
        """
        requests, rows = self.requests, self.config.infer.batch_size
        if not requests.count:
            return
        if engine.decode is None and self.lm.channels not in (1, 3):
            log.info(f"no pictures: latents of {self.lm.channels} channels, and no autoencoder that decodes them")
            return
        folder.mkdir(exist_ok=True)
        countdown = Countdown("sampling", -(-requests.count // rows) * self.sampler.steps)
        batches: Iterable[np.ndarray]
        if self.prompts is None:
            batches = image_samples.draw_batches(
                engine.sampler, engine.params, requests, rows, engine.decode, lambda _: countdown.add()
            )
        else:
            batches = MeasuredBatches(
                engine.sampler, engine.params, engine.decode, requests, rows, windows, countdown.add
            )
        self._write(batches, folder)
        if isinstance(batches, MeasuredBatches):
            self.measured = batches.measured()

    def _write(self, batches, folder):
        fps, finished = self.config.infer.fps, []
        try:
            for images_BhwC in batches:
                clips.write_samples(folder, images_BhwC, fps, len(finished))
                finished.extend(images_BhwC)
        finally:
            if finished:
                self.drawn = np.stack(finished)
                clips.write_grids(folder, self.drawn, fps=fps)
                kind = "clips" if self.drawn.ndim == 5 else "pictures"
                log.info(f"samples: {len(finished)} {kind} in {self.sampler.steps} steps, in {folder.name}/")

    def chart(self, writer: SummaryWriter, folder: pathlib.Path) -> None:
        from PIL import Image

        if (file := folder / GRID).is_file():
            with Image.open(file) as grid:
                writer.image("samples", file.read_bytes(), *grid.size, 0)

    def measure(self, engine: Pictures, reader: EnergyReader, averages: Sampler) -> MeasuredPictures:
        if self.measured is not None:
            return self.measured
        infer, windows = self.config.infer, Windows(reader, averages)
        shape = infer.batch_size, infer.repeats
        return measure_pictures(engine.sampler, engine.params, engine.decode, *shape, windows, self.config.seed)

    @property
    def _no_quality(self):
        return NO_SCORE if self.prompts is not None or self.config.infer.size else NO_QUALITY

    def study(self, measured: MeasuredPictures, compared: Compression | None) -> dict[str, Reading]:
        readings = picture_row.study(self.costs, measured, compared)
        return readings if self.dataset is not None else readings | {"mcr": missing("1", self._no_quality)}

    def physical(self, params: Params, measured: MeasuredPictures, idle: IdlePower) -> dict[str, Reading]:
        readings = picture_row.physical(self.costs, params, measured, idle, self.mesh)
        if self.prompts is not None:
            readings |= self.prompts.readings | picture_row.autoencoder(self.objective.encoder, self.autoencoder_bytes)
        if self.config.infer.offload:
            readings |= offload.readings(self.moves, 1 if self.objective.encoder is None else 2)
        return readings

    def facts(self) -> Record:
        solver, autoencoder = repr(self.sampler.solver), self.objective.autoencoder
        facts = {"objective": self.objective_spec, "solver": solver, "autoencoder": autoencoder}
        return facts if self.prompts is None else facts | {"prompts": len(self.prompts.texts)}

    def quality(self, losses: Losses) -> dict[str, Reading]:
        return super().quality(losses) if losses else {"eval_loss": missing("1", self._no_quality)}
