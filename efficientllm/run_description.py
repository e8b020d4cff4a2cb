"""From a config to the run it describes: checkpoint, tokenizer, model, tuning method and mesh, and no array of them.

Training, inference, planning and the dry run of a sweep all take this road.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Sequence

import jax

from efficientllm import data, sharding
from efficientllm.adapters.base import Method
from efficientllm.architecture import from_config
from efficientllm.errors import UserError
from efficientllm.model import LM
from efficientllm.registry import build
from efficientllm.typing import Config, Mesh

if typing.TYPE_CHECKING:
    from efficientllm.convert.source import Source


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
    """What a config says of a run. A part is built when it is first read, so that a task decides which error comes
    first; every part raises UserError that names the key.

    config:         the run's whole config.
    method:         the tuning method of `config.adapter`: which parameters learn.
    mesh:           the mesh of `config.mesh` over `devices`.
    source:         the checkpoint of `config.model.pretrained`, or None; with `shapes_only` it holds no tensors.
    max_positions:  the most tokens of a row that the checkpoint was made for, or None.
    model_config:   `config.model`, completed by what the checkpoint's files say.
    outline:        the LM at its size's own widths, for which no text is read; `vocab_size` may be None.
    tokenizer:      that of `config.tokenizer`, within the checkpoint's vocabulary.
    lm:             the LM, all of it; tasks adapt it (`train.config_checks.training_lm`, `infer.setup.serving_lm`).
    """

    config: Config
    devices: Sequence[jax.Device] | None
    shapes_only: bool

    @functools.cached_property
    def method(self) -> Method:
        return build("adapter", self.config.adapter, where="config.adapter")

    @functools.cached_property
    def mesh(self) -> Mesh:
        return sharding.make_mesh(self.config.mesh, self.devices)

    @functools.cached_property
    def source(self) -> Source | None:
        if not self.config.model.pretrained or (self.shapes_only and from_config.has_vocabulary(self.config.model)):
            return None
        from efficientllm import convert  # not needed by every run

        return convert.open_source(self.config.model.pretrained, weights=not self.shapes_only)

    @property
    def max_positions(self) -> int | None:
        return self.source.max_positions if self.source else None

    @functools.cached_property
    def model_config(self) -> Config:
        if self.source is None:
            return self.config.model
        complete = self.config.model.copy_and_resolve_references()
        pattern = tuple(self.source.model.get("pattern", ()))
        complete.update(self.source.model | {"pattern": pattern, "parameters_of": ""})
        return complete

    @functools.cached_property
    def outline(self) -> LM:
        return from_config.check(self.model_config)

    @functools.cached_property
    def tokenizer(self) -> typing.Any:
        spec = self.config.tokenizer
        if spec == "pretrained":
            if self.source is None:
                raise UserError("config.tokenizer = 'pretrained' needs config.model.pretrained, whose tokenizer it is")
            spec = self.source.tokenizer()
        tokenizer = data.build_tokenizer(spec, self.config.data)
        return tokenizer if self.source is None else tokenizer.within(self.source.lm().vocab_size)

    @functools.cached_property
    def lm(self) -> LM:
        vocab_size = self.outline.vocab_size  # a bad model is refused before any text is read for a tokenizer
        needs_tokenizer = vocab_size is None or not self.shapes_only
        return from_config.from_config(self.model_config, self.tokenizer.vocab_size if needs_tokenizer else None)
