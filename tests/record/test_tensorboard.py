import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.data import provider as provider_module
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import backend_context
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.summary.writer import event_file_writer
from tensorboard.util.tensor_util import make_ndarray

from efficientllm.config import differences
from efficientllm.record.tensorboard import SummaryWriter
from efficientllm.train import tensorboard_scalars

pytestmark = pytest.mark.quick

IMPORTS = """
import sys
from efficientllm.record.tensorboard import SummaryWriter
writer = SummaryWriter(sys.argv[1])
writer.scalars(1, {"loss": 2.0})
writer.hparams({"seed": 1}, {"al_s": 0.5})
writer.close()
print([name for name in ("tensorflow", "torch") if name in sys.modules])
"""


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def curve(folder, tag):
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in read(folder).Tensors(tag)]


def test_scalars_and_text_are_read_back(tmp_path):
    writer = SummaryWriter(tmp_path)
    writer.scalars(1, {"loss": 4.5, "tokens_per_s": 1000})
    writer.scalars(2, {"loss": 4.25})
    writer.text("config", "| key | value |")
    writer.close()
    assert curve(tmp_path, "loss") == [(1, 4.5), (2, 4.25)]
    assert curve(tmp_path, "tokens_per_s") == [(1, 1000.0)]
    assert curve(tmp_path, "config") == [(0, b"| key | value |")]
    assert read(tmp_path).SummaryMetadata("config").plugin_data.plugin_name == "text"
    assert read(tmp_path).SummaryMetadata("loss").plugin_data.plugin_name == "scalars"


def pictures(logdir, run, tag):
    """`[(step, PNG)]` of a tag of pictures, as TensorBoard's server reads them."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={"images": 0})
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(logdir))
    options = {
        "experiment_id": "",
        "plugin_name": "images",
        "run_tag_filter": provider_module.RunTagFilter(runs=[run], tags=[tag]),
    }
    sequences = provider.read_blob_sequences(RequestContext(), **options, downsample=100)
    return [
        # The first two blobs are the width and the height.
        (datum.step, provider.read_blob(RequestContext(), blob_key=datum.values[2].blob_key))
        for datum in sequences[run][tag]
    ]


def test_pictures_are_read_back_by_tensorboards_server(tmp_path):
    png = b"\x89PNG and so on"
    writer = SummaryWriter(tmp_path / "run")
    writer.image("samples", png, width=52, height=34, step=7)
    writer.image("samples", png + b"!", width=52, height=34, step=9)
    writer.close()
    assert pictures(tmp_path, "run", "samples") == [(7, png), (9, png + b"!")]
    event = read(tmp_path / "run").Tensors("samples")[0]
    assert make_ndarray(event.tensor_proto).tolist() == [b"52", b"34", png]


def test_flush_makes_a_running_curve_visible(tmp_path):
    writer = SummaryWriter(tmp_path)
    writer.scalars(1, {"loss": 1.0})
    writer.flush()
    assert curve(tmp_path, "loss") == [(1, 1.0)]
    writer.close()


@pytest.fixture
def later(monkeypatch):
    """Files are read in the order of the second in their names: each writer gets a second of its own."""
    now = [time.time()]
    monkeypatch.setattr(event_file_writer.time, "time", lambda: now.__setitem__(0, now[0] + 1) or now[0])


def test_a_resumed_run_takes_the_place_of_the_steps_it_repeats(tmp_path, later):
    killed = SummaryWriter(tmp_path)
    killed.text("config", "stays")
    for step in range(1, 8):
        killed.scalars(step, {"loss": float(step)})
    killed.close()
    resumed = SummaryWriter(tmp_path, first_step=5)  # the checkpoint was that of step 4
    for step in range(5, 10):
        resumed.scalars(step, {"loss": 10.0 * step})
    resumed.close()
    expected = [(step, float(step) if step < 5 else 10.0 * step) for step in range(1, 10)]
    events = multiplexer(tmp_path).Tensors(".", "loss")
    assert [(event.step, make_ndarray(event.tensor_proto).item()) for event in events] == expected
    assert dict(curve(tmp_path, "loss")) == dict(expected), "a script that keeps the last value of a step"
    assert curve(tmp_path, "config") == [(0, b"stays")]


def multiplexer(folder):
    """The runs under `folder` as TensorBoard's server loads them."""
    runs = plugin_event_multiplexer.EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    return runs


