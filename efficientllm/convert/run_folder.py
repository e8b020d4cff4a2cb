"""Training runs as checkpoints: their newest parameters, merged with the checkpoint that they were tuned from."""

import dataclasses
import logging
import pathlib
import typing
from collections.abc import Callable

from efficientllm import base_config
from efficientllm.architecture import from_config
from efficientllm.convert.run_parameters import RunParameters, checkpoint_steps
from efficientllm.convert.source import Source, is_run
from efficientllm.embeds.picture import ImageFormat
from efficientllm.errors import UserError
from efficientllm.registry import build, complete_spec
from efficientllm.typing import Config
from efficientllm.untrusted import files, json_text

TASKS = ("pretrain", "tune")
TOKENIZER = "tokenizer"  # a folder in the run's folder, written when the run starts
PICTURE = "picture.json"  # likewise, of a run that learns from pictures: side, channels, classes
_DESCRIBES = (
    "size",
    "mixer",
    "ffn",
    "pattern",
    "residual",
    "position",
    "norm",
    "tied",
    "embed_norm",
    "embed",
    "modulation",
)
log = logging.getLogger("efficientllm")


@dataclasses.dataclass(frozen=True)
class RunSource(Source):
    """Source of a run's parameters, under our paths. `run` is its config, `base` the Source it started from or None."""

    run: Config | None = None
    base: Source | None = None

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The tokenizer folder of the run; without one, that of the checkpoint it started from."""
        folder = self.path / TOKENIZER
        return folder if folder.is_dir() or self.base is None else self.base.tokenizer_path

    def tokenizer(self) -> str:
        """A spec for `config.tokenizer`: the one saved in the run's folder, else the one its config names."""
        if (self.path / TOKENIZER).is_dir():
            return f"hf(path={str(self.path / TOKENIZER)!r})"
        if self.run.tokenizer == "pretrained":
            return self.base.tokenizer()
        return self.run.tokenizer

    def objective(self) -> str:
        """The objective that the run minimised."""
        return self.base.objective() if self.run.objective == "pretrained" else self.run.objective

    def autoencoder(self) -> str:
        """The autoencoder of the run."""
        inherits = self.run.objective == "pretrained" and self.run.autoencoder == "pixels"
        return self.base.autoencoder() if inherits else self.run.autoencoder

    @property
    def trained_on_conversations(self) -> bool:
        """Whether the run was trained on conversations."""
        return getattr(build("data", self.run.data, where="config.data"), "records", False)

    def chat_template(self) -> str | None:
        """The chat template of the checkpoint that the run started from, or None."""
        return self.base.chat_template() if self.base else None


def newest_run(path: pathlib.Path) -> pathlib.Path:
    """Resolves a folder of runs, such as `runs/NAME`, to its newest run, and `runs/NAME/adapter` to that run's adapter.

    Returns any other path unchanged.
    """
    folder = path.parent if path.name == "adapter" and not files.is_there(path) else path
    if (
        not files.is_there(folder)
        or not folder.is_dir()
        or any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    ):
        return path
    config_files = [file for file in folder.glob("*/config.json") if _is_run_file(file)]
    if not config_files:
        return path
    run = max(config_files, key=lambda file: file.stat().st_mtime).parent
    return run / "adapter" if folder is not path else run


def _is_run_file(file):
    try:
        config = json_text.read(file)
        return is_run(config) and config["task"] in TASKS
    except UserError:
        return False


def open_run(
    path: pathlib.Path, config: dict[str, typing.Any], weights: bool, open_source: Callable[[str, bool], Source]
) -> Source:
    """Opens a run's folder with this config.json; a run of which only the adapter is left is an AdaptedSource.

    Raises UserError if it is not a training run, or the checkpoint it started from cannot be opened.
    """
    where = f"config.model.pretrained = {str(path)!r}"
    run = _config(config, where)
    if run.task not in TASKS:
        raise UserError(f"{where}: a run of {run.task!r} holds no model; name one of pretrain or tune")
    if weights and not checkpoint_steps(path / "checkpoints") and (path / "adapter" / "adapter_config.json").is_file():
        from efficientllm.convert import adapter_folder  # no checkpoint is left: only the adapter

        return adapter_folder.open_adapter(path / "adapter", where, weights, open_source)
    from efficientllm.registry.plugins import import_plugins  # registers the techniques of config.imports

    import_plugins(run.imports)
    try:
        base = open_source(run.model.pretrained, weights) if run.model.pretrained else None
    except UserError as error:
        raise UserError(f"{where}: the checkpoint that the run started from cannot be opened: {error}") from None
    model = dict(base.model) if base else {key: run.model[key] for key in _DESCRIBES}
    if base and from_config.adds_images(run.model.embed, base.model):
        model["embed"] = run.model.embed
    source = RunSource(
        path,
        dict(base.config) if base else {},
        model,
        base.max_positions if base else None,
        None,
        {},
        run=run,
        base=base,
    )
    if base is None:  # its widths are in the size
        model |= {"parameters_of": "", **_ends(run, source, where)}
    tensors = RunParameters(source) if weights else None
    return dataclasses.replace(source, tensors=tensors)


def _config(stored, where):
    """The run's config over today's defaults; keys that no longer exist are dropped."""
    config = base_config.get_config()

    def update(into, values):
        for key, value in values.items():
            if key not in into:
                continue
            if isinstance(value, dict):
                update(into[key], value)
            else:
                into[key] = _tuples(value)

    try:
        update(config, stored)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: its config.json is not that of a run ({error})") from None
    return config


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _ends(run, source, where):
    """What the run's data said of its model, as specs: the picture in `embed`, or the vocabulary in `size`.

    The size also has the widths that `parameters_of` gives.
    """
    if build("embed", run.model.embed, where="config.model.embed").reads == "images":
        picture = _picture(source.path / PICTURE, where)
        embed = complete_spec("embed", run.model.embed, picture.fields())
        return {"embed": embed, "size": _size_spec(from_config.sized(run.model, picture))}
    count = build("size", run.model.size, where="config.model.size").vocab_size
    if count is None:
        from efficientllm import data

        count = data.build_tokenizer(source.tokenizer(), run.data).vocab_size
    return {"size": _size_spec(dataclasses.replace(from_config.sized(run.model, count), vocab_size=count))}


def _picture(file, where):
    if not files.is_there(file):
        raise UserError(f"{where}: no {PICTURE} in it, which says what the model's pictures are")
    content = json_text.read(file)
    channels, classes = (json_text.field(content, key, int, str(file)) for key in ("channels", "classes"))
    if isinstance(side := content.get("side"), list):  # of pictures that are not square
        return ImageFormat(tuple(json_text.field({"side": n}, "side", int, str(file)) for n in side), channels, classes)
    return ImageFormat(json_text.field(content, "side", int, str(file)), channels, classes)


def _size_spec(size):
    fields = dataclasses.asdict(size)
    return f"custom({', '.join(f'{key}={value!r}' for key, value in fields.items() if value is not None)})"
