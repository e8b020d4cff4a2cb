"""An open checkpoint of a diffusion model: a folder of its own, or the one within a pipeline's folder."""

import dataclasses
import pathlib
import re
import shutil
import typing

import jax.numpy as jnp
import numpy as np

from efficientllm.convert import hub_snapshot
from efficientllm.convert.files.safetensors_file import SafetensorsFolder
from efficientllm.convert.hf_config import denoisers, families
from efficientllm.convert.hf_config.checked_keys import CheckedKeys
from efficientllm.convert.hub_snapshot import PIPELINE
from efficientllm.convert.source import Source
from efficientllm.convert.tensors import parameter_map
from efficientllm.errors import UserError, short_repr
from efficientllm.model import Backbone
from efficientllm.registry import format_spec, parse_spec
from efficientllm.untrusted import files, json_text

PART, AUTOENCODER, SCHEDULER = "transformer", "vae", "scheduler"
AUTOENCODERS = {"AutoencoderKLWan": "wan"}  # names of the registry by `_class_name`
_COPIED = (".json", ".safetensors", ".txt", ".model")
_CONSTANT_ERROR = 1e-5  # of sines and cosines that another program computed


@dataclasses.dataclass(frozen=True)
class DenoiserSource(Source):
    """Source of a diffusion model. `pipeline` is the folder of the pipeline whose part it is, or None."""

    pipeline: pathlib.Path | None = None  # type: ignore[assignment]

    def tokenizer(self) -> str:
        raise UserError(
            f"{self.path}: a model of pictures has no tokenizer; set config.objective = 'ddpm()' or 'flow()'"
        )

    def objective(self) -> str:
        """A spec for `config.objective`, with the pipeline's schedule. Raises UserError for one that we have not."""
        file = self.path.parent / SCHEDULER / "scheduler_config.json"
        keys = CheckedKeys(json_text.read(file), file) if self.pipeline and files.is_there(file) else None
        if keys is None and self.pipeline and _listed_class(self.pipeline, SCHEDULER):
            raise UserError(f"{file} is missing: {PIPELINE} lists a scheduler; name the folder of a whole pipeline")
        name, fields = parse_spec(self.family.objective)
        if name == "flow":
            return format_spec(name, fields | ({} if keys is None else _flow_schedule(keys)))
        fields |= {"vlb": parse_spec(self.model["embed"])[1].get("learned_sigma", False)}
        return format_spec(name, fields | ({} if keys is None else _schedule(keys)))

    def autoencoder(self) -> str:
        """A spec for `config.autoencoder`: that of the pipeline, if it has one."""
        file = self.pipeline and self.pipeline / AUTOENCODER / "config.json"
        if file is None or not files.is_there(file):
            return super().autoencoder()
        name = AUTOENCODERS.get(json_text.read(file).get("_class_name"), "kl")  # which refuses another class by name
        return f"{name}(path={self.pipeline_path!r})"

    @property
    def pipeline_path(self) -> str | None:
        if self.pipeline is None:
            return None
        is_of_hub = hub_snapshot.is_name(self.name or "") and not files.is_there(self.name)
        return self.name if is_of_hub else str(self.pipeline)

    def bind(self, lm: Backbone) -> dict[str, typing.Any]:
        """`{our path: parameter_map.Leaf}`, checked against the files, as copies and constants are."""
        if self.tensors.has_own_paths:
            return self.tensors.bind(lm)
        leaves, constants = parameter_map.bind_parameters(lm, self.table), self.family.constants
        ignored = [*families.ignored_patterns(self.config), *(f"^{re.escape(name)}$" for name in constants)]
        parameter_map.check_tensors(leaves, self.tensors.shapes, ignored, self.path)
        parameter_map.check_copies(leaves, self.tensors)
        for name in constants.keys() & self.tensors.shapes.keys():
            stored, expected = np.asarray(self.tensors.read(name), np.float32), constants[name](lm)
            error = max(_CONSTANT_ERROR, float(jnp.finfo(self.tensors.dtype(name)).eps))
            if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=0, atol=error):
                raise UserError(f"{self.path}: tensor {name!r} is not the fixed table of the model: other positions")
        return leaves


def _schedule(keys):
    """The fields of `ddpm` in a scheduler_config.json; what it says of sampling is not read."""
    keys.expect("beta_schedule", "linear", because="ddpm's variances are linear in the step")
    keys.expect("prediction_type", "epsilon", because="ddpm predicts the noise")
    keys.expect("rescale_betas_zero_snr", False, because="ddpm's variances are linear in the step")
    start, end = (keys.number(f"beta_{name}", kind=float, default=None) for name in ("start", "end"))
    return {"steps": keys.number("num_train_timesteps", default=1000), "beta": (start or 1e-4, end or 0.02)}


def _flow_schedule(keys):
    """The fields of `flow` in a scheduler_config.json; what it says of sampling is not read."""
    keys.expect("prediction_type", "flow_prediction", because="flow predicts the velocity")
    keys.expect("use_dynamic_shifting", False, because="the shift of flow is one number")
    keys.expect("invert_sigmas", False, because="a flow's sigma is 1 at noise")
    keys.expect("stochastic_sampling", False, because="a flow is sampled by an equation without noise")
    keys.expect("num_train_timesteps", 1000, because="the level that a model of flow is given is 1000 sigma")
    return {"shift": float(keys.number("flow_shift", "shift", kind=float, default=1.0))}


def find_part(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
    """`(folder of the denoiser, folder of the pipeline or None)` of a folder that may be a pipeline's."""
    if files.is_there(path / PIPELINE) and not files.is_there(path / "config.json"):
        return path / PART, path
    return path, None


def check_pipeline(pipeline: pathlib.Path, config: dict[str, typing.Any]) -> None:
    """Raises UserError where a pipeline's transformer, whose config.json is `config`, is that of another model."""
    listed, name = _listed_class(pipeline, PART), families.family_name(config)
    family = families.DENOISERS.get(listed or "")
    if family is not None and family is not families.DENOISERS.get(name or ""):
        raise UserError(
            f"{pipeline / PART / 'config.json'}: _class_name = {short_repr(name)}: {PIPELINE} lists {listed!r}: it is "
            "that of another model"
        )


def _listed_class(pipeline, part):
    """The class of a part in model_index.json, or None for a part that is left out."""
    entry = json_text.read(pipeline / PIPELINE).get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None


def published_config(path: pathlib.Path) -> dict[str, typing.Any] | None:
    """The config of a folder without config.json whose tensors are a published DiT's; None for any other."""
    if files.is_there(path / "config.json") or not any(path.glob("*.safetensors")):
        return None
    return denoisers.config_of_tensors(SafetensorsFolder(path).shapes, path)


def write_pipeline(source: typing.Any, folder: pathlib.Path) -> pathlib.Path:
    """Copies the other parts of a source's pipeline to `folder`; returns where the denoiser belongs."""
    if not isinstance(source, Source) or source.pipeline is None:
        return folder
    for file in sorted(source.pipeline.glob("*")) + sorted(source.pipeline.glob("*/*")):
        name = file.relative_to(source.pipeline)
        if files.is_file(file) and file.suffix in _COPIED and name.parts[0] != PART:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
    (folder / PART).mkdir()
    return folder / PART


def is_denoiser(config: dict[str, typing.Any]) -> bool:
    """Whether a config.json is that of a diffusion model."""
    return "model_type" not in config and families.family_name(config) is not None
