"""Time and memory of tuning a text-to-image and a text-to-video model with LoRA, with diffusers + peft and with us.

  python third_party/diffusers/tune.py --batch=8 --steps=10

Both read the same pipelines: those that experiments/generators/pipelines.py writes, or the folders in `--pipelines`.
A race is as in compare.py, whose rules hold: a process each, one at a time, in random order within a block. A sampling
step is one with guidance, of both predictions and Euler's update, with the adapter beside the weights.

`--compile_cache` is a run's default: what one race compiled the next one loads. Without it every race compiles.
"""

import contextlib
import functools
import pathlib
import tempfile

import compare
import tune_work as work

from efficientllm.errors import exit_with

WRITER = pathlib.Path(__file__).parents[2] / "experiments" / "generators" / "pipelines.py"
DEFAULT = "torch-float32,ours-float32,torch-bfloat16,ours-bfloat16"


def main(argv=None):
    parser = compare.options_of(__doc__)
    parser.add_argument("--pipelines", default="", help="folders with commas between; default: tiny ones, written here")
    parser.add_argument("--heads", type=int, default=4, help="of those written here, 32 of the width each")
    parser.add_argument("--layers", type=int, default=4, help="of those written here")
    parser.add_argument("--scan", action="store_true", help="ours has stacked layers, config.model.scan's default")
    parser.add_argument("--compile_cache", action="store_true", help="ours keeps its programs, and loads kept ones")
    parser.set_defaults(contestants=DEFAULT, batch=8)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        pipelines = options.pipelines.split(",") if options.pipelines else _write(pathlib.Path(folder), options)
        reports = [compare.run(make_tuner, pipeline, options) for pipeline in pipelines]
    for report in reports:
        report["shape"] = pathlib.Path(report["shape"]).name
    compare.finish(reports, options)


def _write(folder, options):
    from efficientllm.registry.plugins import import_file

    writer = import_file(WRITER)
    for name in writer.PIPELINES:
        writer.write(name, folder / name, options.heads, options.layers)
    return [str(folder / name) for name in writer.PIPELINES]


_for_good = contextlib.ExitStack()


def make_tuner(name, pipeline, options):
    """Makes a Contestant of a pipeline's transformer."""
    side, precision = name.split("-")
    batch = functools.partial(work.batch, work.read_config(pipeline), options.batch)
    if side == "torch":
        import tune_peer as module

        tuner = module.Tuner(pipeline, precision, options.threads)
    else:
        import tune_ours as module

        if options.compile_cache:
            from efficientllm.runtime import compile_cache

            _for_good.enter_context(compile_cache.of_run(True))
        tuner = module.Tuner(pipeline, precision, batch(0), options.scan)
    return compare.Contestant(tuner.step, tuner.request, tuner.sample, batch, module)


if __name__ == "__main__":
    exit_with(main)
