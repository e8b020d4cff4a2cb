"""Prompts of pictures: their texts, the states that a model reads of them, and each picture's condition."""

import dataclasses
import logging
import time

import jax.numpy as jnp
import numpy as np

from efficientllm import base_config
from efficientllm.embeds.condition import Condition
from efficientllm.errors import UserError, error_prefix, short_repr
from efficientllm.infer import prompts
from efficientllm.infer.image_samples import SampleConditions
from efficientllm.metrics.reading import Reading, missing
from efficientllm.run_description import RunDescription
from efficientllm.text_states.sources import PromptStates
from efficientllm.text_states.states_file import StatesShape, TextStates

log = logging.getLogger("efficientllm")


@dataclasses.dataclass
class PicturePrompts:
    """Prompts of pictures, `each` of every prompt in turn.

    negative:  what guidance leads away from; None without guidance.
    seed:      of the noise that pictures start from.
    source:    where the text states come from.
    shape:     of the states of each prompt.
    states:    of the prompts and of `negative` after them, once `encode` has computed them.
    """

    texts: list[str]
    negative: str | None
    each: int
    seed: int
    source: PromptStates
    shape: StatesShape
    states: TextStates | None = None
    readings: dict[str, Reading] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of pictures."""
        return len(self.texts) * self.each

    @property
    def all_texts(self) -> list[str]:
        """The prompts, and the negative one with guidance."""
        return self.texts if self.negative is None else [*self.texts, self.negative]

    def text_of_each(self) -> list[str]:
        """The prompt of each picture."""
        return [text for text in self.texts for _ in range(self.each)]

    def encode(self) -> None:
        """Computes the states of all texts, or reads them; sets their `readings`."""
        uncached = self.source.uncached(self.all_texts)
        begin = time.perf_counter()
        self.states = self.source.encode(self.all_texts)
        seconds = time.perf_counter() - begin
        self.readings = {
            "text_encoder_bytes": _bytes(self.source.weights_bytes()),
            "text_encode_s": Reading(seconds, "s", f"{_count(uncached)} encoded, weights read and programs compiled")
            if uncached
            else missing("s", "no text was encoded: all states were in the cache, or are the user's"),
        }
        log.info(f"text states of {_count(self.all_texts)}: {seconds:.1f} s, {len(uncached)} of them encoded")

    def wanted(self, numbers_B: np.ndarray) -> SampleConditions:
        """The conditions of the pictures of these numbers; those beyond the last are of its prompt."""
        assert self.states is not None, "encode() comes first"
        rows_B = np.minimum(numbers_B // max(1, self.each), len(self.texts) - 1)
        negative_B = None if self.negative is None else np.full_like(rows_B, len(self.texts))
        return SampleConditions(self._condition(rows_B), None if negative_B is None else self._condition(negative_B))

    def _condition(self, rows_B):
        """In float32, whatever the encoders compute in, so that one program serves all."""
        text_BSE, pooled_BE = self.states.take(rows_B)
        pooled_BE = None if pooled_BE is None else jnp.asarray(pooled_BE, jnp.float32)
        return Condition(text_BSE=jnp.asarray(text_BSE, jnp.float32), pooled_BE=pooled_BE)


def _bytes(weights):
    if None in weights.values():
        return missing("bytes", "encoders are as their files store them")
    names = ", ".join(f"{name} {size:,}" for name, size in weights.items()) or "no encoder is used"
    return Reading(sum(weights.values()), "bytes", f"by shapes: {names}; in memory one after another, before the model")


def _count(texts):
    return f"{len(texts)} text{'s' * (len(texts) != 1)}"


def open_prompts(description: RunDescription) -> PicturePrompts | None:
    """Reads the prompts of a config and opens the source of their states; None where it names no source.

    Raises UserError for a model that reads no text, a negative prompt without guidance, parts that are missing or do
    not fit, and prompts that are too long.
    """
    config, infer = description.config, description.config.infer
    if not config.text_states:
        check_no_prompts(description)
        return None
    if infer.negative_prompt and infer.guidance == 1:
        raise UserError(
            f"config.infer.negative_prompt = {short_repr(infer.negative_prompt)}: is not read without guidance; set "
            "config.infer.guidance, such as 7.0, or leave it out"
        )
    texts = prompts.read(infer.prompts)
    if not texts:
        raise UserError(f"config.infer.prompts = {short_repr(infer.prompts)}: holds no prompt; write one in each line")
    negative = None if infer.guidance == 1 else infer.negative_prompt
    all_texts = texts if negative is None else [*texts, negative]
    source, shape = description.text_states, description.states_shape(all_texts)
    assert source is not None, "config.text_states names one"
    with error_prefix("config.infer.prompts"):
        source.check(all_texts)
    return PicturePrompts(texts, negative, config.sample.images, config.seed, source, shape)


def check_no_prompts(description: RunDescription) -> None:
    """Raises UserError for prompts that nothing would read."""
    infer, default = description.config.infer, base_config.get_config().infer
    reads_text = description.outline.text_length
    for key in ("prompts", "negative_prompt"):
        if infer[key] != default[key]:
            advice = (
                "no text is read without config.text_states, such as 'encoders()'; set it, or leave prompts out"
                if reads_text
                else "a diffusion model samples pictures of its classes; leave prompts out"
            )
            raise UserError(f"config.infer.{key} = {short_repr(infer[key])}: {advice}")
