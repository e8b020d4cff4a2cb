"""Every command, file, link and path of the README and of the packages' READMEs, as written."""

import fnmatch
import importlib
import inspect
import io
import json
import re
import shlex
import subprocess
import sys

import flax.linen as nn
import jax
import pytest

import runs
from configs import base
from convert import folders
from data import kinds
from efficientllm import chat, convert, main, registry
from efficientllm.architecture import from_config
from efficientllm.config.plain import plain
from efficientllm.convert import __main__ as convert_command
from efficientllm.convert import peft as adapters
from efficientllm.mixers import kv_cache
from efficientllm.recommend import __main__ as recommend
from efficientllm.registry import build, catalogue
from efficientllm.registry.plugins import import_plugins
from efficientllm.report import __main__ as report
from efficientllm.sweep import __main__ as sweep
from efficientllm.train import step
from report import made
from tiers import slow_except

PAGES = [runs.ROOT / "README.md", *sorted(runs.ROOT.glob("efficientllm/**/README.md"))]
TEXTS = [page.read_text() for page in PAGES]
README = TEXTS[0]


def commands(text):
    """The lines of a page's shell blocks."""
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def runs_of(text):
    """The arguments of the runs among a page's commands."""
    program = "python -m efficientllm.main "
    return [command.partition(program)[2] for command in commands(text) if program in command]


COMMANDS = list(dict.fromkeys(command for text in TEXTS for command in commands(text)))
RUNS = list(dict.fromkeys(command for text in TEXTS for command in runs_of(text)))
# Of the front page every run, of a room's page the first; the others are near duplicates.
DEFAULT = [*runs_of(README), *(command for text in TEXTS[1:] for command in runs_of(text)[:1])]
REPORTS = [command for command in COMMANDS if "efficientllm.report" in command]
SWEEPS = [command for command in COMMANDS if "efficientllm.sweep" in command]
RECOMMENDATIONS = [command for command in COMMANDS if "efficientllm.recommend" in command]
CONVERSIONS = [command for command in COMMANDS if "efficientllm.convert" in command]
FOLDERS = ("efficientllm", "experiments", "tests", "third_party")
DOCUMENTS = [
    *runs.ROOT.glob("*.md"),
    *(path for folder in FOLDERS for path in sorted(runs.ROOT.glob(f"{folder}/**/README.md"))),
]
INSTALL = "pip install -e . && python -m efficientllm.main --config=configs/moe.py"
TEST = "pip install -e '.[test]' && pytest"
CHAT = "python -m efficientllm.chat runs/tune_rslora"
CONTRACT = "pytest tests/test_contract.py --imports=experiments/my_attention/gated.py -k gated"
SMALLEST = "tiny(num_layers=1, dim=64, num_heads=2, num_kv_heads=1, head_dim=32, hidden=128)"


def test_there_is_no_command_that_nothing_runs():
    tested = [*REPORTS, *SWEEPS, *RECOMMENDATIONS, *CONVERSIONS]
    others = [command for command in COMMANDS if "efficientllm.main" not in command and command not in tested]
    # CI runs the first, test_tensorboard asks the second's server; the doctor has tests of its own.
    assert others == [TEST, "tensorboard --logdir=runs", "python -m efficientllm.doctor", CONTRACT, CHAT]
    assert INSTALL in COMMANDS
    assert sum(text.count("python -m efficientllm.main") for text in TEXTS) == len(RUNS)


def test_ci_runs_the_command_of_the_tests():
    assert next(line for line in README.splitlines() if "pytest" in line) == TEST


@pytest.mark.quick
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(runs.ROOT)))
def test_links_and_paths_exist(document):
    text = document.read_text()
    links = [document.parent / link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)#]+[^)]*)\)", text)]
    paths = re.findall(rf"(?<![\w/])((?:configs|{'|'.join(FOLDERS)})/[\w./]*\w)", text)
    missing = [link for link in links if not link.exists()]
    missing += [path for path in paths if not (runs.ROOT / path).exists()]
    assert not missing


@pytest.mark.quick
def test_techniques_derive_from_the_base_classes_of_the_map():
    text = (runs.ROOT / "efficientllm/README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)\.(\w+)` \| `([\w/]+\.py)` \|$", text, re.MULTILINE)
    for kind, module, name, example in rows:
        base_class = getattr(importlib.import_module(f"efficientllm.{module}"), name)
        targets = [registry.lookup(kind, technique) for technique in catalogue.entries(kind)]
        assert all(issubclass(target, base_class) for target in targets if inspect.isclass(target)), kind
        assert (runs.ROOT / "efficientllm" / example).exists()
    assert len(rows) == 9


