"""Source, an open checkpoint: its description has been read, its tensors are read on demand."""

import dataclasses
import pathlib
import typing
from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.architecture import from_config
from efficientllm.convert.files import stored_form
from efficientllm.convert.files.gguf_file import FORMS, ROPE_FACTORS
from efficientllm.convert.hf_config import families
from efficientllm.convert.tensors import load_sharded as load
from efficientllm.convert.tensors import parameter_map
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.errors import UserError
from efficientllm.model import Backbone
from efficientllm.typing import PyTree
from efficientllm.untrusted import files, json_text

_DTYPES = {"float32", "float16", "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Source:
    """An open checkpoint: a description of the model, and a reader of its tensors. (`data.Source` reads documents.)

    Args:
      path: the folder, or the GGUF file.
      config: the config.json; of a GGUF file, the equivalent.
      model: the overrides of `config.model` that describe it: size, specs, flags.
      max_positions: the context length, RoPE scaling included, or None.
      tensors: the reader of its tensors; None without weights.
      table: the name table of its files (`tensors.name_tables`).
      name: the hub id, or the path as it was given.
    """

    path: pathlib.Path
    config: dict
    model: dict
    max_positions: int | None
    tensors: TensorReader | None
    table: dict | None
    name: str | None = None

    @property
    def pipeline(self) -> pathlib.Path | None:
        """The folder of the pipeline whose part the model is, or None."""
        return None

    @property
    def pipeline_path(self) -> str | None:
        """The pipeline's folder, or its repository of the hub, of which a part is downloaded when it is opened."""
        return None

    @property
    def trained_on_conversations(self) -> bool:
        """Whether it is known to have been trained on conversations: False for files of others."""
        return False

    @property
    def family(self) -> families.Family:
        """The family that its config.json names."""
        return families.find_family(self.config)

    def lm(self, **changes: typing.Any) -> typing.Any:
        """Builds the LM; `changes` override `config.model`: precision, scan, remat, attention_kernel, kv_cache."""
        return from_config.from_config(from_config.complete_model(self.model | changes))

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The folder of the tokenizer's files, or the GGUF file."""
        return self.path

    def tokenizer(self) -> str:
        """A spec for `config.tokenizer`. Raises UserError if the folder has no tokenizer."""
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        if self.path.is_dir() and not any((self.path / name).is_file() for name in names):
            raise UserError(f"{self.path}: no tokenizer in it ({', '.join(names)}); name one in config.tokenizer")
        return f"hf(path={str(self.path)!r})"

    def objective(self) -> str:
        """A spec for `config.objective`: what the model was trained by."""
        return "next_token()"

    def autoencoder(self) -> str:
        """A spec for `config.autoencoder`: whose latents a diffusion model was trained on."""
        return "pixels"

    def chat_template(self) -> str | None:
        """The Jinja chat template of the tokenizer, or None."""
        if self.path.is_file():
            return self.tensors.chat_template
        if files.is_there(self.path / "chat_template.jinja"):
            return files.read_text(self.path / "chat_template.jinja")
        template = read_json(self.path / "tokenizer_config.json", default={}).get("chat_template")
        if isinstance(template, list):  # several by name
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        return template if isinstance(template, str) else None

    @property
    def stored_dtype(self) -> str:
        """Name of the dtype that most tensors have; float32 if we do not write that dtype."""
        names = [name for name in self.tensors.shapes if len(self.tensors.shapes[name]) > 1]
        kinds = [self.tensors.dtype(name).name for name in names]
        most_common = max(set(kinds), key=kinds.count, default="float32")
        return most_common if most_common in _DTYPES else "float32"

    def bind(self, lm: Backbone) -> dict[str, typing.Any]:
        """`{our path: parameter_map.Leaf}`, checked against the files. Raises UserError naming the wrong tensor."""
        if self.tensors.has_own_paths:
            return self.tensors.bind(lm)
        leaves = parameter_map.bind_parameters(lm, self.table)
        ignored = (*families.ignored_patterns(self.config), f"^{ROPE_FACTORS}$")
        if lm.tied and (twin := next((name for name in HEADS if name in self.tensors.shapes), None)):
            self._check_twin(twin, leaves["embedding"].template)
            ignored = (*ignored, f"^{twin}$")
        parameter_map.check_tensors(leaves, self.tensors.shapes, ignored, self.path, self._adds_nothing)
        return leaves

    def _adds_nothing(self, name):
        """Whether a tensor without a parameter is a bias of zeros, as AutoGPTQ wrote them in 2023."""
        weight = name.removesuffix("bias") + "weight"
        return name.endswith(".bias") and weight in self.tensors.shapes and not np.any(self.tensors.read(name))

    def _check_twin(self, twin, embedding):
        """Raises UserError if the head that a tied model's files also hold is not equal to the embedding."""
        if embedding not in self.tensors.shapes:
            return
        a, b = self.tensors.read(twin), self.tensors.read(embedding)
        if a.shape != b.shape or not np.array_equal(a, b):
            raise UserError(f"{self.path}: tie_word_embeddings is true, but {twin!r} is not {embedding!r}")

    def load(
        self,
        abstract: PyTree,
        dtype: jax.typing.DTypeLike | None = None,
        lm: Backbone | None = None,
        transform: Callable[[str, jax.Array], typing.Any] | None = None,
    ) -> PyTree:
        """Loads the parameters, each read directly onto its shards.

        Args:
          abstract: a tree of `jax.ShapeDtypeStruct` with `sharding`; without one, the first device holds all.
          dtype: of all parameters; None keeps the dtypes of `abstract`.
          lm: the model of `abstract`; None builds it, with stacked or unrolled layers as `abstract` has them.
          transform: `transform(path, array)` returns what replaces a parameter; called before the next one is read.

        Raises UserError naming the tensor that is missing, extra, or of another shape.
        """
        leaves = self.bind(lm or self.lm(scan="groups" in abstract))
        return load.load_parameters(leaves, self.tensors, abstract, dtype, transform)

    def load_stored(self, abstract: PyTree, lm: Backbone) -> PyTree:
        """Loads the parameters of `lm`, which has unrolled layers, with quantized kernels as they are stored.

        Raises UserError as `load` does, and if no kernel is stored quantized.
        """
        leaves, flat = self.bind(lm), flax.traverse_util.flatten_dict(abstract, sep="/")
        quantized = {path: stored for path, leaf in leaves.items() if (stored := leaf.stored(self.tensors)) is not None}
        if not quantized:
            raise UserError(f"config.quant = 'stored': {self.path} {self._why_none_is_stored()}")
        rest = flax.traverse_util.unflatten_dict({path: flat[path] for path in flat if path not in quantized}, sep="/")
        loaded = flax.traverse_util.flatten_dict(load.load_parameters(leaves, self.tensors, rest), sep="/")
        return flax.traverse_util.unflatten_dict(loaded | jax.tree.map(jnp.asarray, quantized), sep="/")

    def _why_none_is_stored(self):
        form = stored_form.stored_form(self)
        if form is None or form == "fp8":
            return "holds no weights quantized in a format that can be multiplied; take 'float32' or 'bfloat16'"
        return (
            f"holds its weights as {form}, which cannot be multiplied without dequantizing ({', '.join(FORMS)} can); "
            "take 'bfloat16', or 'int4()' to quantize them again"
        )


HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "language_model.lm_head.weight")


def is_run(config: typing.Any) -> bool:
    """Whether a config.json is that of a training run."""
    return isinstance(config.get("train"), dict) and isinstance(config.get("model"), dict) and "task" in config


def read_json(file: pathlib.Path, default: typing.Any = None) -> typing.Any:
    """Reads a JSON file, or returns `default` if it is missing. Raises UserError if both are missing."""
    if not files.is_there(file):
        if default is not None:
            return default
        raise UserError(f"{file} is missing: not a model folder")
    return json_text.read(file)
