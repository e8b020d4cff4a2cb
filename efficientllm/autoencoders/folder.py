"""Autoencoders of diffusers' folders, config.json and safetensors: found, read, fingerprinted and written back."""

import dataclasses
import functools
import hashlib
import pathlib
import shutil
import typing
from collections.abc import Callable

import flax.traverse_util
import jax
import numpy as np

from efficientllm import sharding
from efficientllm.autoencoders.base import Autoencoder
from efficientllm.convert import hub_snapshot
from efficientllm.convert.files.new_folder import new_folder
from efficientllm.convert.files.safetensors_file import SafetensorsFolder
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.convert.source import read_json
from efficientllm.convert.tensors import load_sharded, parameter_map
from efficientllm.convert.tensors.layouts import LAYOUTS, Sizes
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.errors import FieldError, UserError, short_repr
from efficientllm.typing import Params, PathLike
from efficientllm.untrusted import files
from efficientllm.weights import Precision

PART = "vae"  # of a pipeline
MOST_LEVELS, MOST_LAYERS, WIDEST = 8, 64, 2**16
Leaves = dict[str, parameter_map.Leaf]


@dataclasses.dataclass(frozen=True)
class FolderAutoencoder(Autoencoder):
    """Autoencoder of a diffusers folder. Parameters are replicated, rows are sharded over `data`.

    Subclasses define `class_name`, `describe`, `leaves_of`, and what Autoencoder asks for.

    Attributes:
      path: the folder with config.json and safetensors, a pipeline's folder, with model_index.json, or a repository
        `owner/name` of the hub that holds either.
      precision: of products and activations. Norms and softmax are float32.
    """

    path: str
    precision: str = "float32"

    class_name: typing.ClassVar[str]  # `_class_name` of config.json

    def __post_init__(self):
        Precision.of(self.precision)
        self._described  # noqa: B018  an unreadable config.json is an error of the spec

    def describe(self, config: dict[str, typing.Any], where: PathLike) -> typing.Any:
        """What config.json (a dict) says: a frozen dataclass with `shape`, whose repr is a part of the fingerprint.

        Raises UserError naming a key that cannot be honoured.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no describe(config, where)")

    def leaves_of(self, params: Params) -> Leaves:
        """`{path: Leaf}` of abstract parameters: the tensor of each."""
        raise NotImplementedError(f"{type(self).__name__} defines no leaves_of(params)")

    def open_tensors(self) -> TensorReader:
        """Opens the folder's safetensors."""
        return SafetensorsFolder(self._folder)

    @functools.cached_property
    def _folder(self):
        return find_folder(self.path)

    @functools.cached_property
    def _described(self):
        file = self._folder / "config.json"
        config = read_json(file)
        if config.get("_class_name") != self.class_name:
            name = short_repr(config.get("_class_name"))
            raise UserError(f"{file}: _class_name = {name}: is not {self.class_name}")
        return self.describe(config, file)

    @property
    def shape(self) -> typing.Any:
        """The hyperparameters that config.json states."""
        return self._described.shape

    @property
    def factor(self) -> int:
        return self.shape.factor

    @property
    def channels(self) -> int:
        return self.shape.latent_channels

    @property
    def image_channels(self) -> int:
        return self.shape.image_channels

    def check_files(self) -> None:
        """Raises UserError naming a tensor that is missing, extra or of another shape."""
        tensors = self.open_tensors()
        parameter_map.check_tensors(self.leaves_of(self.abstract_params()), tensors.shapes, (), tensors.where)

    def load_params(self) -> Params:
        """Reads the parameters. Raises UserError as `check_files` does."""
        self.check_files()
        abstract, tensors = self.abstract_params(), self.open_tensors()
        leaves = self.leaves_of(abstract)
        mesh = jax.sharding.get_mesh()
        if not mesh.empty:
            placed = sharding.replicated(mesh)
            abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), abstract)
        return load_sharded.load_parameters(leaves, tensors, abstract)

    def write(self, folder: PathLike, params: Params | None = None) -> None:
        """Writes parameters, by default those of `path`, as a folder that diffusers loads.

        Raises UserError for a folder that is not empty, or cannot be written.
        """
        from safetensors.numpy import save_file

        params = self.params if params is None else params
        leaves, flat = self.leaves_of(params), flax.traverse_util.flatten_dict(params, sep="/")
        tensors = {
            leaf.template: np.ascontiguousarray(leaf.layout.join([np.asarray(flat[path])], leaf.sizes))
            for path, leaf in leaves.items()
        }
        with new_folder(folder) as draft:
            shutil.copyfile(self._folder / "config.json", draft / "config.json")
            save_file(tensors, draft / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    def digest(self) -> str:
        """The SHA-256 of config.json's values and the tensors."""
        tensors = self.open_tensors()
        digest = hashlib.sha256(repr(self._described).encode())
        for name in sorted(tensors.shapes):
            digest.update(name.encode())
            digest.update(tensors.read(name).tobytes())
        return digest.hexdigest()


def find_folder(path: str) -> pathlib.Path:
    """The autoencoder's folder: `path`, a repository of the hub, or `vae` where either is a pipeline's.

    Raises UserError for no folder.
    """
    folder, where = pathlib.Path(path), f"path = {path!r}"
    if not files.is_there(folder) and hub_snapshot.is_name(path):
        folder = hub_snapshot.download(path, where, ("config.json", "*.safetensors"), (PART,))
    if files.is_there(folder / hub_snapshot.PIPELINE) and not files.is_there(folder / "config.json"):
        folder = folder / PART
    if not folder.is_dir():
        raise FieldError("autoencoder", f"{where}: no folder; name one that holds config.json and *.safetensors")
    return folder


def make_leaves(
    params: Params, disk_name: Callable[[str], str], layout: Callable[[str, tuple[int, ...]], str]
) -> Leaves:
    """`{path: Leaf}` of abstract parameters, by the name of the tensor of a path, and its layout by path and shape."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {path: _leaf(path, tuple(leaf.shape), disk_name, layout) for path, leaf in flat.items()}


def _leaf(path, shape, disk_name, layout):
    return parameter_map.Leaf(path, shape, disk_name(path), LAYOUTS[layout(path, shape)], (), 0, (shape,), Sizes())


def take_bounded(keys: CheckedKeys, name: str, most: int) -> int:
    """Takes a positive whole number of at most `most`. Raises UserError for another value."""
    value = keys.number(name)
    if value > most:
        raise UserError(f"{keys.where}: {name} = {value}: must be at most {most:,}")
    return value


def take_list(keys: CheckedKeys, name: str, count: int, is_right: Callable[[typing.Any], bool], kind: str) -> tuple:
    """Takes a list of `count` values, which messages call `kind`. Raises UserError for another one."""
    values = keys.take(name)
    if not isinstance(values, list | tuple) or len(values) != count or not all(map(is_right, values)):
        raise UserError(f"{keys.where}: {name} = {short_repr(values)}: must be a list of {count} {kind}")
    return tuple(values)
