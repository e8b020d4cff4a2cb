"""Checkpoints: damage is seen, what is no number is no checkpoint, and what a run was trained on is compared."""

import contextlib
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from efficientllm.errors import UserError
from efficientllm.record import checkpoint_checksums
from efficientllm.train import fingerprints
from efficientllm.train.checkpoint import Checkpoints

pytestmark = pytest.mark.quick


def state(value):
    return {"kernel": jnp.full((64, 64), float(value)), "step": jnp.int32(value)}


@contextlib.contextmanager
def opened(folder, keep=2):
    """Checkpoints of a folder, whose warnings a test can read."""
    log = logging.getLogger("efficientllm")
    log.propagate = True
    made = Checkpoints(folder, keep)
    try:
        yield made
    finally:
        made.close()


def save(folder, losses, keep=2):
    """A checkpoint of each `{step: held-out loss}`."""
    with opened(folder, keep) as checkpoints:
        for step, loss in losses.items():
            checkpoints.facts = {"of": step}
            checkpoints.save(step, state(step), {"at": step}, loss)
        checkpoints.wait()
        return checkpoints.stored()[0]


def restore(folder):
    with opened(folder) as checkpoints:
        restored = checkpoints.restore_newest(state(0))
        return restored and (int(restored[0]["step"]), restored[1], checkpoints.restored_facts)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_held_out_loss_that_is_no_number_is_neither_the_best_nor_the_last_good(broken, tmp_path):
    assert save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: broken}, keep=1) == [2, 3]
    assert restore(tmp_path)[0] == 3


def test_any_flipped_bit_is_seen_and_the_older_checkpoint_taken(tmp_path, caplog):
    save(tmp_path, {4: 2.0, 8: 1.0})
    files = [file for file in (tmp_path / "8").rglob("*") if file.is_file() and file.parent != tmp_path / "8"]
    assert len(files) > 5
    for file in files:
        whole = file.read_bytes()
        flipped = bytearray(whole or b"x")
        flipped[len(flipped) // 2] ^= 1
        file.write_bytes(flipped)
        assert file.name in checkpoint_checksums.damage(tmp_path / "8")
        file.write_bytes(whole)
    assert checkpoint_checksums.damage(tmp_path / "8") is None
    file = max(files, key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert restore(tmp_path) == (4, {"at": 4}, {"of": 4})
    assert "checkpoint 8 cannot be read (damaged: " in caplog.text and (tmp_path / "unreadable-8").is_dir()


@pytest.mark.parametrize("damage", ["removed file", "broken sums", "sums that are a list"])
def test_other_damage(damage, tmp_path):
    save(tmp_path, {4: 2.0, 8: 1.0})
    if damage == "removed file":
        next(file for file in (tmp_path / "8" / "state").rglob("*") if file.is_file()).unlink()
    else:
        (tmp_path / "8" / checkpoint_checksums.FILE).write_text("[]" if damage.endswith("list") else '{"a": ')
    assert restore(tmp_path)[0] == 4


def test_all_damaged_is_one_line_and_nothing_is_removed(tmp_path):
    save(tmp_path, {4: 2.0, 8: 1.0})
    for step in ("4", "8"):
        largest = max((tmp_path / step).rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
        largest.write_bytes(b"")
    with pytest.raises(UserError, match="none of the checkpoints in .* can be read"):
        restore(tmp_path)
    assert (tmp_path / "4").is_dir() and (tmp_path / "8").is_dir()


def test_a_checkpoint_older_than_checksums_is_taken(tmp_path):
    save(tmp_path, {4: 2.0})
    (tmp_path / "4" / checkpoint_checksums.FILE).unlink()
    assert restore(tmp_path)[0] == 4


def test_a_state_whose_loss_is_no_number_is_not_gone_on_from(tmp_path):
    save(tmp_path, {4: None, 8: None})
    with opened(tmp_path) as checkpoints:
        checkpoints.distrust(7)
        assert checkpoints.latest_step() == 8
        checkpoints.distrust(8)
        assert checkpoints.latest_step() == 4 and (tmp_path / "diverged-8").is_dir()
    save(tmp_path, {8: None})
    with opened(tmp_path) as checkpoints:  # once more
        checkpoints.distrust(8)
        assert (tmp_path / "diverged-8.2").is_dir()
    assert restore(tmp_path)[0] == 4


def test_all_can_be_discarded(tmp_path):
    save(tmp_path, {4: 2.0, 8: 1.0}, keep=0)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.stored()[0] == [8] and checkpoints.stored()[1] > 1000
        checkpoints.discard()
    assert restore(tmp_path) is None


def training(steps, schedule="cosine(peak=0.01, warmup=0.1, final=0.1)"):
    train = ConfigDict({"steps": steps, "schedule": schedule})
    return ConfigDict({"train": train, "data": "text(path='a')", "tokenizer": "bytes", "model": {"pretrained": "m"}})


@pytest.mark.parametrize("key", ["data", "tokenizer", "pretrained"])
def test_other_content_is_refused_and_named(key, tmp_path):
    was, now = ({"fingerprints": {"data": "a", "tokenizer": "b", "pretrained": None, key: value}} for value in "xy")
    with pytest.raises(UserError, match=f"config.*{key} = .*: its content is not what the run"):
        fingerprints.check(was, now, training(10))
    fingerprints.check({}, now, training(10))  # of a checkpoint that says nothing
    fingerprints.check(was, was, training(10))
    fingerprints.check({"fingerprints": {**was["fingerprints"], key: None}}, now, training(10))


def test_the_row_says_which_steps_had_which_schedule():
    first = {"schedules": [{"from_step": 0, "steps": 100}]}
    same = fingerprints.joined(first, {}, 60, training(100))["schedules"]
    assert same == [{"from_step": 0, "steps": 100}] and fingerprints.line(same) is None
    longer = fingerprints.joined(first, {}, 100, training(200))["schedules"]
    assert longer == [{"from_step": 0, "steps": 100}, {"from_step": 100, "steps": 200}]
    assert fingerprints.line(longer) == (
        "the learning rate is that of 100 steps up to step 100, of 200 steps from there on"
    )
    # A schedule that does not know how long it is gives the run that was never cut.
    constant = fingerprints.joined(first, {}, 100, training(200, "constant(peak=0.01)"))["schedules"]
    assert constant == [{"from_step": 0, "steps": 200}]
    assert fingerprints.joined({}, {}, 100, training(200))["schedules"] == [{"from_step": 0, "steps": 200}]


def test_weights_are_told_apart_by_content(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(np.arange(1 << 18, dtype=np.uint8).tobytes())
    (tmp_path / "config.json").write_text("{}")
    before = fingerprints.of_weights(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert fingerprints.of_weights(tmp_path) == before
    weights.write_bytes(np.arange(1, 1 + (1 << 18), dtype=np.uint8).tobytes())
    assert fingerprints.of_weights(tmp_path) != before
