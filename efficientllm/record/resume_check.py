"""Resume checks: whether the run in a workdir can continue under the config that is requested.

Some keys may differ, the number of steps may grow, everything else must be as it was.
"""

import typing

from efficientllm.config.plain import flatten
from efficientllm.errors import UserError

Values = dict[str, typing.Any]  # a config as plain data
TRAINING = ("pretrain", "tune")
# Keys that change neither what a run computes nor what its row reports.
_NEVER = ("name", "imports", "train.log_every", "checkpoint", "sample", "memory_gb", "profile")
# Keys that may change when a run resumes: how it is logged, saved or sharded.
_RESUMED = (*_NEVER, "mesh", "eval", "metrics", "plan")
_FINISHED = (*_NEVER, "eval.every", "plan")
_OTHER_TASKS = ("infer", "quality")  # training does not read these


def check_task(workdir: typing.Any, old: Values, requested: Values) -> None:
    """Raises UserError for a plan in the workdir of a run, whose row it would replace."""
    if requested.get("task") == "plan" and flatten(old).get("task", "plan") != "plan":
        raise UserError(f"--workdir={workdir.path} holds a run; a plan needs a folder of its own")


def check_finished(
    workdir: typing.Any, old: Values, requested: Values, changed_imports: list[str], steps_saved: int | None
) -> str | None:
    """Why a finished run of the config `old` has nothing left to do, or None if it continues. Raises UserError."""
    check_task(workdir, old, requested)
    trains = requested.get("task") in TRAINING
    ignored = _FINISHED if requested.get("task") != "plan" else _NEVER
    keys = changed(old, requested, (*ignored, "train.steps", *_OTHER_TASKS) if trains else ignored) + changed_imports
    if keys:
        raise UserError(
            f"--workdir={workdir.path} holds a finished run with another config: {', '.join(keys)}; take another "
            "workdir, or --overwrite it"
        )
    reason = f"{workdir.shown} holds a finished run; its row stays. --overwrite starts anew."
    old_steps = flatten(old).get("train.steps")
    if not trains or not isinstance(old_steps, int) or requested["train"]["steps"] == old_steps:
        return reason
    if requested["train"]["steps"] < old_steps:
        raise _fewer(workdir, requested, f"a finished run of {old_steps} steps")
    if steps_saved is None:
        raise UserError(
            f"config.train.steps = {requested['train']['steps']}: --workdir={workdir.path} holds a finished run of "
            f"{old_steps} steps and no checkpoint to continue from; --overwrite starts anew"
        )
    return None


def check_unfinished(workdir: typing.Any, old: Values, requested: Values, steps_saved: int | None) -> None:
    """Raises UserError unless the unfinished run of the config `old` can resume with the config `requested`."""
    check_task(workdir, old, requested)
    trains = requested.get("task") in TRAINING
    if keys := changed(old, requested, (*_RESUMED, "train.steps", *_OTHER_TASKS) if trains else _RESUMED):
        raise UserError(
            f"--workdir={workdir.path} holds a run with another config: {', '.join(keys)}; take another workdir, or "
            "--overwrite it"
        )
    if trains and steps_saved is not None and steps_saved > requested["train"]["steps"]:
        raise _fewer(workdir, requested, f"a checkpoint of step {steps_saved}")


def _fewer(workdir, requested, content):
    return UserError(
        f"config.train.steps = {requested['train']['steps']}: --workdir={workdir.path} holds {content}; ask for as "
        "many or more, take another workdir, or --overwrite it"
    )


def changed(old: Values, new: Values, ignored: tuple[str, ...]) -> list[str]:
    """`key (old -> new)` of every key that both configs have with different values, except those in `ignored`.

    A key that only one of them has was added or removed by a version of this program, and is not compared.
    """
    a, b = flatten(old), flatten(new)
    keys = [key for key in sorted(a.keys() & b.keys()) if a[key] != b[key] and not _is_in(key, ignored)]
    return [f"{key} ({a[key]!r} -> {b[key]!r})" for key in keys]


def _is_in(key, prefixes):
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
