"""The folder of an adapter of peft's as a checkpoint: its base model, with the adapter added as tensors are read."""

import dataclasses
import functools

import numpy as np

from efficientllm.convert import binding, families
from efficientllm.convert.source import Source, is_run
from efficientllm.errors import UserError
from efficientllm.untrusted import json_text

CONFIG, WEIGHT = "adapter_config.json", ".weight"


@dataclasses.dataclass(frozen=True)
class AdaptedSource(Source):
    """An adapter's folder. `base` is the Source it is put around; its tokenizer is taken unless the folder has one."""

    base: Source = None

    @property
    def tokenizer_path(self):
        """Where its tokenizer's files are."""
        return self.path if (self.path / "tokenizer_config.json").is_file() else self.base.tokenizer_path

    def tokenizer(self):
        """A spec for `config.tokenizer`."""
        return super().tokenizer() if (self.path / "tokenizer_config.json").is_file() else self.base.tokenizer()

    def chat_template(self):
        """The tokenizer's template of a conversation, or None."""
        return super().chat_template() if (self.path / "tokenizer_config.json").is_file() else self.base.chat_template()


def open_adapter(path, where, weights, open_source):
    """The AdaptedSource of the folder `path`. Raises UserError for an adapter that cannot be read, or without its base
    model."""
    base = _base(path, where, weights, open_source)
    table, tensors = None, None
    if base.config.get("model_type") not in families.FAMILIES:
        raise UserError(f"{where}: an adapter of peft's is around a model of transformers; {base.path} is none")
    if weights:
        table = families.FAMILIES[base.config["model_type"]].table
        tensors = Merged(base, path, table)
    return AdaptedSource(path, base.config, base.model, base.max_positions, tensors, table, base)


def _base(path, where, weights, open_source):
    """What `base_model_name_or_path` names; where that is not here, what the run above the folder began from."""
    named = json_text.read(path / CONFIG).get("base_model_name_or_path")
    above = path.parent / "config.json"
    config = json_text.read(above) if above.is_file() else {}
    begun = config["model"].get("pretrained") if isinstance(config, dict) and is_run(config) else None
    failed = None
    for name in dict.fromkeys(name for name in (named, begun) if isinstance(name, str) and name):
        try:
            return open_source(name, weights)
        except UserError as error:
            failed = failed or error
    if failed is None:
        raise UserError(
            f"{where}: {path / CONFIG} names no base_model_name_or_path; merge it into its base model by "
            f"python -m efficientllm.convert BASE --merge={path} --out=FOLDER"
        )
    raise UserError(
        f"{where}: its base model cannot be opened: {failed}; merge it into where that is now by "
        f"python -m efficientllm.convert BASE --merge={path} --out=FOLDER"
    )


class Merged:
    """The tensors of a Source under transformers' names, with an adapter of peft's added to those it adapts."""

    def __init__(self, base, folder, table):
        from efficientllm.adapters.folder.opened import Adapter

        lm = base.lm()
        self._source, self._plain = base, base.table is table and not hasattr(base.tensors, "bind")
        self._bound = base.bind(lm)
        self._tensors = binding.on_disk(binding.bind(lm, table))
        adaptable = {
            name: tensor
            for name, tensor in self._tensors.items()
            if all(path.endswith("kernel") for path, _, _ in tensor.parts)
        }
        self._adapter = Adapter(folder, adaptable)
        self.shapes = base.tensors.shapes if self._plain else {name: t.shape for name, t in self._tensors.items()}

    def dtype(self, name):
        """The base's; float32 of what is adapted or read through our own layout."""
        adapted = name.removesuffix(WEIGHT) in self._adapter.modules
        return self._source.tensors.dtype(name) if self._plain and not adapted else np.dtype(np.float32)

    @functools.lru_cache(maxsize=1)  # noqa: B019 a leaf's shards are read one after another
    def read(self, name):
        """The tensor, with what the adapter adds."""
        module = name.removesuffix(WEIGHT)
        if module not in self._adapter.modules:
            return self._base(name)
        from efficientllm.adapters.folder.merge import merged

        return merged(self._adapter, module, np.asarray(self._base(name), np.float32))

    def stored(self, name):
        """The rounded leaf of a tensor that is not adapted, or None."""
        adapted = name.removesuffix(WEIGHT) in self._adapter.modules
        return self._source.tensors.stored(name) if self._plain and not adapted else None

    def _base(self, name):
        if self._plain:
            return self._source.tensors.read(name)
        return self._tensors[name].join([self._part(path, position) for path, _, position in self._tensors[name].parts])

    def _part(self, path, position):
        leaf = self._bound[path]
        index = [slice(i, i + 1) for i in position] + [slice(None)] * (len(leaf.shape) - len(position))
        return leaf.read(self._source.tensors, tuple(index), np.float32)[(0,) * len(position)]
