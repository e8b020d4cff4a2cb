"""Where the text states of prompts come from: the encoders of a pipeline, or a folder of files."""

import dataclasses
import os
import typing
from collections.abc import Sequence

from efficientllm.data import cache
from efficientllm.errors import UserError
from efficientllm.registry import register
from efficientllm.text_states.cached import CachedEncoders, StatesFolder
from efficientllm.text_states.pipelines import open_prompt_encoders
from efficientllm.text_states.states_file import StatesShape, TextStates


class PromptStates(typing.Protocol):
    """Text states of prompts. Nothing but `encode` needs the weights of an encoder."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError for prompts that have no states."""

    def shape(self, prompts: Sequence[str]) -> StatesShape:
        """The shape of the states of each prompt. Raises UserError for parts that do not fit."""

    def weights_bytes(self) -> dict[str, int | None]:
        """Bytes of the parameters of each encoder, which is in memory while it encodes; None where unknown."""

    def uncached(self, prompts: Sequence[str]) -> list[str]:
        """The distinct prompts whose states `encode` would compute."""

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """Returns the states of prompts."""


@register("text_states", "encoders")
@dataclasses.dataclass(frozen=True)
class Encoders:
    """The text encoders of a pipeline of diffusers. States are cached.

    path:       its folder, or a repository of the hub; "" is the pipeline of the model.
    without:    encoders that are left out, such as "text_encoder_3", with commas between several; zeros take the place
                of their states.
    quant:      the form of the weights of the encoder of T5's kind. Those of CLIP are float32.
    precision:  of activations and products.
    length:     tokens of a prompt for the encoder of T5's kind; 0 is that of diffusers' pipeline.
    truncate:   whether prompts that are too long are cut, as diffusers does; otherwise they are refused.
    """

    path: str = ""
    without: str = ""
    quant: str = "float32"
    precision: str = "float32"
    length: int = 0
    truncate: bool = False

    def open(self, pipeline: str | None) -> PromptStates:
        """Opens the encoders; `pipeline` is that of the model, if it has one. Raises UserError."""
        path = self.path or pipeline
        if path is None:
            raise UserError("the model belongs to no pipeline; name the folder of one, 'encoders(path=FOLDER)'")
        without = tuple(name.strip() for name in self.without.split(",") if name.strip())
        fields = {name: getattr(self, name) for name in ("length", "precision", "truncate")}
        encoders = open_prompt_encoders(path, without=without, **fields)
        forms = {encoders.names[-1]: self.quant}
        return CachedEncoders(dataclasses.replace(encoders, quant=forms), cache.root())


@register("text_states", "folder", example="folder(path='states')")
@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of the user's with the states of each prompt, as README.md describes them."""

    path: str

    def open(self, pipeline: str | None) -> PromptStates:
        """Opens the folder."""
        return StatesFolder(os.path.expanduser(self.path))
