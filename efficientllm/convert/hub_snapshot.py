"""Snapshots of repositories of the Hugging Face hub: the files that are needed, and no others."""

import os
import pathlib
from collections.abc import Sequence

from efficientllm.errors import UserError
from efficientllm.untrusted import files

PIPELINE = "model_index.json"  # of a repository whose folders are the parts of a pipeline
_VARIANTS = ("*.fp16.safetensors", "*.fp32.safetensors", "*.non_ema.safetensors")
# Not downloaded: Mistral's and Meta's own files, ONNX, and copies of the weights in another dtype.
_OTHERS = ("*/*", "consolidated*", "params.json", "tekken.json", *_VARIANTS)


def is_name(text: str) -> bool:
    """Whether a text has the form of a repository's name, `owner/name`, and not that of a path."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def download(name: str, where: str, patterns: Sequence[str], parts: Sequence[str] = ()) -> pathlib.Path:
    """Downloads a repository's files that match `patterns`, unless they are cached; returns the snapshot's folder.

    Of a pipeline's repository, those of its `parts` and `model_index.json` alone: beside them many have the same
    weights in one file. Raises UserError, which begins with `where`, where there is no such repository, no network, or
    no right to read it.
    """
    if parts:
        folder = _snapshot(name, where, (PIPELINE, "config.json"), _OTHERS)
        if files.is_there(folder / PIPELINE):
            of_parts = [f"{part}/{pattern}" for part in parts for pattern in patterns]
            return _snapshot(name, where, of_parts, ("*/*/*", *_VARIANTS))
    return _snapshot(name, where, patterns, _OTHERS)


def _snapshot(name, where, patterns, others):
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(others))
    except errors.GatedRepoError:
        raise UserError(
            f"{where}: the repository is gated; accept its terms at {huggingface_hub.constants.ENDPOINT}/{name}, and "
            "set HF_TOKEN to a token of that account (or run hf auth login)"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise UserError(
            f"{where} is not a folder or file here, and the hub cannot be reached{offline}: {reason}"
        ) from None
    return pathlib.Path(folder)
