"""Tasks of EleutherAI's lm-evaluation-harness: scored in a run, or read from its results.json.

https://github.com/EleutherAI/lm-evaluation-harness
"""

import functools
import importlib.metadata
import importlib.util
import json
import logging
import pathlib
import typing

from ml_collections import ConfigDict

from efficientllm.errors import UserError, did_you_mean
from efficientllm.metrics.reading import Reading
from efficientllm.runtime import optional_packages
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.untrusted import json_text

# The study's six tasks (arXiv:2505.13840, Section 4) and the metric of each, as the Open LLM Leaderboard scores them.
STUDY = {
    "leaderboard_mmlu_pro": "acc",
    "leaderboard_bbh": "acc_norm",
    "leaderboard_gpqa": "acc_norm",
    "leaderboard_ifeval": "prompt_level_strict_acc",
    "leaderboard_math_hard": "exact_match",
    "leaderboard_musr": "acc_norm",
}
OWN = pathlib.Path(__file__).parent / "tasks"
POSITIONS = 2048  # for models without a largest position
Results = dict[str, typing.Any]  # the harness's results.json

if typing.TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from efficientllm.evaluation.lm_eval_model import Harness


def check(quality: ConfigDict) -> None:
    """Raises UserError for values of `config.quality` that cannot be used, and where lm-eval is not installed."""
    if quality.limit < 0 or quality.batch_size < 1:
        raise UserError(
            f"config.quality.limit = {quality.limit}, config.quality.batch_size = {quality.batch_size}: "
            "they must be at least 0 and 1"
        )
    if quality.include and not pathlib.Path(quality.include).is_dir():
        raise UserError(f"config.quality.include = {quality.include!r}: no such folder of tasks")
    if quality.results:
        readings_of_file(quality.results)
    if quality.tasks:
        _check_tasks(quality)


def _check_tasks(quality):
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"config.quality.tasks needs lm-eval: {optional_packages.remedy('quality')}")
    task_names = set(task_manager(quality).all_tasks)
    for task in names(quality.tasks):
        if task not in task_names:
            raise UserError(f"config.quality.tasks: no task {task!r}{did_you_mean(task, task_names)}")


def names(tasks: typing.Iterable[str]) -> list[str]:
    """Expands "study" in `config.quality.tasks` to the study's six tasks."""
    return list(dict.fromkeys(name for task in tasks for name in (STUDY if task == "study" else (task,))))


def task_manager(quality: ConfigDict) -> "TaskManager":
    """Returns the harness's index of tasks: ours and those of `include`, and its own where another is named.

    Its own are some 14,000 files, which take half a minute to read.
    """
    return _task_manager(tuple(names(quality.tasks)), quality.include)


@functools.lru_cache(maxsize=1)
def _task_manager(tasks, include):
    from lm_eval.tasks import TaskManager

    folders = [OWN, include] if include else [OWN]
    few = TaskManager(include_path=folders, include_defaults=False)
    return few if set(tasks) <= set(few.all_tasks) else TaskManager(include_path=folders)


def score(model: "Harness", quality: ConfigDict, chat: bool, seed: int, file: pathlib.Path) -> dict[str, Reading]:
    """Scores `model` on `config.quality.tasks`, and writes the harness's results to `file`.

    With `chat`, contexts go through the model's chat template.
    """
    from lm_eval import evaluator, utils

    results = evaluator.simple_evaluate(
        model,
        tasks=names(quality.tasks),
        limit=quality.limit or None,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        task_manager=task_manager(quality),
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        fewshot_random_seed=seed,
        torch_random_seed=None,  # a seed would import torch
    )
    results["lm_eval_version"] = importlib.metadata.version("lm_eval")
    logging.getLogger("efficientllm").info(utils.make_table(results))
    write_atomically(file, json.dumps(results, indent=1, default=str) + "\n")
    return readings(results, str(file.name))


def readings_of_file(file: str) -> dict[str, Reading]:
    """Reads a results.json of the harness. Raises UserError for any other file."""
    where = f"config.quality.results = {file!r}"
    results = json_text.read(pathlib.Path(file).expanduser(), where=where, nan=True)
    for name in ("results", "groups", "n-samples"):
        section = results.get(name, None if name == "results" else {})
        if not isinstance(section, dict) or not all(isinstance(entry, dict) for entry in section.values()):
            raise UserError(f"{where}: no {name!r} in it; needed is a results.json of the lm-evaluation-harness")
    return readings(results, pathlib.Path(file).name)


def readings(results: Results, file: str) -> dict[str, Reading]:
    """Converts the harness's results to `{task_metric: Reading}`.

    `study_quality` is the unweighted mean of the study's six tasks, where all of them were scored.
    """
    version = results.get("lm_eval_version", "of unknown version")
    by_name = {}
    for task, metrics in (results["results"] | results.get("groups", {})).items():
        counts = results.get("n-samples", {}).get(task, {}).get("effective")
        about = f"{file}: lm-eval {version}" + (f", {counts} examples" if counts else "")
        for key, value in metrics.items():
            metric, _, answer_filter = key.partition(",")
            if answer_filter and not metric.endswith("_stderr") and json_text.is_number(value):
                name = f"{task}_{metric}" + ("" if answer_filter == "none" else f"_{answer_filter}")
                by_name[name] = Reading(value, "1", about)
    study = [by_name.get(f"{task}_{metric}") for task, metric in STUDY.items()]
    if all(study):
        mean = sum(reading.value for reading in study) / len(study)
        by_name["study_quality"] = Reading(mean, "1", f"unweighted mean of {', '.join(STUDY)}")
    return by_name
