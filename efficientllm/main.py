"""Command line: trains, tunes, serves or plans with named techniques, and writes one row of numbers.

  python -m efficientllm.main --config=FILE[:ARG] [--config.key=value ...] [--workdir=DIR] [--overwrite]
  python -m efficientllm.main --init=FOLDER

  --config=FILE[:ARG]   a Python file with get_config(), such as configs/moe.py, or the name of a preset, such as moe;
                        ARG is handed to get_config
  --config.key=value    replaces one value: --config.train.steps=500 --config.model.ffn='swiglu(hidden=512)'
  --workdir=DIR         the folder of the run (default: runs/<config.name>/<hash of the config>)
  --overwrite           starts anew, removing the run in the workdir
  --init=FOLDER         writes FOLDER/config.py, a config to start from

The same command resumes an interrupted run. Compare runs with: tensorboard --logdir=runs
Exit status: 0 ok, 2 bad config or input, 3 the run failed and its row says how, 75 another process of it has died,
128+n stopped by signal n and saved.
"""

import sys
import typing

from efficientllm.errors import UserError, did_you_mean
from efficientllm.runtime import console, malloc
from efficientllm.runtime.stopping import stoppable
from efficientllm.typing import Config

FLAGS = ("config", "workdir", "overwrite", "init", "help")


@stoppable
def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    console.print_all_letters()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or any(argument in ("-h", "-help", "--help", "--helpfull", "--helpshort") for argument in argv):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        if any(argument.lstrip("-").partition("=")[0] == "init" for argument in argv):
            return _init(argv)
        config, workdir, overwrite = parse(argv)
        from efficientllm.tasks import run  # imports JAX, which takes a second: not before the command line is checked

        return run.run(config, workdir, overwrite)
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
        return 2


def _init(argv):
    from efficientllm.config import files

    _, _, folder = argv[0].partition("=")
    if len(argv) > 1 or not folder:
        raise UserError("--init: takes one folder and no other flag; for example --init=my_model")
    file = files.write_start(folder)
    print(f"wrote {file}; edit it, then run: python -m efficientllm.main --config={file}")
    return 0


def parse(argv: list[str]) -> tuple[Config, str | None, bool]:
    """Parses a command line into `(locked config, workdir or None, overwrite)`. Raises UserError."""
    flags, overrides = split(argv)
    if not flags["config"]:
        raise UserError("--config: is missing; write --config=FILE, for example --config=configs/moe.py")
    from efficientllm.config import files, path_rules, schema
    from efficientllm.config import overrides as overriding

    config = schema.conform_config(files.load(flags["config"]), f"--config={flags['config']}")
    overriding.apply(config, overrides)
    schema.check_values(config)
    if flags["workdir"] is not None:
        path_rules.check_path("--workdir", flags["workdir"])
    return config.lock(), flags["workdir"], flags["overwrite"]


def split(argv: list[str]) -> tuple[dict[str, typing.Any], list[tuple[str, typing.Any]]]:
    """Splits a command line into `({flag: value}, [(key, text or None), ...])`. Raises UserError."""
    flags: dict[str, typing.Any] = {"config": None, "workdir": None, "overwrite": False}
    overrides: list[tuple[str, typing.Any]] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            raise UserError(f"{argument}: is not a flag; write --config.key=value")
        is_negated = name.startswith("no") and name.removeprefix("no").split(".")[0] in FLAGS
        name, text = name.removeprefix("no") if is_negated else name, text if equals else None
        if name == "overwrite":
            flags[name] = _switch(argument, text, is_negated)
        elif name.startswith("config."):
            overrides.append((name, _switch(argument, text, is_negated) if is_negated else _value(name, text, rest)))
        elif name in ("config", "workdir") and not is_negated:
            flags[name] = text if text is not None else rest.pop(0) if rest and not rest[0].startswith("-") else ""
            if not flags[name]:
                raise UserError(f"--{name}=: is empty; write --{name}={'FILE' if name == 'config' else 'DIR'}")
        else:
            raise UserError(
                f"--{name}: no such flag; flags: --config, --config.key, --workdir, --overwrite, --init"
                f"{did_you_mean(name, FLAGS)}"
            )
    return flags, overrides


def _switch(argument, text, is_negated):
    """True or False of `--flag`, `--noflag` or `--flag=true`."""
    values = {None: True, "true": True, "1": True, "false": False, "0": False}
    word = text.lower() if text is not None else None
    if word not in values or (is_negated and text is not None):
        raise UserError(f"{argument}: is a switch; leave the value out, or write true or false")
    return values[word] != is_negated


def _value(name, text, rest):
    """The text of `--name=text` or `--name text`; None where a switch stands alone."""
    if text is None and rest and not rest[0].startswith("--"):
        return rest.pop(0)
    return text


if __name__ == "__main__":
    malloc.restart_with_settings()
    sys.exit(main())
