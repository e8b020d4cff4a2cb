"""A checkpoint whose description has been read and whose tensors are read when they are needed."""

import dataclasses
import pathlib

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
from efficientllm.errors import UserError
from efficientllm.untrusted import files, json_text

_DTYPES = {"float32", "float16", "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose description has been read and whose tensors have not.

    Args:
      path: its folder or file.
      config: its config.json (of a GGUF file: what that would be).
      model: the overrides of `config.model` that describe it: size, specs, flags.
      max_positions: the most positions it has, with what its scaling adds, or None.
      tensors: what reads them.
      table: the name table of its files.
      name: what others know it by: a hub id, or the path as it was given.
    """

    path: pathlib.Path
    config: dict
    model: dict
    max_positions: int
    tensors: object
    table: dict
    name: str = None

    @property
    def family(self):
        return families.FAMILIES[self.config["model_type"]]

    def lm(self, **changes):
        """The LM that it is; `changes` are of `config.model`: precision, scan, remat, attention_kernel, kv_cache."""
        return from_config.from_config(complete(self.model | changes))

    @property
    def tokenizer_path(self):
        """Where its tokenizer's files are: a folder, or the GGUF file."""
        return self.path

    def tokenizer(self):
        """A spec for `config.tokenizer`. Raises UserError if no tokenizer is there."""
        names = ("tokenizer.json", "tokenizer.model", "vocab.json")
        if self.path.is_dir() and not any((self.path / name).is_file() for name in names):
            raise UserError(f"{self.path}: no tokenizer in it ({', '.join(names)}); name one in config.tokenizer")
        return f"hf(path={str(self.path)!r})"

    def chat_template(self):
        """The tokenizer's Jinja template of a conversation, or None."""
        if self.path.is_file():
            return self.tensors.chat_template
        if files.is_there(self.path / "chat_template.jinja"):
            return files.read_text(self.path / "chat_template.jinja")
        found = read_json(self.path / "tokenizer_config.json", default={}).get("chat_template")
        if isinstance(found, list):  # several by name
            named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
            found = named[0].get("template") if named else None
        return found if isinstance(found, str) else None

    @property
    def stored_dtype(self):
        """The dtype that most of its tensors have, by name; float32 for what is none of ours."""
        names = [name for name in self.tensors.shapes if len(self.tensors.shapes[name]) > 1]
        kinds = [self.tensors.dtype(name).name for name in names]
        found = max(set(kinds), key=kinds.count, default="float32")
        return found if found in _DTYPES else "float32"

    def bind(self, lm):
        """`{our path: binding.Leaf}`, checked against the files. Raises UserError naming the tensor that is wrong."""
        if hasattr(self.tensors, "bind"):  # under our own paths
            return self.tensors.bind(lm)
        leaves = parameter_map.bind_parameters(lm, self.table)
        ignored = (*families.ignored_patterns(self.config), f"^{ROPE_FACTORS}$")
        if lm.tied and (twin := next((name for name in HEADS if name in self.tensors.shapes), None)):
            self._check_twin(twin, leaves["embedding"].template)
            ignored = (*ignored, f"^{twin}$")
        parameter_map.check_tensors(leaves, self.tensors.shapes, ignored, self.path, self._adds_nothing)
        return leaves

    def _adds_nothing(self, name):
        """Whether a tensor that the model has no place for is a bias of zeros, as AutoGPTQ wrote them in 2023."""
        weight = name.removesuffix("bias") + "weight"
        return name.endswith(".bias") and weight in self.tensors.shapes and not np.any(self.tensors.read(name))

    def _check_twin(self, twin, embedding):
        """Some files of tied models hold the embedding twice; another tensor under that name would be lost."""
        if embedding not in self.tensors.shapes:
            return
        a, b = self.tensors.read(twin), self.tensors.read(embedding)
        if a.shape != b.shape or not np.array_equal(a, b):
            raise UserError(f"{self.path}: tie_word_embeddings is true, but {twin!r} is not {embedding!r}")

    def load(self, abstract, dtype=None, lm=None, each=None):
        """The parameters, each read straight onto its shards.

        Args:
          abstract: a tree of `jax.ShapeDtypeStruct`, with `sharding` where not all belongs to the first device.
          dtype: of every parameter; None is that of `abstract`.
          lm: the model that `abstract` belongs to; None takes its layers for stacked or apart as they are.
          each: what is kept of a parameter, `each(path, array)`, called before the next one is read.

        Raises UserError naming the tensor that is missing, extra, or of another shape.
        """
        leaves = self.bind(lm or self.lm(scan="groups" in abstract))
        return load.load_parameters(leaves, self.tensors, abstract, dtype, each)

    def load_stored(self, abstract, lm):
        """The parameters of `lm`, whose layers are apart, with the kernels that the files hold rounded as they are.

        Raises UserError as `load` does, and where nothing is rounded.
        """
        leaves, flat = self.bind(lm), flax.traverse_util.flatten_dict(abstract, sep="/")
        found = {path: stored for path, leaf in leaves.items() if (stored := leaf.stored(self.tensors)) is not None}
        if not found:
            raise UserError(f"config.quant = 'stored': {self.path} {self._why_none_is_stored()}")
        rest = flax.traverse_util.unflatten_dict({path: flat[path] for path in flat if path not in found}, sep="/")
        loaded = flax.traverse_util.flatten_dict(load.load_parameters(leaves, self.tensors, rest), sep="/")
        return flax.traverse_util.unflatten_dict(loaded | jax.tree.map(jnp.asarray, found), sep="/")

    def _why_none_is_stored(self):
        form = stored_form.stored_form(self)
        if form is None or form == "fp8":
            return "holds no weights that are rounded in a form that ours multiplies; take 'float32' or 'bfloat16'"
        return (
            f"holds its weights as {form}, which no product here multiplies as they are ({', '.join(FORMS)} are); take "
            "'bfloat16', or 'int4()' to round them once more"
        )


_PLAIN = {"precision": "float32", "attention_kernel": "auto", "kv_cache": "activation", "remat": "none"}
_PLAIN |= {"scan": True, "unroll": 12}


def complete(model):
    """`config.model` of a description: what it does not say is what checking and converting take."""
    from ml_collections import ConfigDict

    return ConfigDict(_PLAIN | model)


HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


def is_run(config):
    """Whether a config.json is that of a run of ours."""
    return isinstance(config.get("train"), dict) and isinstance(config.get("model"), dict) and "task" in config


def read_json(file, default=None):
    if not files.is_there(file):
        if default is not None:
            return default
        raise UserError(f"{file} is missing: no folder of a model")
    return json_text.read(file)
