"""Text states of the pipelines of diffusers: Stable Diffusion 3 and Wan.

Letters: P the width of a vector of a whole text.
"""

import dataclasses
import functools
import html
import importlib.util
import pathlib
import re
import typing
from collections.abc import Sequence

import numpy as np

from efficientllm.convert import hub_snapshot
from efficientllm.convert.source import read_json
from efficientllm.errors import UserError, did_you_mean, short_repr
from efficientllm.text_states.encoder import PipelineEncoder, open_encoder
from efficientllm.text_states.states_file import StatesShape, TextStates
from efficientllm.untrusted import files
from efficientllm.weights import activation_dtype

WIDEST = 2**20
CLIP_LENGTH = 77  # tokens of a prompt, where no CLIP is there to say it
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
# Not a repository's *.safetensors: they are copies of the whole model in other layouts and dtypes.
_HUB_FILES = ("*.json", "*.txt", "*.model", "model.safetensors", "model-*.safetensors")


@dataclasses.dataclass(frozen=True)
class PromptEncoders:
    """The text encoders of a pipeline's folder.

    Args:
      folder: with `model_index.json`.
      without: encoders that are not used, such as `text_encoder_3`, beside those that model_index.json leaves out.
      length: tokens of a prompt for the encoder of T5's kind; 0 is that of diffusers' pipeline.
      precision: `config.model.precision` of the encoders.
      quant: the form of their weights: `{name: spec}`, such as `{"text_encoder_3": "int8()"}`; the others are float32.
      truncate: whether prompts that are too long are cut; otherwise they are refused.
    """

    folder: pathlib.Path
    without: tuple[str, ...] = ()
    length: int = 0
    precision: str = "float32"
    quant: dict[str, str] = dataclasses.field(default_factory=dict)
    truncate: bool = False

    names: typing.ClassVar[tuple[str, ...]]  # of the encoders
    widths: typing.ClassVar[tuple[str, ...]]  # keys of the transformer's config.json
    default_length: typing.ClassVar[int]

    def __post_init__(self):
        for key in (*self.without, *self.quant):
            if key not in self.names:
                raise UserError(
                    f"{self.folder}: has no encoder {short_repr(key)}; known: {', '.join(self.names)}"
                    f"{did_you_mean(key, self.names)}"
                )

    @functools.cached_property
    def opened(self) -> dict[str, PipelineEncoder]:
        """The encoders that are used, by name; no tensor is read. Raises UserError for parts that do not fit."""
        raise NotImplementedError(f"{type(self).__name__} defines no opened")

    @property
    def shape(self) -> StatesShape:
        """The shape of a prompt's states. Raises UserError as `opened` does."""
        return StatesShape(self.t5_length, *self.widths_read(), *[0] * (2 - len(self.widths)))

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """Encodes prompts. Raises UserError for one that is too long, and for parts that do not fit."""
        raise NotImplementedError(f"{type(self).__name__} defines no encode(prompts)")

    def clean(self, prompt: str) -> str:
        """Returns the text that tokenizers are given."""
        return prompt

    def check_parts(self) -> None:
        """Raises UserError for encoders that are missing, that do not fit, or whose files hold other tensors."""
        for encoder in self.opened.values():
            encoder.check()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError for a prompt that is longer than an encoder reads; the log says which are cut."""
        for encoder in self.opened.values():
            encoder.tokenizer.check([self.clean(prompt) for prompt in prompts])

    @property
    def t5_length(self) -> int:
        """The tokens of a prompt that the encoder of T5's kind reads."""
        return self.length or self.default_length

    @functools.cached_property
    def present(self) -> tuple[str, ...]:
        """The names of the encoders that are used."""
        listed = read_json(self.folder / hub_snapshot.PIPELINE)

        def is_listed(name):
            entry = listed.get(name)
            return isinstance(entry, list) and None not in entry

        return tuple(name for name in self.names if name not in self.without and is_listed(name))

    def describe(self) -> str:
        """What a prompt's states depend on beside the files: the fields and the tokens' number, as a text."""
        forms = {name: self.quant.get(name, "float32") for name in self.present}
        return f"{type(self).__name__} {forms} {self.widths_read()} {self.t5_length} {self.precision} {self.truncate}"

    def part_folders(self) -> list[pathlib.Path]:
        """The folders whose files the states depend on."""
        return [self.folder / part for name in self.present for part in (name, _TOKENIZERS[name])]

    def open(self, name: str, **fields: typing.Any) -> PipelineEncoder:
        """Opens the encoder `name`."""
        where = self.folder / name, self.folder / _TOKENIZERS[name]
        fields |= {"precision": self.precision, "quant": self.quant.get(name, "float32")}
        return open_encoder(*where, truncate=self.truncate, **fields)

    def widths_read(self) -> list[int]:
        """The widths that the pipeline's transformer reads, of `widths`."""
        file = self.folder / "transformer" / "config.json"
        values = [read_json(file).get(key) for key in self.widths]
        for key, value in zip(self.widths, values, strict=True):
            if type(value) is not int or not 0 < value <= WIDEST:
                raise UserError(f"{file}: {key} = {short_repr(value)}: must be a width of at most {WIDEST:,}")
        return values


