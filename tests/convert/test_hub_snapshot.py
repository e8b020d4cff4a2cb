"""What is downloaded of a repository of the hub: the files that are needed, of which a fake one serves empty ones."""

import itertools
import types

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import filter_repo_objects

from efficientllm import convert
from efficientllm.errors import UserError
from efficientllm.registry import build
from efficientllm.text_states.pipelines import open_prompt_encoders

REPOSITORY = [
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "merges.txt",
    "vocab.json",
]
BESIDE = [
    "consolidated.safetensors",
    "params.json",
    "tekken.json",
    "original/consolidated.00.pth",
    "original/tokenizer.model",
    "original/params.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "model.fp16.safetensors",
    "pytorch_model-00001-of-00002.bin",
    "checkpoint-100/model.safetensors",
    "README.md",
    ".gitattributes",
    "runs/events.out",
]


DIT = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
]
BESIDE_DIT = [
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/onnx/model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "README.md",
]
# As the repositories of Stable Diffusion 3.5 medium and Wan 2.1 list them.
SD3_ENCODERS = [
    *(f"text_encoder{end}/{file}" for end in ("", "_2") for file in ("config.json", "model.safetensors")),
    *(f"tokenizer{end}/{file}" for end in ("", "_2") for file in ("merges.txt", "tokenizer_config.json", "vocab.json")),
]
SD3_T5 = [
    *("text_encoder_3/config.json", "text_encoder_3/model.safetensors.index.json"),
    *(f"text_encoder_3/model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    *("tokenizer_3/spiece.model", "tokenizer_3/tokenizer.json", "tokenizer_3/tokenizer_config.json"),
]
BESIDE_SD3 = [
    *("sd3.5_medium.safetensors", "SD3.5M_example_workflow.json", "LICENSE.md", "mmdit-x.png"),
    *(f"text_encoder{end}/model.fp16.safetensors" for end in ("", "_2")),
    *(f"text_encoder_3/model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)),
    *("text_encoders/clip_g.safetensors", "text_encoders/t5xxl_fp16.safetensors"),
]
VAE = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
WAN = [
    *("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"),
    *(f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    "transformer/diffusion_pytorch_model.safetensors.index.json",
]
WAN_ENCODER = ["text_encoder/config.json", "text_encoder/model-00001-of-00001.safetensors", "tokenizer/spiece.model"]
BESIDE_WAN = ["assets/logo.png", "README.md", "examples/i2v_input.JPG"]


class Repository:
    """A repository of `files`, whose snapshot is a folder that gets the files which are asked for."""

    def __init__(self, files, folder):
        self.files, self.folder = files, folder

    def snapshot_download(self, name, **patterns):
        for file in filter_repo_objects(self.files, **patterns):
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_text('{"_class_name": "Foreign"}')
        return str(self.folder)

    def downloaded(self):
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.*"))


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """`serve(files)` is the Repository that the hub has under every name."""

    def start(files):
        repository = Repository(files, tmp_path)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.snapshot_download)
        return repository

    return start


def test_the_files_of_a_repository_that_are_needed(serve):
    repository = serve(REPOSITORY + BESIDE)
    with pytest.raises(UserError, match="Foreign"):
        convert.open_source("owner/model")
    assert repository.downloaded() == sorted(REPOSITORY)


SD3 = [*DIT, VAE[0]]


@pytest.mark.parametrize(
    "files, ask, needed",
    [
        (DIT + BESIDE_DIT, lambda: convert.open_source("owner/dit"), [*DIT, VAE[0]]),
        (DIT + BESIDE_DIT, lambda: convert.open_source("owner/dit", weights=False), [*DIT[:3], VAE[0]]),
        (DIT + BESIDE_DIT, lambda: build("autoencoder", "kl(path='owner/dit')"), [DIT[0], *VAE]),
        (SD3 + BESIDE_SD3, lambda: convert.open_source("owner/sd3"), SD3),
        (SD3 + BESIDE_SD3 + VAE, lambda: build("autoencoder", "kl(path='owner/sd3')"), [DIT[0], *VAE]),
        (
            SD3 + SD3_ENCODERS + SD3_T5 + BESIDE_SD3,
            lambda: open_prompt_encoders("owner/sd3"),
            [DIT[0], DIT[2], *SD3_ENCODERS, *SD3_T5],
        ),
        (
            SD3 + SD3_ENCODERS + SD3_T5 + BESIDE_SD3,
            lambda: open_prompt_encoders("owner/sd3", without=("text_encoder_3",)),
            [DIT[0], DIT[2], *SD3_ENCODERS],
        ),
        (WAN + VAE + BESIDE_WAN, lambda: convert.open_source("owner/wan"), [*WAN, VAE[0]]),
        (
            WAN + VAE + WAN_ENCODER + BESIDE_WAN,
            lambda: open_prompt_encoders("owner/wan"),
            [WAN[0], WAN[2], *WAN_ENCODER],
        ),
    ],
)
def test_the_parts_of_a_pipelines_repository_that_are_needed(files, ask, needed, serve):
    repository = serve(list(dict.fromkeys(files)))
    with pytest.raises(UserError, match="Foreign"):
        ask()
    assert repository.downloaded() == sorted(needed)


def test_no_network_is_one_line(monkeypatch):
    def fail(name, **patterns):
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="no network here"):
        convert.open_source("owner/model")


@pytest.mark.parametrize("status", [401, 403], ids=["no token", "terms not accepted"])
def test_a_gated_repository_is_one_line_that_says_what_to_accept_and_set(status, monkeypatch):
    """The hub's own error class, with what its client says of such a response."""
    response = types.SimpleNamespace(headers={}, status_code=status, request=None)
    message = (
        f"{status} Client Error.\n\nCannot access gated repo for url https://huggingface.co/owner/sd3/resolve/main."
    )
    served = itertools.count()

    def refuse(name, **patterns):
        next(served)
        raise GatedRepoError(message, response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for ask, key in (
        (lambda: convert.open_source("owner/sd3"), "config.model.pretrained"),
        (lambda: build("autoencoder", "kl(path='owner/sd3')"), "path"),
        (lambda: open_prompt_encoders("owner/sd3"), "path"),
    ):
        with pytest.raises(UserError) as error:
            ask()
        assert str(error.value) == (
            f"{key} = 'owner/sd3': the repository is gated; accept its terms at https://huggingface.co/owner/sd3, and "
            "set HF_TOKEN to a token of that account (or run hf auth login)"
        )
    assert next(served) == 3  # nothing else is asked for after a refusal
