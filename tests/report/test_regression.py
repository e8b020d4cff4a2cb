"""`--compare`: every row of both sides, by content; what may not be compared, what is open, and exit statuses."""

import json
import shutil

import pytest

from efficientllm.metrics import conditions
from efficientllm.report import __main__ as command
from report import made

pytestmark = pytest.mark.quick

STARVED = conditions.row(None) | {"starved": True, "reasons": ["84% of the CPU time went to others"]}


def side(folder, count=3, mixer="gqa", first=0, **values):
    """`count` rows of one config with these values and a little noise."""
    told = {key: values.pop(key) for key in ("devices", "changes", "told", "conditions", "energy") if key in values}
    for seed in range(first, first + count):
        noise = 1 + 0.001 * ((seed * 7) % 3)
        varied = {key: value * noise if key != "flops_per_token" else value for key, value in values.items()}
        made.row(folder / str(seed), mixer, seed=seed, **told, **varied)
    return folder


def compare(a, b, *more):
    return command.main(["--compare", str(a), str(b), *more])


OTHER_CPU = {"platform": "cpu", "kind": "cpu", "count": 2}


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"devices": made.H100}, "the device of"),
        ({"devices": OTHER_CPU}, "the device of"),
        ({"told": {"host": {"processor": {"name": "Another", "cores": 2}}}}, "1 x Another, 2 cores"),
        ({"told": {"host": {"processor": {"name": "Test", "cores": 1}}}}, "1 x Test, 1 cores"),
        ({"changes": {"train.batch_size": 16}}, "effective batch"),
        ({"changes": {"train.steps": 101}}, "number of tokens"),
        ({"changes": {"train.steps": 50, "train.batch_size": 16}}, "effective batch"),
        ({"changes": {"tokenizer": "bpe(vocab_size=9)"}}, "the tokenizer of"),
        ({"told": {"versions": {"jax": "0.12.0"}}}, "another version of jax"),
        ({"told": {"allocator": {"preallocates": True}}}, "another allocator"),
        ({"told": {"data": {"fingerprint": "b" * 64}}}, "the data of"),
        ({"energy": "nvml energy counter (measured, module)"}, "another energy scope"),
    ],
)
@pytest.mark.parametrize("where", ["a", "b"])
def test_whatever_row_differs_exits_2_and_is_named(tmp_path, last, where, message, capsys):
    """Not the first row of a side but its last, of either side."""
    alike = {
        "versions": {"jax": "0.10.2"},
        "allocator": {"preallocates": False},
        "data": {"fingerprint": "a" * 64},
    }
    for name, mixer in (("a", "gqa"), ("b", "mqa")):
        odd = last if name == where else {}
        told = {"told": alike}
        side(tmp_path / name, 2, mixer, al_s=0.5, amu_gb=1.0, j_per_token=3.0, **told)
        rest = {"told": alike | odd.get("told", {}), **{key: value for key, value in odd.items() if key != "told"}}
        side(tmp_path / name, 1, mixer, first=2, al_s=0.5, amu_gb=1.0, j_per_token=3.0, **rest)
        # A side with two configs is compared as two variants: one spelling for all keeps it one.
        for file in (tmp_path / name).rglob("record.json"):
            row = json.loads(file.read_text()) | {"sweep": {"name": "x", "variant": mixer, "baseline": "gqa"}}
            file.write_text(json.dumps(row))
    assert compare(tmp_path / "a", tmp_path / "b") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_two_specs_of_one_content_are_one_data_set_and_without_content_specs_decide(tmp_path):
    content = {"data": {"fingerprint": "a" * 64}}
    side(tmp_path / "a", al_s=0.5, told=content)
    for name, told, status in (("b", content, 0), ("c", {}, 2)):
        changes = {"data": "text(path='elsewhere')"}
        side(tmp_path / name, mixer="mqa", al_s=0.5, changes=changes, told=told)
        assert compare(tmp_path / "a", tmp_path / name) == status


def test_the_technique_may_differ_and_precision_alone_too(tmp_path, capsys):
    side(tmp_path / "a", al_s=0.5)
    side(tmp_path / "b", mixer="mqa", al_s=0.5)
    side(tmp_path / "c", al_s=0.5, changes={"model.precision": "bfloat16"})
    side(tmp_path / "d", mixer="mqa", al_s=0.5, changes={"model.precision": "bfloat16"})
    side(tmp_path / "e", al_s=0.5, changes={"model.precision": "float32"})
    assert compare(tmp_path / "a", tmp_path / "b") == 0
    assert compare(tmp_path / "e", tmp_path / "c") == 0
    assert compare(tmp_path / "e", tmp_path / "d") == 2
    assert "precision" in capsys.readouterr().err