def hparams_table(folder):
    """What TensorBoard's own HParams backend makes of the runs under `folder`: `(columns, {run: values}, metrics)`."""
    provider = data_provider.MultiplexerDataProvider(multiplexer(folder), str(folder))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    content = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, content, [])
    runs = {
        run: dict(hparams_metadata.parse_session_start_info_plugin_data(tags["_hparams_/session_start_info"]).hparams)
        for run, tags in content.items()
    }
    return experiment.hparam_infos, runs, {info.name.tag for info in experiment.metric_infos}


def test_two_runs_are_compared_in_the_hparams_table(tmp_path):
    for run, mixer in (("a", "mha"), ("b", "gqa")):
        writer = SummaryWriter(tmp_path / run)
        config = {"model.mixer": mixer, "train.steps": 300, "tied": True, "data": None, "sizes": (1, 2)}
        writer.hparams(config, {"al_s": 0.5, "aec_w": None})
        writer.close()
    columns, runs, metrics = hparams_table(tmp_path)
    assert [info.name for info in columns if info.differs] == ["model.mixer"]
    assert {info.name for info in columns} == {"model.mixer", "train.steps", "tied", "data", "sizes"}
    assert runs["b"]["model.mixer"].string_value == "gqa" and runs["b"]["train.steps"].number_value == 300
    assert runs["a"]["tied"].bool_value is True and runs["a"]["data"].string_value == "None"
    assert metrics == {"_row/al_s"}
    assert curve(tmp_path / "a", "_row/al_s") == [(0, 0.5)]


def groups(folder):
    """`{run: the name of its trial in the HParams table}`."""
    provider = data_provider.MultiplexerDataProvider(multiplexer(folder), str(folder))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    return {
        run: hparams_metadata.parse_session_start_info_plugin_data(tags["_hparams_/session_start_info"]).group_name
        for run, tags in context.hparams_metadata(RequestContext(), "").items()
    }


def test_trials_have_readable_names_and_seeds_are_told_apart(tmp_path):
    base = differences.base()
    changes = {
        "a": {"name": "attention-mla", "model.mixer": "mla"},
        "b": {"name": "attention-mla", "model.mixer": "mla", "seed": 1},
        "c": {"name": "attention-mla", "model.mixer": "mla", "seed": 1, "checkpoint.every": 7},
    }
    for run, overrides in changes.items():
        writer = SummaryWriter(tmp_path / run)
        writer.hparams(base | overrides, {"al_s": 0.5})
        writer.close()
    names = groups(tmp_path)
    assert [names[run].partition(" #")[0] for run in "abc"] == [
        "seed 0, attention-mla, mixer=mla",
        "seed 1, attention-mla, mixer=mla",
        "seed 1, attention-mla, mixer=mla",
    ]
    assert len(set(names.values())) == 3, "another config is another trial"
    columns, _, _ = hparams_table(tmp_path)
    assert [info.name for info in columns if info.differs] == ["seed"], "how a run is saved is no column"


def test_what_a_row_says_comes_first_and_routers_come_last(tmp_path):
    aux = [{"stats": {"load": np.ones((2, 4)), "entropy": np.ones(2)}, "losses": {"z_loss": np.ones(2)}}]
    metrics = {"loss": 1.0, "total_loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0, "aux": aux}
    writer = SummaryWriter(tmp_path)
    routers = tensorboard_scalars.scalars(metrics, [range(2)])
    writer.scalars(1, routers | {"bits_per_byte": 1.0, "utilisation": 1.0, "tokens_per_s": 1.0})
    writer.hparams({"seed": 0}, {"al_s": 0.5, "eval_loss": 3.0})
    writer.close()
    tags = sorted(read(tmp_path).Tags()["tensors"])
    shown = [tag for tag in tags if not tag.startswith("_hparams_")]
    assert shown[:3] == ["_row/al_s", "_row/eval_loss", "bits_per_byte"] and "loss" in shown
    assert [tag for tag in shown if "router" in tag] == shown[-11:]


def test_neither_tensorflow_nor_torch_is_imported(tmp_path):
    run = subprocess.run([sys.executable, "-W", "error", "-c", IMPORTS, tmp_path], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr
