"""Held-out losses without text targets."""

import numpy as np
import pytest

from efficientllm.evaluation import held_out
from efficientllm.metrics.reading import Reading

pytestmark = pytest.mark.quick


def test_targets_of_no_text_have_a_loss_and_no_bits_per_byte(monkeypatch):
    monkeypatch.setattr(held_out, "to_device", lambda batch, mesh: batch)
    of_batch = lambda params, batch, token_bytes_V: tuple(map(np.float32, batch))  # noqa: E731
    losses = held_out.evaluate(of_batch, None, [(4.0, 2.0, 0.0), (2.0, 1.0, 0.0)], None, None)
    assert losses == {"eval_loss": 2.0, "perplexity": np.exp(2.0)}
    readings = held_out.readings(losses)
    assert readings["bits_per_byte"].value is None and "no held-out target stands for text" in str(readings)
    assert isinstance(readings["eval_loss"], Reading)
    whole = held_out.evaluate(of_batch, None, [(4.0, 2.0, 3.0)], None, None)
    assert whole["bits_per_byte"] == 4.0 / np.log(2) / 3.0