def test_one_run_a_side_shows_values_and_judges_what_is_exact(tmp_path, capsys):
    """Twice the time, and FLOPs that are equal: no verdict, and no success either."""
    for name, mixer, al_s in (("a", "gqa", 0.5), ("b", "moe", 1.005)):
        side(tmp_path / name, 1, mixer, al_s=al_s, eval_loss=6.0, flops_per_token=8e6)
    assert compare(tmp_path / "a", tmp_path / "b") == 3
    shown = capsys.readouterr().out
    assert "no regression seen" not in shown and shown.count("one run a side: no interval") == 2
    assert "500 ms" in shown and "1.005 s" in shown and "equal within" in shown and "undecided" in shown
    assert compare(tmp_path / "a", tmp_path / "b", "--metric=al_s") == 3
    assert compare(tmp_path / "a", tmp_path / "b", "--metric=flops_per_token") == 0
    side(tmp_path / "c", 1, al_s=0.4, flops_per_token=9e6)
    assert compare(tmp_path / "a", tmp_path / "c") == 1, "more FLOPs need no interval"


def test_starved_rows_are_not_compared_in_time(tmp_path, capsys):
    side(tmp_path / "a", al_s=0.5, amu_gb=1.0)
    side(tmp_path / "b", mixer="mqa", al_s=1.5, amu_gb=1.0, conditions=STARVED)
    assert compare(tmp_path / "a", tmp_path / "b") == 3
    shown = capsys.readouterr().out
    assert "not compared: starved" in shown and "84% of the CPU time" in shown and "regressed" not in shown
    assert compare(tmp_path / "a", tmp_path / "b", "--metric=amu_gb") == 0
    assert compare(tmp_path / "a", tmp_path / "b", "--metric=al_s") == 3


def test_starved_rows_of_one_sweeps_blocks_are_compared(tmp_path, capsys):
    for mixer, al_s in (("gqa", 0.5), ("mqa", 1.5)):
        for block in range(3):
            told = {"name": "x", "variant": mixer, "baseline": "gqa", "block": block, "order": 0, "seed": block}
            folder = tmp_path / f"{block}-{mixer}"
            made.row(folder, mixer, seed=block, sweep=told, conditions=STARVED, al_s=al_s + block / 1000)
            target = tmp_path / mixer / folder.name
            target.parent.mkdir(exist_ok=True)
            shutil.copytree(folder, target)
    assert compare(tmp_path / "gqa", tmp_path / "mqa") == 3, "two folders: nothing says that it is one sweep"
    assert compare(tmp_path / "0-gqa", tmp_path / "0-mqa") == 3
    assert "one run a side" in capsys.readouterr().out


def test_nulls_and_zeros_are_said_and_in_no_mean(tmp_path, capsys):
    side(tmp_path / "a", al_s=0.5)
    side(tmp_path / "b", mixer="mqa", al_s=0.5)
    made.row(tmp_path / "b" / "null", "mqa", seed=7)
    made.row(tmp_path / "b" / "zero", "mqa", seed=8, al_s=0.0)
    made.row(tmp_path / "b" / "nan", "mqa", seed=9, outcome="nan")
    assert compare(tmp_path / "a", tmp_path / "b", "--metric=al_s") == 0
    shown = capsys.readouterr().out
    assert "2 of 5 rows of B are null or 0 and left out" in shown and "outcome nan" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("al_s  ")]
    assert line.split()[1:3] == ["500.5", "ms"] and line.split()[3] == "500.5"


def test_copies_are_one_run(tmp_path, capsys):
    """Each run's folder copied once: one run a side, and no interval of nothing."""
    for name, mixer, al_s in (("a", "gqa", 0.5), ("b", "mqa", 0.53)):
        side(tmp_path / name, 1, mixer, al_s=al_s, told={"run": name})
        shutil.copytree(tmp_path / name / "0", tmp_path / name / "copy")
    assert compare(tmp_path / "a", tmp_path / "b", "--metric=al_s") == 3
    captured = capsys.readouterr()
    assert "no interval" in captured.out and captured.err.count("a copy of") == 2
    assert compare(tmp_path / "a", tmp_path / "a") == 2
    assert "is the run" in capsys.readouterr().err


def test_an_interval_that_says_nothing_is_not_printed(tmp_path, capsys):
    for name, mixer, times in (("a", "gqa", (0.5, 0.9)), ("b", "mqa", (0.9, 0.2))):
        for seed, al_s in enumerate(times):
            made.row(tmp_path / name / str(seed), mixer, seed=seed, al_s=al_s)
    assert compare(tmp_path / "a", tmp_path / "b") == 3
    shown = capsys.readouterr().out
    assert "cannot be told apart" in shown and " to " not in shown.split("undecided")[0]


def test_every_row_counts_where_sides_share_only_some_seeds(tmp_path, capsys):
    side(tmp_path / "a", 4, al_s=0.5)
    side(tmp_path / "b", 4, "mqa", first=3, al_s=1.0)
    assert compare(tmp_path / "a", tmp_path / "b", "--metric=al_s") == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("al_s"))
    assert 1.99 < float(line.split()[5]) < 2.01


def test_plans_and_variants_of_one_side_are_said(tmp_path, capsys):
    made.sweep(tmp_path / "a", blocks=2)
    made.sweep(tmp_path / "b", blocks=2, seed=2, techniques={"gqa": (1, 1, 1), "mha": (1, 1, 1)})
    made.row(tmp_path / "b" / "plan", task="plan", al_s=0.1)
    command.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    shown = capsys.readouterr().out
    assert "A alone has mla, mqa" in shown and "a plan" in shown
