"""Names the technique for a model, a device and limits, from evidence and plans.

  python -m efficientllm.recommend --task=TASK --model=MODEL --device=DEVICE [--limits=LIMITS] [...]

  --task=TASK           pretrain, tune or infer
  --model=MODEL         a size such as 1.5b, a folder, a hub id, or smollm2-135m
  --device=DEVICE       a name such as h100, a .json file of your own, or here (default)
  --devices=N           how many (default 1)
  --limits=LIMITS       "memory <= 24 GB and eval_loss <= +1 % and least j_per_token", as a report's page reads them;
                        + and - are changes against the baseline of the evidence. By default the least time
  --evidence=FOLDERS    reports or folders of runs, with commas between them (default: experiments/*/results and
                        experiments/board, where they are there)
  --by_shapes           plans by shapes alone; else the hardware's compiler, if it is installed, checks the finalists
  --json                the answer as JSON
  --config.key=value    holds for every candidate: --config.train.length=2048, --config.metrics.price=2.5

Exit status: 0 an answer, 1 no answer (it says what is missing), 2 bad input.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from efficientllm.errors import UserError, did_you_mean
from efficientllm.runtime import console
from efficientllm.runtime.stopping import stoppable

FLAGS = ("--task", "--model", "--device", "--devices", "--limits", "--evidence", "--by_shapes", "--json", "--help")
SWITCHES = ("--by_shapes", "--json")
EXTRA = ("scipy",)


@stoppable
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    console.print_all_letters()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        return _main(*parse(argv))
    except UserError as error:
        print(f"efficientllm: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in EXTRA:
            raise
        print(f"efficientllm: {error.name} is not installed: pip install -e '.[report]'", file=sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """`({flag: value}, flags of the config)`. Raises UserError."""
    flags: dict[str, str] = {"device": "here", "devices": "1", "limits": ""}
    extra = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if argument.startswith("--config."):
            extra.append(argument)
        elif name not in FLAGS:
            raise UserError(f"no flag {argument!r}; flags: {', '.join(FLAGS)}{did_you_mean(name, FLAGS)}")
        elif name in SWITCHES and equals:
            raise UserError(f"{argument}: is a switch, without a value")
        elif name not in SWITCHES and not value:
            raise UserError(f"{name} needs a value: {name}=...")
        else:
            flags[name.removeprefix("--")] = value or "true"
    for name in ("task", "model"):
        if name not in flags:
            raise UserError(f"--{name}=... is missing; for example --task=tune --model=1.5b --device=rtx4090")
    if not flags["devices"].isdecimal():
        raise UserError(f"--devices={flags['devices']}: must be a whole number")
    return flags, tuple(extra)


def _main(flags, extra):
    from efficientllm.plan import hardware as hardwares
    from efficientllm.recommend import answer, search
    from efficientllm.recommend.evidence import Evidence
    from efficientllm.recommend.request import make_request
    from efficientllm.recommend.techniques import list_techniques
    from efficientllm.report.query import parse_query
    from efficientllm.report.read_boards import read_boards

    try:
        query = parse_query(flags["limits"], search.columns_of())
    except UserError as error:
        raise UserError(f"--limits: {error}") from None
    request = make_request(flags["task"], flags["model"], flags["device"], int(flags["devices"]), query, extra)
    search.check_query(request)
    hardwares.compile_only(request.hardware, request.devices)
    evidence = Evidence(request, read_boards(_folders(flags.get("evidence"))))
    for line in evidence.unread:
        print(line, file=sys.stderr)
    techniques = list_techniques(request.task, evidence.configs)
    looked = search.Search(request, techniques, evidence, _planner_of(request))
    result = looked.run()
    if "by_shapes" not in flags:
        looked.check_finalists(result)
    if "json" in flags:
        print(json.dumps(answer.as_json(request, result), indent=1))
    else:
        print(answer.text(request, result))
    return 0 if result.entries else 1


def _planner_of(request):
    """A function that makes the planner of the task from the changes that all candidates share."""
    if request.task == "infer":
        from efficientllm.recommend.planned_serving import ServingPlanner

        return lambda batch: ServingPlanner(request, batch)
    from efficientllm.recommend.planned_training import TrainingPlanner

    return lambda batch: TrainingPlanner(request, batch)


def _folders(text):
    """The folders of evidence: those of the flag, or those that a clone has."""
    if text is not None:
        return [folder for folder in text.split(",") if folder]
    folders = [*sorted(pathlib.Path("experiments").glob("*/results")), pathlib.Path("experiments/board")]
    return [folder for folder in folders if (folder / "leaderboard.json").is_file()]


if __name__ == "__main__":
    sys.exit(main())
