"""Config files: found by path or preset's name, whatever is wrong in one a line, and a config to start from."""

import os
import pathlib
import subprocess
import sys

import pytest

import runs
from efficientllm import main
from efficientllm.config import presets
from efficientllm.config.plain import plain
from efficientllm.errors import UserError

pytestmark = pytest.mark.quick

HEAD = "from efficientllm import base_config\ndef get_config():\n    config = base_config.get_config()\n"


@pytest.mark.parametrize(
    "source, message",
    [
        ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
        ("x = (\n", "SyntaxError"),
        ("1/0\n", "line 1: ZeroDivisionError: division by zero"),
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("import sys\nsys.exit(3)\n", "line 2: it ends the program (SystemExit: 3)"),
        ("def get_config():\n    raise SystemExit\n", "line 2: it ends the program"),
        ("def get_config():\n    return get_config()\n", "line 2: RecursionError"),
        ("def get_config():\n    assert False\n", "line 2: AssertionError"),
        ("x = 3\n", "has no function get_config()"),
        ("get_config = 3\n", "has no function get_config()"),
        ("def get_config():\n    pass\n", "it returns nothing"),
        ("def get_config():\n    return {'task': 'infer'}\n", "it returns a dict"),
        ("def get_config(name):\n    return name\n", "needs a name; write --config="),
        (f"{HEAD}    config.model.mixr = 'mla'\n    return config\n", "did you mean 'mixer'?"),
        (f"{HEAD}    config.train.step = 2\n    return config\n", "did you mean 'steps'?"),
        (f"{HEAD}    config.train.lr = 2\n    return config\n", "the peak of config.train.schedule"),
        (
            f"{HEAD}    config.train.steps = '12'\n    return config\n",
            "line 4: steps = 12: must be int, not str",
        ),
        (
            f"{HEAD}    config.train.steps = None\n    return config\n",
            "config.train.steps = None: must be at least 1",
        ),
        (f"{HEAD}    config.train.steps = 12.5\n    return config\n", "line 4: steps = 12.5: must be int, not float"),
        (f"{HEAD}    del config.train['steps']\n    return config\n", "config.train.steps is missing"),
        (f"{HEAD}    config.train = config\n    return config\n", ""),
        (f"{HEAD}    config.seed = -1\n    return config\n", "config.seed = -1: must be at least 0"),
        ("\0", ""),
        ("\x0c\udcff", ""),
    ],
)
def test_whatever_is_wrong_in_a_file_is_one_line(source, message, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_bytes(source.encode(errors="surrogateescape"))
    assert main.main([f"--config={file}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("efficientllm: ") and error.count("\n") == 1
    assert "mine.py" in error or "config." in message


def test_a_name_that_the_file_does_not_take(tmp_path):
    with pytest.raises(UserError, match="takes no name; leave :x out"):
        main.parse(["--config=moe:x"])
    with pytest.raises(UserError, match="no variant 'mlaa'; known: .*did you mean 'mla'"):
        main.parse(["--config=attention:mlaa"])


@pytest.mark.parametrize("place", ["folder", "fifo", "zero", "link", "text", "long", "nothing"])
def test_what_is_no_python_file(place, tmp_path):
    path = {"zero": pathlib.Path("/dev/zero"), "long": tmp_path / ("x" * 300)}.get(place, tmp_path / place)
    if place == "folder":
        path.mkdir()
    elif place == "fifo":
        os.mkfifo(path)
    elif place == "link":
        path.symlink_to(tmp_path / "away.py")
    elif place == "text":
        path.write_text("x")
    with pytest.raises(UserError, match="--config="):
        main.parse([f"--config={path}"])


def test_a_file_is_read_anew_and_its_neighbours_are_found(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "part.py").write_text("SEED = 7\n")
    file = tmp_path / "mine" / "a:b.py"
    file.write_text(
        "from configs import base\nfrom mine import part\ndef get_config():\n    config = base.get_config()\n"
        "    config.seed = part.SEED\n    return config\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main.parse([f"--config={file}"])[0].seed == 7
    file.write_text(file.read_text().replace("part.SEED", "8       "))
    assert main.parse([f"--config={file}"])[0].seed == 8
    assert not list(tmp_path.rglob("a:b*.pyc"))


@pytest.mark.parametrize("name", presets.names())
def test_presets_are_the_files_of_configs(name):
    file = runs.ROOT / "configs" / f"{name}.py"
    ours = [main.parse([f"--config={spelling}"])[0] for spelling in (name, f"configs/{name}.py", f"{name}.py", file)]
    assert all(plain(spelling) == plain(ours[0]) for spelling in ours)


def test_a_config_to_start_from_is_never_written_over_another(tmp_path, capsys):
    folder = tmp_path / "new" / "mine"
    assert main.main([f"--init={folder}"]) == 0
    assert str(folder / "config.py") in capsys.readouterr().out
    config, _, _ = main.parse([f"--config={folder / 'config.py'}"])
    assert config.name == "mine"
    (folder / "config.py").write_text("x")
    for argv in (
        [f"--init={folder}"],
        ["--init="],
        ["--init"],
        [f"--init={folder}", "--overwrite"],
        ["--init=/proc/x"],
    ):
        assert main.main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (folder / "config.py").read_text() == "x"


def test_a_wheel_holds_the_presets(tmp_path):
    """As `setup.py` copies them, used outside of a checkout."""
    for folder in ("setup.py", "pyproject.toml", "README.md", "efficientllm", "configs"):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / folder).symlink_to(runs.ROOT / folder)
    build = [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={tmp_path / 'site'}"]
    done = subprocess.run(build, cwd=tmp_path / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """if True:
        import pathlib, efficientllm
        from efficientllm import main
        from efficientllm.config import presets
        assert efficientllm.__file__.startswith("{site}")
        names = [f"--config={{name}}" for name in presets.names()]
        for config in (*names, "--config=tune_study:dora+medical", "--config=configs/attention.py:mla"):
            print(main.parse([config])[0].name)
        pathlib.Path("mine.py").write_text("from configs import base\\nget_config = base.get_config")
        print(main.parse(["--config=mine.py"])[0].name)
    """.format(site=tmp_path / "site")
    (tmp_path / "away").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "away", env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert lines[-3:] == ["tune_study_dora+medical", "attention-mla", "base"], done.stderr
    assert len(lines) == len(presets.names()) + 3
