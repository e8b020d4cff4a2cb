"""Trains, tunes, serves or plans with named techniques and writes one row.

  python -m efficientllm.main --config=FILE[:ARG] [--config.key=value ...] [--workdir=DIR] [--overwrite]

  --config=FILE[:ARG]   a Python file with get_config(), such as configs/moe.py; ARG is handed to get_config
  --config.key=value    replaces one value: --config.train.steps=500 --config.model.ffn='swiglu(hidden=512)'
  --workdir=DIR         where the run lives (default: runs/<config.name>/<hash of the config>)
  --overwrite           start anew although the workdir holds a run

The same command resumes an interrupted run. Compare runs with: tensorboard --logdir=runs
Exit status: 0 ok, 2 bad config or input, 3 the run failed and its row says how, 75 another process of it has died,
128+n stopped by signal n and saved.
"""

import os
import pathlib
import sys

from efficientllm import allocator
from efficientllm.errors import UserError, did_you_mean

FLAGS = ("config", "workdir", "overwrite", "help")


def main(argv=None):
    """Runs the command line `argv` and returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or any(argument in ("-h", "-help", "--help", "--helpfull", "--helpshort") for argument in argv):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        config, workdir, overwrite = parse(argv)
        from efficientllm import run  # the first import of jax: after the command line is known to be good

        return run.run(config, workdir, overwrite)
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2


def parse(argv):
    """`(locked config, workdir or None, overwrite)` of a command line. Raises UserError."""
    from absl import flags
    from ml_collections import config_flags

    _check_flags(argv)
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "", values, lock_config=True, sys_argv=argv)
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    overwrite = flags.DEFINE_bool("overwrite", False, "", flag_values=values)
    _find_configs(argv)
    try:
        rest = values(["efficientllm", *argv])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(_one_line(error, argv)) from None
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; write --config.key=value")
    if config.value is None:
        raise UserError("--config=FILE is missing; for example --config=configs/moe.py")
    return config.value, workdir.value, overwrite.value


def _check_flags(argv):
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name.removeprefix("no") not in FLAGS and not name.startswith("config."):
            raise UserError(
                f"no flag --{name}; flags: --config, --config.key, --workdir, --overwrite{did_you_mean(name, FLAGS)}"
            )


def _find_configs(argv):
    """Refuses a config file that is not there, and lets config files import their neighbours from anywhere."""
    for argument in argv:
        if argument.startswith("--config="):
            file = pathlib.Path(argument.partition("=")[2].partition(":")[0])
            if not file.is_file():
                near = [str(path) for path in file.parent.glob("*.py")] if file.parent.is_dir() else []
                raise UserError(f"--config={file}: no such file{did_you_mean(str(file), near)}")
            sys.path[:0] = [os.getcwd(), str(file.resolve().parent.parent)]


def _one_line(error, argv):
    """What absl and ml_collections say of a bad override, as one line that names the flag."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0] if error.args else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "Traceback" in text:
        said = lines[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
        return f"{lines[0].removeprefix('flag ').partition(': ')[0]}: {said}"
    if lines[0].startswith("flag --"):
        return lines[0].removeprefix("flag ")
    key = lines[0].strip("'\"")
    flag = next((argument for argument in argv if key in argument.partition("=")[0].split(".")), None)
    if flag is None:
        return " ".join(lines)
    hint = f"; did you mean {lines[1].split(chr(34))[1]!r}?" if len(lines) > 1 and '"' in lines[1] else ""
    return f"{flag}: the config has no key {key!r}{hint}"


if __name__ == "__main__":
    allocator.restart_with_huge_pages()
    sys.exit(main())