@pytest.mark.quick
def test_what_moved_is_where_the_changelog_says():
    rows = re.findall(r"^\| (`.*`) \| (`.*`) \|$", (runs.ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    now = [name.replace(".", "/") for _, cell in rows for name in re.findall(r"`([\w.]+)`", cell)]
    package = runs.ROOT / "efficientllm"
    assert now and not [name for name in now if not ((package / name).is_dir() or (package / f"{name}.py").exists())]


def test_the_table_names_every_technique():
    rows = re.findall(r"^\| [^|]+ \| `([\w.]+)` \| (`.*`) \|$", README, re.MULTILINE)
    for key, listed in rows:
        kind = key.rpartition(".")[2]
        registered = kv_cache.KINDS if kind == "kv_cache" else catalogue.entries(kind)
        assert names_of(listed, registered) == set(registered), key
        assert all(fnmatch.filter(registered, name) for name in re.findall(r"`([^`]+)`", listed)), key
    assert len(rows) == 18


def names_of(listed, registered):
    """The names that a row lists: `dit_*` stands for those that it matches, `0.5b` to `72b` for the sizes between."""
    names = set().union(*(fnmatch.filter(registered, name) for name in re.findall(r"`([\w.*]+)`", listed)))
    for bounds in re.findall(r"`([\d.]+)b` to `([\d.]+)b`", listed):
        least, most = map(float, bounds)
        sizes = (name for name in registered if re.fullmatch(r"[\d.]+b", name))
        names |= {name for name in sizes if least <= float(name[:-1]) <= most}
    return names


@pytest.mark.parametrize("command", slow_except(RUNS, *DEFAULT))
def test_command(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(runs.ROOT))
    for path in runs.ROOT.glob("*.md"):  # as in a clone
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "texts").mkdir()
    for i, section in enumerate("".join(TEXTS).split("\n## ")):
        (tmp_path / "texts" / f"{i}.md").write_text(section * 5)
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(command.replace("--config=", f"--config={runs.ROOT}/"))
    config, _, _ = main.parse(argv)
    if config.objective == "pretrained":
        train_pictures(tmp_path / config.model.pretrained)
        argv += ["--config.infer.repeats=1", "--config.infer.solver=euler(steps=2)", "--config.data=glyphs(size=16)"]
        assert main.main([*argv, "--config.sample.images=2", "--config.eval.batches=1"]) == 0
        return
    if config.model.embed.startswith("vision("):
        tune_with_pictures(tmp_path, argv)
        return
    if config.model.pretrained:
        folders.llama(tmp_path / "model", vocab_size=300)
        argv += [f"--config.model.pretrained={tmp_path / 'model'}", "--config.train.batch_size=8"]
        few = ("chat=False", "repeats=1", "prompt_length=8", "max_new_tokens=4")
        argv += [f"--config.infer.{flag}" for flag in few]
    if config.model.size not in ("tiny", "dit_tiny4"):  # a size for a cluster: all but its arrays
        import_plugins(config.imports)
        lm = from_config.from_config(config.model, 4096 if config.model.embed == "tokens" else None)
        jax.eval_shape(step.init_state(lm, config.train, config.seed, config.train.length))
        return
    text = [f"--config.data=text(path='{tmp_path}/texts')", "--config.tokenizer=bytes"]
    pictures = ["--config.infer.solver=euler(steps=2)", "--config.sample.images=4"]
    data = [] if "config.data" in command else text if config.model.embed == "tokens" else pictures
    short = ["train.steps=2", "train.length=32", "eval.batches=1", f"model.size={SMALLEST}"]
    short += [f"sample.tokens={2 if command == RUNS[0] else 0}"]  # one of them shows a text: it is compiled for itself
    assert main.main([*argv, *data, *[f"--config.{flag}" for flag in short]]) == 0
    assert list((tmp_path / "runs").rglob("record.json"))


def tune_with_pictures(folder, argv):
    """The command of a page, after the one before it, with a smaller language model, charts and steps."""
    folders.llama(folder / "model", vocab_size=300)
    small = ["data=charts(count=40,size=64)", "tokenizer=bytes", "train.length=128"]
    flags = [f"--config.{flag}" for flag in [*small, "train.steps=2", "train.batch_size=8", "eval.batches=1"]]
    tower = [f"--config.model.pretrained={folder / 'model'}", f"--workdir={folder / 'runs/vl_tower'}"]
    if any("runs/vl_tower" in word for word in argv if "pretrained" in word):
        assert main.main([f"--config={runs.ROOT}/configs/tune_vl.py:vision", *tower, *flags]) == 0
        tower = []
    assert main.main([*argv, *tower, *flags]) == 0


def train_pictures(workdir):
    """A run of configs/dit.py, smaller and shorter."""
    small = ["model.size=dit_tiny4(num_layers=1, dim=32, num_heads=2, num_kv_heads=2, head_dim=16, hidden=64)"]
    small += ["data=glyphs(size=16)", "train.steps=2", "train.batch_size=8", "eval.batches=1", "sample.images=0"]
    argv = [
        f"--config={runs.ROOT}/configs/dit.py",
        "--config.model.parameters_of=",
        f"--workdir={workdir}",
    ]
    assert main.main([*argv, *(f"--config.{flag}" for flag in small)]) == 0


@pytest.mark.parametrize("command", slow_except(CONVERSIONS, *(line for line in CONVERSIONS if " check " not in line)))
def test_conversion(command, tmp_path, monkeypatch):
    """With a model and an adapter made here."""
    monkeypatch.chdir(tmp_path)
    source = _write_adapter(tmp_path / "source", tmp_path / "runs/tune_rslora/adapter")
    argv = shlex.split(command.replace("smollm2-135m", "source").partition("efficientllm.convert ")[2])
    assert convert_command.main(argv) == 0
    if argv[0] != "check":
        assert convert.open_source(tmp_path / argv[-1].partition("--out=")[2]).model == source.model


def test_talking(tmp_path, monkeypatch, capsys):
    """CHAT, with the model and what is left of a run made here."""
    monkeypatch.chdir(tmp_path)
    tuned = tmp_path / "runs" / "tune_rslora" / "0123456789ab"
    _write_adapter(tmp_path / "model", tuned / "adapter")
    argv = shlex.split(next(command for command in RUNS if "rslora" in command).replace("smollm2-135m", "model"))
    monkeypatch.syspath_prepend(str(runs.ROOT))
    config, _, _ = main.parse([argv[0].replace("--config=", f"--config={runs.ROOT}/"), *argv[1:]])
    (tuned / "config.json").write_text(json.dumps(plain(config)))
    kinds.save(tmp_path / "model", eos_token="<eos>")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert chat.main([*shlex.split(CHAT.partition("efficientllm.chat ")[2]), "--config.infer.max_new_tokens=4"]) == 0
    assert "1 answer: TTFT" in capsys.readouterr().err


def _write_adapter(model, folder):
    """A model of 300 tokens and an adapter around it, which has learnt nothing."""
    folders.llama(model, vocab_size=300)
    source = convert.open_source(model)
    lm, method = source.lm(), build("adapter", "rslora(rank=2)")
    state = step.init_state(lm, base.get_config().train, 0, 8, method)
    adapters.write(lm, "rslora(rank=2)", nn.unbox(state()).params, folder, source)
    return source


def test_sweeps_are_described(monkeypatch, capsys):
    """The second runs what the first shows; test_sweep.py runs such runs."""
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.syspath_prepend(str(runs.ROOT))
    dry, real = (shlex.split(command.partition("efficientllm.sweep ")[2]) for command in SWEEPS)
    assert dry == [real[0], "--dry_run"]
    assert sweep.main([*real, "--dry_run"]) == 0 and "21 runs in 3 blocks" in capsys.readouterr().out


@pytest.mark.parametrize("command", slow_except(RECOMMENDATIONS, RECOMMENDATIONS[1]))
def test_recommendations(command, monkeypatch, capsys):
    monkeypatch.chdir(runs.ROOT)  # where the evidence is
    argv = shlex.split(command.partition("efficientllm.recommend ")[2])
    assert recommend.main([*argv, *({"--by_shapes"} - set(argv))]) == 0
    program = "python -m efficientllm.main "
    (chosen,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(program)]
    main.parse(shlex.split(chosen.removeprefix(program)))


def test_reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, mixer in (("base", "gqa"), ("moe", "mqa")):
        for seed in range(3):
            made.row(tmp_path / "runs" / name / str(seed), mixer, seed=seed, al_s=0.5 + 0.001 * seed, eval_loss=5.0)
    assert [report.main(shlex.split(command.partition("efficientllm.report ")[2])) for command in REPORTS] == [0, 0]
    assert (tmp_path / "report" / "index.html").exists()


@pytest.mark.quick
def test_files_are_shown_as_they_are():
    blocks = [block for text in TEXTS for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    files = [file for text in TEXTS for file in re.findall(r"`([\w/]+\.py)`, all of it(\nbut its imports)?:\n", text)]
    shown = [(runs.ROOT / file).read_text() for file, _ in files]
    shown = [text[text.index("\n@") + 1 :] if part else text for text, (_, part) in zip(shown, files, strict=True)]
    assert blocks == shown and len(files) == 3


def test_the_worked_example_passes_the_contract_suite():
    argv = [sys.executable, "-m", *shlex.split(CONTRACT), "-n", "0"]
    done = subprocess.run(argv, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"(\d+) passed", done.stdout), done.stdout + done.stderr
