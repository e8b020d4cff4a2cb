"""Tasks of EleutherAI's lm-evaluation-harness scored in our runs, and its results.json joined to a row.

https://github.com/EleutherAI/lm-evaluation-harness
"""

import importlib.metadata
import importlib.util
import json
import logging
import pathlib

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
POSITIONS = 2048  # of a model that has no limit of its own


def check(ours):
    """Raises UserError for what of `config.quality` cannot be: no lm-eval, an unknown task, no results."""
    if ours.limit < 0 or ours.batch_size < 1:
        raise UserError(
            f"config.quality.limit = {ours.limit}, config.quality.batch_size = {ours.batch_size}: "
            "they must be at least 0 and 1"
        )
    if ours.include and not pathlib.Path(ours.include).is_dir():
        raise UserError(f"config.quality.include = {ours.include!r}: no such folder of tasks")
    if ours.results:
        readings_of_file(ours.results)
    if ours.tasks:
        _check_tasks(ours)


def _check_tasks(ours):
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"config.quality.tasks needs lm-eval: {optional_packages.remedy('quality')}")
    known = set(_manager(ours.include).all_tasks)
    for task in names(ours.tasks):
        if task not in known:
            raise UserError(f"config.quality.tasks: no task {task!r}{did_you_mean(task, known)}")


def names(tasks):
    """The harness's names of `config.quality.tasks`, in which "study" stands for the study's six."""
    return list(dict.fromkeys(name for task in tasks for name in (STUDY if task == "study" else (task,))))


def _manager(include):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include or None)


def score(model, ours, chat, seed, file):
    """Readings of the tasks for `model`, an `interface.Harness`; all the harness says is written to `file`.

    With `chat`, contexts go through the model's chat template.
    """
    from lm_eval import evaluator, utils

    found = evaluator.simple_evaluate(
        model,
        tasks=names(ours.tasks),
        limit=ours.limit or None,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        task_manager=_manager(ours.include),
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        fewshot_random_seed=seed,
        torch_random_seed=None,  # what a seed is set in would be imported
    )
    found["lm_eval_version"] = importlib.metadata.version("lm_eval")
    logging.getLogger("efficientllm").info(utils.make_table(found))
    write_atomically(file, json.dumps(found, indent=1, default=str) + "\n")
    return readings(found, str(file.name))


def readings_of_file(file):
    """Readings of a results.json that the harness has written. Raises UserError for what is none."""
    where = f"config.quality.results = {file!r}"
    found = json_text.read(pathlib.Path(file).expanduser(), where=where, nan=True)
    for name in ("results", "groups", "n-samples"):
        held = found.get(name, None if name == "results" else {})
        if not isinstance(held, dict) or not all(isinstance(value, dict) for value in held.values()):
            raise UserError(f"{where}: no {name!r} in it; needed is a results.json of the lm-evaluation-harness")
    return readings(found, pathlib.Path(file).name)


def readings(found, file):
    """`{task_metric: Reading}` of the harness's results, and `study_quality`, the mean of the six, where all are."""
    version = found.get("lm_eval_version", "of unknown version")
    read = {}
    for task, metrics in (found["results"] | found.get("groups", {})).items():
        counts = found.get("n-samples", {}).get(task, {}).get("effective")
        about = f"{file}: lm-eval {version}" + (f", {counts} examples" if counts else "")
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if chosen and not metric.endswith("_stderr") and json_text.is_number(value):
                name = f"{task}_{metric}" + ("" if chosen == "none" else f"_{chosen}")
                read[name] = Reading(value, "1", about)
    parts = [read.get(f"{task}_{metric}") for task, metric in STUDY.items()]
    if all(parts):
        mean = sum(part.value for part in parts) / len(parts)
        read["study_quality"] = Reading(mean, "1", f"unweighted mean of {', '.join(STUDY)}")
    return read
