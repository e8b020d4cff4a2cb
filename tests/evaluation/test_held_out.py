"""Held-out losses without text targets."""

import numpy as np
import pytest

from efficientllm.evaluation import held_out
from efficientllm.metrics.reading import Reading
from efficientllm.objectives.next_token import NEXT_TOKEN

pytestmark = pytest.mark.quick
SHARDINGS: dict = {}  # of no array


def test_targets_of_no_text_have_a_loss_and_no_bits_per_byte(monkeypatch):
    monkeypatch.setattr(held_out, "to_device", lambda batch, shardings: batch)

    def of_batch(params, batch, token_bytes_V):
        return tuple(map(np.float32, batch))

    losses = held_out.evaluate(NEXT_TOKEN, of_batch, None, [(4.0, 2.0, 0.0), (2.0, 1.0, 0.0)], None, SHARDINGS)
    assert losses == {"eval_loss": 2.0, "perplexity": np.exp(2.0)}
    readings = NEXT_TOKEN.readings(losses)
    assert readings["bits_per_byte"].value is None and "no held-out target stands for text" in str(readings)
    assert isinstance(readings["eval_loss"], Reading)
    whole = held_out.evaluate(NEXT_TOKEN, of_batch, None, [(4.0, 2.0, 3.0)], None, SHARDINGS)
    assert whole["bits_per_byte"] == 4.0 / np.log(2) / 3.0


def test_the_line_has_the_means_alone():
    losses = {"eval_loss": 0.5, "eval_vlb": 0.25, "eval_loss_level_1": 1.0}
    assert held_out.line(losses) == "held out  eval_loss 0.5000  eval_vlb 0.2500"
