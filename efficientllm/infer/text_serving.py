"""`TextServing`: prompts and their completions as the requests of an inference run."""

import dataclasses
import pathlib
import sys
import typing

import numpy as np

from efficientllm import data
from efficientllm.cost import formulas
from efficientllm.embeds.tokens import LM
from efficientllm.infer import measure, row
from efficientllm.infer.engine import Engine
from efficientllm.infer.measure import ServingMeasurement
from efficientllm.infer.measurement_windows import Windows
from efficientllm.infer.serving import Serving
from efficientllm.infer.streaming import Answers
from efficientllm.metrics.energy.reader import IdlePower
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.metrics.reading import Reading
from efficientllm.metrics.sampler import Sampler
from efficientllm.record.study_metrics import Compression
from efficientllm.typing import Params, Record


@dataclasses.dataclass(kw_only=True)
class TextServing(Serving):
    """A language model to serve.

    texts:          the prompts; `prompts` are their ids.
    length:         cache length: tokens of the longest prompt and its completion.
    max_positions:  of the checkpoint, or None.
    processor:      of pictures, where the model reads them.
    """

    lm: LM
    tokenizer: typing.Any
    sampler: typing.Any
    texts: list[str]
    prompts: list[list[int]]
    length: int
    max_positions: int | None = None
    processor: typing.Any = None

    @property
    def request(self) -> str:
        return f"{self.config.infer.batch_size} x {self.length} tokens"

    @property
    def states_bytes(self) -> int:
        """Bytes of the decode states (KV caches, recurrences) of all rows."""
        return self.config.infer.batch_size * formulas.state_bytes(self.lm, self.length)

    def engine(self, params: Params) -> Engine:
        return Engine(self.lm, params, self.sampler, self.tokenizer.end_ids, self.length)

    def generate(self, engine: Engine, folder: pathlib.Path, windows: Windows) -> None:
        """Streams the completions and writes them to a file; after an interruption, those that are finished."""
        infer = self.config.infer
        answers = Answers(self.texts, self.prompts, self.tokenizer, infer.stop)
        try:
            answers.generate(engine, infer.max_new_tokens, infer.batch_size, self.config.seed, _show)
        finally:
            answers.write(folder / "generated.jsonl")

    def measure(self, engine: Engine, reader: EnergyReader, averages: Sampler) -> ServingMeasurement:
        infer = self.config.infer
        shape = infer.batch_size, infer.prompt_length, infer.max_new_tokens, infer.repeats
        return measure.measure(engine, self.held_out_ids(), *shape, reader, averages, self.config.seed)

    def study(self, measured: ServingMeasurement, compared: Compression | None) -> dict[str, Reading]:
        return row.study(self.lm, self.boxed, measured, compared)

    def physical(self, params: Params, measured: ServingMeasurement, idle: IdlePower) -> dict[str, Reading]:
        return row.physical(self.lm, self.boxed, params, measured, idle, self.mesh)

    def describe_data(self) -> Record:
        return data.describe_data(self.config.data, self.tokenizer)

    def facts(self) -> Record:
        return {"end_tokens": [self.tokenizer.text_of(id) for id in self.tokenizer.end_ids]}

    def held_out_ids(self) -> np.ndarray:
        """Tokens of the held-out text, without padding; measured prompts are spans of it."""
        return np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in self.held_out])

    def _calibration(self):
        return data.calibration_rows(self.config.data, self.tokenizer, self.config.train.length, self.config.seed)


def _show(text):
    """Prints generated text without control characters, which a terminal would obey."""
    sys.stdout.write("".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text))
    sys.stdout.flush()