class StableDiffusion3(PromptEncoders):
    """CLIP-L, OpenCLIP bigG and T5 of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206).

    `text` is [(CLIP-L | bigG | zeros) of 77 tokens; T5 of 256 tokens], along tokens. CLIP's states are those before
    the last layer. `pooled` is [CLIP-L | bigG]. Padding is read everywhere. An encoder that is not there gives zeros.
    """

    names = ENCODERS
    widths = ("joint_attention_dim", "pooled_projection_dim")
    default_length = 256

    @functools.cached_property
    def opened(self) -> dict[str, PipelineEncoder]:
        E, P = self.widths_read()
        opened = {name: self.open(name, skip=1) for name in ENCODERS[:2] if name in self.present}
        widths = self._clip_widths(opened, P)
        if sum(widths) != P or sum(widths) > E:
            raise UserError(
                f"{self.folder}: vectors of texts have {' + '.join(map(str, widths))} numbers, and the transformer "
                f"reads {P} of them, and {E} of a token: a part is that of another model"
            )
        lengths = [encoder.tokenizer.length for encoder in opened.values()]
        if len(set(lengths)) > 1:
            raise UserError(
                f"{self.folder}: its encoders of CLIP read {lengths[0]} and {lengths[1]} tokens; they must read as many"
            )
        if "text_encoder_3" in self.present:
            t5 = opened["text_encoder_3"] = self.open("text_encoder_3", length=self.t5_length)
            if t5.module.dim != E:
                raise UserError(
                    f"{t5.part}: has states of width {t5.module.dim}, and the transformer reads joint_attention_dim = "
                    f"{E}: it is a part of another model"
                )
        return opened

    @property
    def shape(self) -> StatesShape:
        return StatesShape(self._clip_length + self.t5_length, *self.widths_read())

    @property
    def _clip_length(self):
        return next((self.opened[name].tokenizer.length for name in ENCODERS[:2] if name in self.opened), CLIP_LENGTH)

    def encode(self, prompts: Sequence[str]) -> TextStates:
        (tokens, E, P), S, opened = self.shape, self._clip_length, self.opened
        clips = {name: encoder for name, encoder in opened.items() if name != "text_encoder_3"}
        first_width, _ = self._clip_widths(clips, P)
        dtype = activation_dtype(self.precision)
        text_BSE: np.ndarray = np.zeros((len(prompts), tokens, E), dtype)
        pooled_BP: np.ndarray = np.zeros((len(prompts), P), dtype)
        for start, name in ((0, ENCODERS[0]), (first_width, ENCODERS[1])):
            if name in clips:
                encoded, _ = clips[name].encode(prompts)
                text_BSE[:, :S, start : start + encoded.states_BTD.shape[-1]] = encoded.states_BTD
                pooled_BP[:, start : start + encoded.pooled_BD.shape[-1]] = encoded.pooled_BD
        if "text_encoder_3" in opened:
            text_BSE[:, S:] = opened["text_encoder_3"].encode(prompts)[0].states_BTD
        return TextStates(text_BSE, pooled_BP)

    def _clip_widths(self, opened, P):
        """The width of each CLIP's vector and states; that of a missing one is what the transformer has left."""
        for encoder in opened.values():
            module = encoder.module
            if not module.projection or module.projection != module.dim:
                raise UserError(
                    f"{encoder.part}: has states of width {module.dim} and projection_dim = {module.projection}; those "
                    "of a CLIP of Stable Diffusion 3 are equal"
                )
        widths = [opened[name].module.dim if name in opened else None for name in ENCODERS[:2]]
        rest = P - sum(filter(None, widths))
        if widths == [None, None]:
            return [P, 0]
        return [rest if width is None else width for width in widths]


