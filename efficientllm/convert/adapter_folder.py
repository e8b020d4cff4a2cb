"""A PEFT adapter folder as a checkpoint: its base model, with the adapter merged as tensors are read."""

import dataclasses
import functools
import pathlib
import typing
from collections.abc import Callable

import numpy as np

from efficientllm.convert.files import quantized
from efficientllm.convert.hf_config import families
from efficientllm.convert.peft.unsupported import family_of, table_of
from efficientllm.convert.source import Source, is_run
from efficientllm.convert.tensors import parameter_map
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.errors import UserError
from efficientllm.model import Backbone
from efficientllm.untrusted import json_text

CONFIG, WEIGHT, BIAS = "adapter_config.json", ".weight", ".bias"


@dataclasses.dataclass(frozen=True)
class AdaptedSource(Source):
    """Source of an adapter folder around `base`, whose tokenizer is used unless the folder has one."""

    base: Source | None = None

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The folder of the tokenizer's files."""
        return self.path if (self.path / "tokenizer_config.json").is_file() else self.base.tokenizer_path

    def tokenizer(self) -> str:
        """A spec for `config.tokenizer`."""
        return super().tokenizer() if (self.path / "tokenizer_config.json").is_file() else self.base.tokenizer()

    def objective(self) -> str:
        """The objective of the base model."""
        return self.base.objective()

    def autoencoder(self) -> str:
        """The autoencoder of the base model."""
        return self.base.autoencoder()

    @property
    def pipeline(self) -> pathlib.Path | None:
        """The folder of the pipeline whose part the base model is, or None."""
        return self.base.pipeline

    @property
    def pipeline_path(self) -> str | None:
        return self.base.pipeline_path

    def bind(self, lm: Backbone) -> dict[str, typing.Any]:
        """`{our path: parameter_map.Leaf}`, checked against the tensors of the base model."""
        if not self.config:  # a run's from scratch: MergedTensors has the tensors of the table
            return parameter_map.bind_parameters(lm, self.table)
        return dataclasses.replace(self.base, tensors=self.tensors, table=self.table).bind(lm)

    def chat_template(self) -> str | None:
        """The chat template of the tokenizer, or None."""
        return super().chat_template() if (self.path / "tokenizer_config.json").is_file() else self.base.chat_template()


def open_adapter(
    path: pathlib.Path, where: str, weights: bool, open_source: Callable[[str, bool], Source]
) -> AdaptedSource:
    """Opens an adapter folder and its base model. Raises UserError if either cannot be read."""
    base = _base(path, where, weights, open_source)
    table_of(base)
    if weights:
        return adapt_source(base, path)
    return AdaptedSource(path, base.config, base.model, base.max_positions, None, None, base=base)


def adapt_source(base: Source, path: pathlib.Path) -> AdaptedSource:
    """The AdaptedSource of an adapter folder around `base`. Raises UserError if the adapter does not fit it."""
    table = table_of(base)
    tensors = MergedTensors(base, path, table)
    config, model = base.config, base.model
    if tensors.vocab_size is not None:
        config = config | {"vocab_size": tensors.vocab_size}
        plain = {key: value for key, value in config.items() if key != quantized.KEY}
        model = families.describe_config(plain, path).model
    return AdaptedSource(path, config, model, base.max_positions, tensors, table, base=base)


def _base(path, where, weights, open_source):
    """Opens the base model: that of the run around the folder if there is one, else `base_model_name_or_path`."""
    base_name = json_text.read(path / CONFIG).get("base_model_name_or_path")
    above = path.parent / "config.json"
    config = json_text.read(above) if above.is_file() else {}
    run_base = config["model"].get("pretrained") if isinstance(config, dict) and is_run(config) else None
    first_error = None
    for name in dict.fromkeys(name for name in (run_base, base_name) if isinstance(name, str) and name):
        try:
            return open_source(name, weights)
        except UserError as error:
            first_error = first_error or error
    if first_error is None:
        raise UserError(
            f"{where}: {path / CONFIG} names no base_model_name_or_path; merge it into its base model by "
            f"python -m efficientllm.convert BASE --merge={path} --out=FOLDER"
        )
    raise UserError(
        f"{where}: its base model cannot be opened: {first_error}; merge it into the base model's present location by "
        f"python -m efficientllm.convert BASE --merge={path} --out=FOLDER"
    )


