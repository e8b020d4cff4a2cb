"""A PEFT adapter folder as a checkpoint: its base model, with the adapter merged as tensors are read."""

import dataclasses
import functools
import pathlib
import typing
from collections.abc import Callable

import numpy as np

from efficientllm.convert.files import quantized
from efficientllm.convert.hf_config import families
from efficientllm.convert.source import Source, is_run
from efficientllm.convert.tensors import parameter_map
from efficientllm.errors import UserError
from efficientllm.untrusted import json_text

CONFIG, WEIGHT = "adapter_config.json", ".weight"


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

    def chat_template(self) -> str | None:
        """The chat template of the tokenizer, or None."""
        return super().chat_template() if (self.path / "tokenizer_config.json").is_file() else self.base.chat_template()


def open_adapter(
    path: pathlib.Path, where: str, weights: bool, open_source: Callable[[str, bool], Source]
) -> AdaptedSource:
    """Opens an adapter folder and its base model. Raises UserError if either cannot be read."""
    base = _base(path, where, weights, open_source)
    if base.config.get("model_type") not in families.FAMILIES:
        raise UserError(f"{where}: a PEFT adapter needs a base model of transformers, which {base.path} is not")
    if weights:
        return adapt_source(base, path)
    return AdaptedSource(path, base.config, base.model, base.max_positions, None, None, base=base)


def adapt_source(base: Source, path: pathlib.Path) -> AdaptedSource:
    """The AdaptedSource of an adapter folder around `base`. Raises UserError if the adapter does not fit it."""
    table = families.FAMILIES[base.config["model_type"]].table
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


class MergedTensors:
    """The tensors of a Source under transformers' names, with a PEFT adapter merged."""

    def __init__(self, base: Source, folder: pathlib.Path, table: dict[str, typing.Any]):
        from efficientllm.convert.peft.read import Adapter

        lm = base.lm()
        self._source, self._plain = base, base.table is table and not hasattr(base.tensors, "bind")
        self._bound = base.bind(lm)
        self._tensors = parameter_map.disk_tensors(parameter_map.bind_parameters(lm, table))
        self._adapter = Adapter(folder, self._tensors)
        self._check(lm)
        self.shapes = base.tensors.shapes if self._plain else {name: t.shape for name, t in self._tensors.items()}
        saved = {
            name: self._adapter.shape(name, self._tensors) for name in self._adapter.saved if name in self._tensors
        }
        self.shapes = self.shapes | saved
        embedding = next(name for name, tensor in self._tensors.items() if tensor.parts[0][0] == "embedding")
        rows = self.shapes[embedding][0] if embedding in saved else lm.vocab_size
        self.vocab_size = rows if rows != lm.vocab_size else None

    def _check(self, lm):
        """Raises UserError for an adapter that changes only one of the embedding and its tied head."""
        adapter = self._adapter
        if not lm.tied:
            return
        table = next(name for name, tensor in self._tensors.items() if tensor.parts[0][0] == "embedding")
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
        adapted = name.removesuffix(WEIGHT) in self._adapter.modules or name in self._adapter.saved
        return self._source.tensors.dtype(name) if self._plain and not adapted else np.dtype(np.float32)

    @functools.lru_cache(maxsize=1)  # noqa: B019 a leaf's shards are read one after another
    def read(self, name: str) -> np.ndarray:
        """Reads a tensor with the adapter merged."""
        module = name.removesuffix(WEIGHT)
        whole = self._adapter.whole(name) if name in self._adapter.saved else self._base(name)
        if module not in self._adapter.modules:
            return whole
        from efficientllm.convert.peft.merged_weight import merge_adapter

        return merge_adapter(self._adapter, module, np.asarray(whole, np.float32))

    def stored(self, name: str) -> typing.Any:
        """The quantized leaf of a tensor without adapter, or None."""
        adapted = name.removesuffix(WEIGHT) in self._adapter.modules or name in self._adapter.saved
        return self._source.tensors.stored(name) if self._plain and not adapted else None

    def _base(self, name):
        if self._plain:
            return self._source.tensors.read(name)
        return self._tensors[name].join([self._part(path, position) for path, _, position in self._tensors[name].parts])

    def _part(self, path, position):
        leaf = self._bound[path]
        index = [slice(i, i + 1) for i in position] + [slice(None)] * (len(leaf.shape) - len(position))
        return leaf.read(self._source.tensors, tuple(index), np.float32)[(0,) * len(position)]
