"""Tuning runs of a diffusion model: rows, adapters, samples beside those of the base, and the folders as models."""

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest
from PIL import Image

import runs
from configs import tune_image
from efficientllm import convert, main, model, sharding
from efficientllm.adapters.base import merge
from efficientllm.record.row import read_record
from efficientllm.report import rows
from efficientllm.tasks.training import Training
from tasks import test_pictures
from tiers import slow_except

pytestmark = pytest.mark.xdist_group("runs")

DATA = "glyphs(size=16, channels=1, letters='abcd', style='^cm', held_out=0.2)"
CHANGES = {"glora": "glora(rank=2)", "qlora": "lora(rank=2)", "freeze": "freeze(last=1)"}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Programs of one device compile sooner."""
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda spec, _: make_mesh(spec, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run on letters of every font."""
    workdir = tmp_path_factory.mktemp("tune_image") / "base"
    assert main.main(test_pictures.arguments(workdir, train__ema=0.0)) == 0
    return workdir


def arguments(base, workdir, name, **overrides):
    values = {
        "model.pretrained": base,
        "adapter": CHANGES.get(name, tune_image.ADAPTERS[name].replace("rank=16", "rank=2")),
        "data": DATA,
        "train.steps": 6,
        "train.batch_size": 8,
        "train.log_every": 1,
        "train.schedule": "constant(peak=0.01)",
        "eval.every": 6,
        "checkpoint.every": 6,
        "sample.images": 4,
        "infer.solver": "euler(steps=2)",
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={runs.ROOT}/configs/tune_image.py:{name}", f"--workdir={workdir}", *flags]


def flat(params):
    return {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()}


def loaded(folder, like):
    """The parameters of a folder, with layers stacked as in the tree `like`."""
    source = convert.open_source(folder)
    lm = source.lm(scan="groups/block_0/mixer/q/kernel" in like)
    return flat(source.load(nn.unbox(model.abstract_params(lm)), lm=lm))


def grid(folder, name):
    return np.asarray(Image.open(folder / "samples" / f"{name}.png")).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(list(tune_image.ADAPTERS), "glora"))
def test_a_run_ends_with_a_row_an_adapter_and_pictures_beside_the_bases(name, base, tmp_path, monkeypatch):
    ended, finish = {}, Training._finish
    monkeypatch.setattr(
        Training, "_finish", lambda self, state: (ended.update(flat(merge(state.all_params))), finish(self, state))[1]
    )
    assert main.main(arguments(base, tmp_path / "run", name)) == 0
    row = read_record(tmp_path / "run" / "record.json")
    assert (row["outcome"], row["task"]) == ("ok", "tune") and row["config"]["objective"] == "pretrained"
    objective = row["provenance"]["objective"]
    assert objective.startswith("flow(") and "shift=1.0" in objective and "weight='one'" in objective
    assert rows.read_rows([tmp_path / "run" / "record.json"])[0].reads == "images", "the report's gallery"
    assert row["quality"]["eval_loss"] > 0 and len(runs.losses(tmp_path / "run")) == 6
    # The base as it samples itself: rounded to 8 bits, two orders of summation are one step apart at most.
    if name != "qlora":
        assert np.abs(grid(tmp_path / "run", "base") - grid(base, "grid")).max() <= 1
    assert np.abs(grid(tmp_path / "run", "base") - grid(tmp_path / "run", "grid")).max() > 2
    names = ["run", "run/adapter"] if name not in ("full", "freeze") else ["run"]
    for folder in names[:1] if name == "qlora" else names:  # the adapter of qlora goes around unquantized kernels
        params = loaded(tmp_path / folder, ended)
        assert params.keys() == ended.keys()
        for path, array in params.items():
            np.testing.assert_allclose(array, ended[path], atol=2e-5, err_msg=f"{folder}: {path}")
    assert (tmp_path / "run" / "adapter").exists() == (len(names) == 2)


def test_only_mixers_and_ffns_are_adapted_unless_asked(base, tmp_path):
    from efficientllm.adapters.base import attach
    from efficientllm.registry import build

    lm = convert.open_source(base).lm()
    boxed = model.abstract_params(lm)

    def adapted(spec):
        params = jax.eval_shape(lambda: attach(build("adapter", spec), boxed, boxed, jax.random.key(0)))
        paths = flax.traverse_util.flatten_dict(nn.unbox(params), sep="/")
        return {path for path, leaf in paths.items() if not isinstance(leaf, jax.ShapeDtypeStruct)}

    kernels = {f"groups/block_0/mixer/{name}/kernel" for name in "qkvo"}
    kernels |= {f"groups/block_0/ffn/{name}/kernel" for name in ("up", "down")}
    assert adapted("lora(rank=2)") == kernels
    assert adapted("loha(rank=2, target='modulation')") == {"groups/block_0/modulation/kernel"}


def test_without_a_model_it_is_one_line(tmp_path, capsys):
    assert main.main([f"--config={runs.ROOT}/configs/tune_image.py", f"--workdir={tmp_path / 'run'}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "config.model.pretrained = ''" in lines[0] and "configs/dit.py" in lines[0]
    assert not (tmp_path / "run").exists()
