"""What is asked of a workdir, compared with what is there: keys that may differ, steps that may grow."""

from efficientllm.config.plain import flatten
from efficientllm.errors import UserError

TRAINING = ("pretrain", "tune")
# Keys that change neither what a run computes nor what its row says of it.
_NEVER = ("name", "imports", "train.log_every", "checkpoint", "sample", "memory_gb", "profile")
# Keys that may change between the parts of a resumed run: they change how it is watched, saved or spread over devices.
_RESUMED = (*_NEVER, "mesh", "eval", "metrics", "plan")
_FINISHED = (*_NEVER, "eval.every", "plan")
_OTHER_TASKS = ("infer", "quality")  # of which training reads nothing


def check_task(workdir, old, asked):
    """Refuses a plan where a run is, whose row it would replace. Raises UserError."""
    if asked.get("task") == "plan" and flatten(old).get("task", "plan") != "plan":
        raise UserError(f"--workdir={workdir.path} holds a run; a plan needs a folder of its own")


def of_finished(workdir, old, asked, changed_imports, steps_saved):
    """Why a finished run of the config `old` has nothing left to do, or None if it goes on. Raises UserError."""
    check_task(workdir, old, asked)
    trains = asked.get("task") in TRAINING
    free = _FINISHED if asked.get("task") != "plan" else _NEVER
    keys = changed(old, asked, (*free, "train.steps", *_OTHER_TASKS) if trains else free) + changed_imports
    if keys:
        raise UserError(
            f"--workdir={workdir.path} holds a finished run with another config: {', '.join(keys)}; take another "
            "workdir, or --overwrite it"
        )
    stays = f"{workdir.shown} holds a finished run; its row stays. --overwrite starts anew."
    there = flatten(old).get("train.steps")
    if not trains or not isinstance(there, int) or asked["train"]["steps"] == there:
        return stays
    if asked["train"]["steps"] < there:
        raise _fewer(workdir, asked, f"a finished run of {there} steps")
    if steps_saved is None:
        raise UserError(
            f"config.train.steps = {asked['train']['steps']}: --workdir={workdir.path} holds a finished run of {there} "
            "steps and none of its checkpoints, so that it cannot go on; --overwrite starts anew"
        )
    return None


def of_unfinished(workdir, old, asked, steps_saved):
    """Checks that the run of the config `old` can go on as asked. Raises UserError."""
    check_task(workdir, old, asked)
    trains = asked.get("task") in TRAINING
    if keys := changed(old, asked, (*_RESUMED, "train.steps", *_OTHER_TASKS) if trains else _RESUMED):
        raise UserError(
            f"--workdir={workdir.path} holds a run with another config: {', '.join(keys)}; take another workdir, or "
            "--overwrite it"
        )
    if trains and steps_saved is not None and steps_saved > asked["train"]["steps"]:
        raise _fewer(workdir, asked, f"a checkpoint of step {steps_saved}")


def _fewer(workdir, asked, there):
    return UserError(
        f"config.train.steps = {asked['train']['steps']}: --workdir={workdir.path} holds {there}; ask for as many or "
        "more, take another workdir, or --overwrite it"
    )


def changed(old, new, free):
    """`key (old -> new)` of every key of both configs whose values differ, but for those of `free`.

    A key that one of them lacks came or went with a version of this program, and compares with nothing.
    """
    a, b = flatten(old), flatten(new)
    keys = [key for key in sorted(a.keys() & b.keys()) if a[key] != b[key] and not _is_in(key, free)]
    return [f"{key} ({a[key]!r} -> {b[key]!r})" for key in keys]


def _is_in(key, group):
    return any(key == one or key.startswith(f"{one}.") for one in group)