class Wan(PromptEncoders):
    """UMT5 of Wan 2.1: states of at most 512 tokens; padding is not read, and its states are zeros.

    As in diffusers, prompts are cleaned: HTML entities, white space, and what `ftfy` mends where it is installed.
    """

    names = ENCODERS[:1]
    widths = ("text_dim",)
    default_length = 512

    @functools.cached_property
    def opened(self) -> dict[str, PipelineEncoder]:
        (E,) = self.widths_read()
        opened = {name: self.open(name, length=self.t5_length, masked=True) for name in self.present}
        for encoder in opened.values():
            if encoder.module.dim != E:
                raise UserError(
                    f"{encoder.part}: has states of width {encoder.module.dim}, and the transformer reads text_dim = "
                    f"{E}: it is a part of another model"
                )
        return opened

    def encode(self, prompts: Sequence[str]) -> TextStates:
        if not self.opened:
            return TextStates(np.zeros((len(prompts), *self.shape[:2]), activation_dtype(self.precision)), None)
        (encoder,) = self.opened.values()
        encoded, real_BT = encoder.encode([self.clean(prompt) for prompt in prompts])
        nothing = np.zeros((), encoded.states_BTD.dtype)
        return TextStates(np.where(real_BT[..., None], encoded.states_BTD, nothing), None)

    def clean(self, prompt: str) -> str:
        return clean_prompt(prompt)

    def describe(self) -> str:
        return f"{super().describe()} ftfy={_mends_text()}"


def _mends_text():
    return importlib.util.find_spec("ftfy") is not None


def clean_prompt(prompt: str) -> str:
    """Cleans a prompt of Wan's."""
    if _mends_text():
        import ftfy

        prompt = ftfy.fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


PIPELINES = {"StableDiffusion3Pipeline": StableDiffusion3, "WanPipeline": Wan}


def open_prompt_encoders(path: str, **fields: typing.Any) -> PromptEncoders:
    """Opens the text encoders of a pipeline: its folder, or a repository of the hub, of which no more is downloaded.

    `fields` are those of `PromptEncoders`. Raises UserError for another pipeline.
    """
    folder, where = pathlib.Path(path).expanduser(), f"path = {short_repr(str(path))}"
    if not files.is_there(folder) and hub_snapshot.is_name(str(path)):
        encoders = [encoder for encoder in ENCODERS if encoder not in fields.get("without", ())]
        parts = (*encoders, *(_TOKENIZERS[encoder] for encoder in encoders))
        folder = hub_snapshot.download(str(path), where, _HUB_FILES, parts)
        hub_snapshot.download(str(path), where, ("config.json",), ("transformer",))
    if not files.is_there(folder / hub_snapshot.PIPELINE):
        raise UserError(f"{where}: no {hub_snapshot.PIPELINE} in it; name the folder of a pipeline of diffusers")
    name = read_json(folder / hub_snapshot.PIPELINE).get("_class_name")
    if name not in PIPELINES:
        raise UserError(
            f"{folder / hub_snapshot.PIPELINE}: _class_name = {short_repr(name)}: the texts of "
            f"{', '.join(PIPELINES)} are known{did_you_mean(name, PIPELINES)}"
        )
    return PIPELINES[name](folder, **fields)
