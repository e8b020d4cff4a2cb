"""From a config to the run it describes: checkpoint, tokenizer, model, tuning method and mesh, and no array of them.

Training, inference, planning and the dry run of a sweep all take this road.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing
from collections.abc import Sequence

import jax

from efficientllm import data, sharding
from efficientllm.adapters.base import Method
from efficientllm.architecture import from_config
from efficientllm.data.text import TextData
from efficientllm.embeds.picture import ImageFormat
from efficientllm.errors import UserError, error_prefix, short_repr
from efficientllm.model import ModelType, abstract_params
from efficientllm.objectives.base import Objective
from efficientllm.registry import build, format_spec, parse_spec
from efficientllm.typing import Config, Mesh

if typing.TYPE_CHECKING:
    from efficientllm.convert.source import Source
    from efficientllm.text_states.sources import PromptStates
    from efficientllm.text_states.states_file import StatesShape

PIXELS = "pixels"  # the default of config.autoencoder
PRETRAINED = "pretrained"  # a value of config.tokenizer and config.objective: that of the checkpoint


def describe_run(
    config: Config, devices: Sequence[jax.Device] | None = None, shapes_only: bool = False
) -> RunDescription:
    """The description of a config's run on `devices` (all of this machine where None).

    With `shapes_only` nothing is read beyond what the model's shapes need: of a checkpoint its config.json, and neither
    that nor a tokenizer where `config.model.size` names its own vocabulary.
    """
    return RunDescription(config, devices, shapes_only)


@dataclasses.dataclass(frozen=True)
class RunDescription:
    """What a config says of a run. A part is built when it is first read, with the parts that it needs; every part
    raises UserError that names the key.

    So a task decides which error comes first, by the order in which it reads them, cheap ones before those that read
    files: `method` and `mesh` read none, `source` reads a checkpoint's headers, `objective` and `outline` those of the
    checkpoint at most, `tokenizer` and `dataset` the data, and `lm` needs the outline and may need the data.
    `train.setup.prepare` and `infer.setup.prepare` are the two orders.

    config:         the run's whole config.
    embed:          fields of `config.model.embed` that requests for pictures say, such as their size; a model that is
                    complete by them needs no data.
    text_length:    tokens of the states that a diffusion model reads of a text; 0 is as many as its embed says.
    method:         the tuning method of `config.adapter`: which parameters learn.
    mesh:           the mesh of `config.mesh` over `devices`.
    source:         the checkpoint of `config.model.pretrained`, or None; with `shapes_only` it holds no tensors.
    max_positions:  the most tokens of a row that the checkpoint was made for, or None.
    model_config:   `config.model`, completed by what the checkpoint's files say.
    outline:        the model at its size's own widths, for which no data are read; `vocab_size` may be None.
    tokenizer:      that of `config.tokenizer`, within the checkpoint's vocabulary.
    objective_spec: that of `config.objective`, or of the checkpoint.
    text_states:    where `config.text_states` takes the states of texts from, or None.
    autoencoder_spec: that of `config.autoencoder`, or of the checkpoint whose objective it is.
    objective:      what is minimised, and what of the data a batch holds.
    length:         tokens of a row.
    dataset:        the data of the objective, `data.text.TextData` or the like.
    lm:             the model, all of it; tasks adapt it (`train.config_checks.training_lm`, `infer.setup.serving_lm`).
    """

    config: Config
    devices: Sequence[jax.Device] | None
    shapes_only: bool
    embed: dict[str, typing.Any] = dataclasses.field(default_factory=dict)
    text_length: int = 0

    @functools.cached_property
    def method(self) -> Method:
        return build("adapter", self.config.adapter, where="config.adapter")

    @functools.cached_property
    def objective_spec(self) -> str:
        if self.config.objective != PRETRAINED:
            return self.config.objective
        if self.source is None:
            raise UserError(
                "config.model.pretrained = '': config.objective = 'pretrained' needs the model whose objective it is; "
                "give the folder of a run (of configs/dit.py, say), one of diffusers, or a hub id 'owner/name'"
            )
        return self.source.objective()

    @functools.cached_property
    def objective(self) -> Objective:
        """What is minimised; one of pictures knows the autoencoder whose latents they are."""
        inherited = {"autoencoder": self.autoencoder_spec}
        return build("objective", self.objective_spec, inherited, where="config.objective")

    @property
    def autoencoder_spec(self) -> str:
        inherits = self.config.objective == PRETRAINED and self.config.autoencoder == PIXELS and self.source
        return self.source.autoencoder() if inherits else self.config.autoencoder

    @functools.cached_property
    def autoencoder(self) -> typing.Any:
        """The autoencoder of `config.autoencoder`, or None where a model sees pixels."""
        autoencoder = build("autoencoder", self.autoencoder_spec, where="config.autoencoder")
        return None if autoencoder.channels is None else autoencoder

    @functools.cached_property
    def mesh(self) -> Mesh:
        return sharding.make_mesh(self.config.mesh, self.devices)

    @functools.cached_property
    def source(self) -> Source | None:
        says_all = self.config.objective != PRETRAINED and from_config.is_complete(self.config.model)
        if not self.config.model.pretrained or (self.shapes_only and says_all):
            return None
        from efficientllm import convert  # not needed by every run

        return convert.open_source(self.config.model.pretrained, weights=not self.shapes_only)

    @property
    def max_positions(self) -> int | None:
        return self.source.max_positions if self.source else None

    @functools.cached_property
    def model_config(self) -> Config:
        changes = self.embed | ({"text_length": self.text_length} if self.text_length else {})
        if self.source is None and not changes:
            return self.config.model
        complete = self.config.model.copy_and_resolve_references()
        if self.source is not None:
            pattern = tuple(self.source.model.get("pattern", ()))
            of_source = self.source.model | {"pattern": pattern, "parameters_of": ""}
            complete.update(of_source | ({"embed": complete.embed} if self._adds_images else {}))
        if changes:
            name, fields = parse_spec(complete.embed)
            complete.embed = format_spec(name, fields | changes)
        return complete

    @functools.cached_property
    def outline(self) -> typing.Any:
        return from_config.check(self.model_config)

    @functools.cached_property
    def tokenizer(self) -> typing.Any:
        spec = self.config.tokenizer
        if spec == PRETRAINED:
            if self.source is None:
                raise UserError("config.tokenizer = 'pretrained' needs config.model.pretrained, whose tokenizer it is")
            spec = self.source.tokenizer()
        tokenizer = data.build_tokenizer(spec, self.config.data)
        return tokenizer if self.source is None else tokenizer.within(self.source.lm().vocab_size)

    @property
    def length(self) -> int:
        return self.lm.row_length(self.config.train.length)

    @functools.cached_property
    def dataset(self) -> typing.Any:
        """The data of the objective, in batches."""
        if self.objective.reads == "text":
            text = TextData(self.config.data, self.tokenizer, self.config.train.length)
            return self._examples(text) if self.has_pictures else text
        from efficientllm.data.images import ImageData  # needs packages that text does not

        captions, share = None, 0.0
        if self.text_states is not None:
            from efficientllm.text_states.captions import CaptionStates

            denoising: typing.Any = self.objective
            captions, share = CaptionStates(self.text_states, self.config.text_states), denoising.label_dropout
        side, encoder = self.outline.token_side(), self.autoencoder
        if encoder is None:
            return ImageData(self.config.data, multiple=side, captions=captions, dropout=share)
        of_encoder = encoder.posterior, encoder.fingerprint(), encoder.factor * side, encoder.latent_shape
        return ImageData(self.config.data, None, *of_encoder, captions=captions, dropout=share)

    @property
    def has_pictures(self) -> bool:
        """Whether both the model and the data have pictures beside text."""
        reads = "text and images"
        return self.outline.reads == reads and data.modality(self.config.data) == reads

    def _examples(self, text):
        from efficientllm.vision.examples import ExampleData  # needs packages that text does not
        from efficientllm.vision.processors import read_processor

        folder = None if self.source is None or self.new_parts else self.source.tokenizer_path
        return ExampleData(text, self.lm, read_processor(folder, self.lm))

    @property
    def new_parts(self) -> tuple[str, ...]:
        """First names of the parameters that the checkpoint lacks: the tower that a language model is given."""
        return self.outline.new_parts if self._adds_images else ()

    @property
    def _adds_images(self):
        """Whether the config's ends read images, and the checkpoint's text alone."""
        return self.source is not None and from_config.adds_images(self.config.model.embed, self.source.model)

    def batch_models(self, lm: ModelType) -> tuple[ModelType, ...]:
        """Returns a trained model at the size of each bucket of the data that has pictures, the largest first; it
        alone where rows have one size.

        Raises UserError for several sizes and a checkpoint that has one, and for a size without positions.
        """
        if self.objective.reads == "text":
            return (lm,)
        shapes, where = self.dataset.used_shapes, f"config.data = {short_repr(self.config.data)}"
        if len(shapes) > 1 and self.source is not None and not lm.any_size:
            raise UserError(f"{where}: the pretrained model has pictures of one size, {lm.size}; leave buckets out")
        models = tuple(lm.clone(size=_seen(shape, self.autoencoder)[:-1]) for shape in shapes)
        with error_prefix(where) if self.source is not None else contextlib.nullcontext():
            for model in models:
                abstract_params(model)  # looks its positions up
        return models

    @functools.cached_property
    def text_states(self) -> PromptStates | None:
        if not self.config.text_states:
            return None
        source = build("text_states", self.config.text_states, where="config.text_states")
        with error_prefix(f"config.text_states = {short_repr(self.config.text_states)}"):
            return source.open(None if self.source is None else self.source.pipeline_path)

    def states_shape(self, texts: Sequence[str]) -> StatesShape:
        """The shape of the states of each text.

        Raises UserError for a model that reads no text, and for states that are missing or of another width.
        """
        model = self.outline
        with error_prefix(f"config.text_states = {short_repr(self.config.text_states)}"):
            if not model.text_length:
                raise UserError("the model reads no states of texts; leave text states and prompts out")
            shape = self.text_states.shape(texts)
            for what, width, read in (
                ("tokens", shape.width, model.text_dim),
                ("vectors", shape.pooled, model.pooled_dim),
            ):
                if width != read:
                    raise UserError(
                        f"gives {what} of {width} numbers, and the model reads {read}: it is that of another model; "
                        "name the encoders of the model's own pipeline"
                    )
        return shape

    @functools.cached_property
    def lm(self) -> typing.Any:
        self.objective.check(self.outline)  # a bad model is refused before any data are read
        says_all = self.shapes_only or self.embed
        needs_data = not (says_all and from_config.is_complete(self.model_config))
        return from_config.from_config(self.model_config, self._of_data() if needs_data else None)

    def _of_data(self):
        """What the data say of the model: a vocabulary, or a picture."""
        return self.tokenizer.vocab_size if self.objective.reads == "text" else _picture(self.dataset, self.autoencoder)

    def notes_on_data(self) -> list[str]:
        """Reads the data, or their cached summary, and returns lines for the log about what was read."""
        if self.objective.reads == "text":  # which needs no tokenizer, that of a checkpoint may take a minute
            return data.check_data(self.config.data)
        return self.dataset.notes()


def _picture(dataset, autoencoder):
    """What a model must know of the pictures of an ImageData, or of their latents, of which none is computed for it.

    Of several buckets, the largest.
    """
    *size, channels = _seen(dataset.used_shapes[0], autoencoder)
    return ImageFormat.of_size(tuple(size), channels, dataset.num_classes)


def _seen(shape, autoencoder):
    """The shape of pictures, or of their latents."""
    return tuple(shape) if autoencoder is None else autoencoder.latent_shape(shape)