class MergedTensors(TensorReader):
    """The tensors of a Source under transformers' names, with a PEFT adapter merged."""

    def __init__(self, base: Source, folder: pathlib.Path, table: dict[str, typing.Any]):
        from efficientllm.convert.peft.read import Adapter

        lm = base.lm()
        self.where = folder
        self._source, self._plain = base, base.table is table and not base.tensors.has_own_paths
        self._bound = base.bind(lm)
        self._tensors = parameter_map.disk_tensors(parameter_map.bind_parameters(lm, table))
        self._adapter = Adapter(folder, self._tensors, family_of(base))
        embedding = next((name for name, tensor in self._tensors.items() if tensor.parts[0][0] == "embedding"), None)
        if embedding is not None and lm.tied:
            self._check_tied(embedding)
        self.shapes = base.tensors.shapes if self._plain else {name: t.shape for name, t in self._tensors.items()}
        saved = {
            name: self._adapter.shape(name, self._tensors) for name in self._adapter.saved if name in self._tensors
        }
        self.shapes = self.shapes | saved
        rows = self.shapes[embedding][0] if embedding in saved else None
        self.vocab_size = None if rows is None or rows == lm.vocab_size else rows

    def _check_tied(self, table):
        """Raises UserError for an adapter that changes only one of the embedding `table` and its tied head."""
        adapter = self._adapter
        head = next((name for name in adapter.saved if name not in self._tensors), None)
        same = head and table in adapter.saved and np.array_equal(adapter.whole(head), adapter.whole(table))
        trained = any(table.removesuffix(WEIGHT).endswith(name) for name in adapter.config.saved)
        if table.removesuffix(WEIGHT) in adapter.modules or (head and not same) or (trained and not same):
            raise UserError(
                f"{adapter.file}: it changes {'the head' if head else table} alone, which this model ties to "
                f"{table if head else 'its head'}: two tables where it has one"
            )

    def dtype(self, name: str) -> np.dtype:
        """The base's dtype; float32 for adapted tensors and those converted from our layout."""
        return self._source.tensors.dtype(name) if self._plain and not self._is_adapted(name) else np.dtype(np.float32)

    @functools.lru_cache(maxsize=1)  # noqa: B019 a leaf's shards are read one after another
    def read(self, name: str) -> np.ndarray:
        """Reads a tensor with the adapter merged."""
        from efficientllm.convert.peft import merged_weight

        module = name.removesuffix(WEIGHT)
        whole = self._adapter.whole(name) if name in self._adapter.saved else self._base(name)
        if self._adapter.changes_bias(name):
            weight = np.asarray(self._base(f"{name.removesuffix(BIAS)}{WEIGHT}"), np.float32)
            return merged_weight.merge_into_bias(self._adapter, name.removesuffix(BIAS), weight, np.asarray(whole))
        if module not in self._adapter.modules:
            return whole
        return merged_weight.merge_adapter(self._adapter, module, np.asarray(whole, np.float32))

    def stored(self, name: str) -> typing.Any:
        """The quantized leaf of a tensor without adapter, or None."""
        return self._source.tensors.stored(name) if self._plain and not self._is_adapted(name) else None

    def _is_adapted(self, name):
        adapter = self._adapter
        return name.removesuffix(WEIGHT) in adapter.modules or name in adapter.saved or adapter.changes_bias(name)

    def _base(self, name):
        if self._plain:
            return self._source.tensors.read(name)
        return self._tensors[name].join([self._part(path, position) for path, _, position in self._tensors[name].parts])

    def _part(self, path, position):
        leaf = self._bound[path]
        index = [slice(i, i + 1) for i in position] + [slice(None)] * (len(leaf.shape) - len(position))
        return leaf.read(self._source.tensors, tuple(index), np.float32)[(0,) * len(position)]
