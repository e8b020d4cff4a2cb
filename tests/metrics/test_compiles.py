"""A program that is compiled inside a measured segment is seen, and spoils it."""

import types

import jax
import jax.numpy as jnp
import pytest

from efficientllm.metrics import compiles
from efficientllm.metrics.energy.window import EnergyReader, EnergyWindow
from efficientllm.train import row
from efficientllm.train.measure import Measurement

pytestmark = pytest.mark.quick


class Metered(EnergyReader):
    """100 J in every window."""

    source, scope, kind = "test", "gpu", "measured"

    def stop(self):
        return EnergyWindow(
            100.0, 10.0, self._duration(), self.source, self.scope, self.kind, 0.0, self._close(0).reason
        )


class NoSampler:
    def mark(self):
        return 0

    def since(self, mark):
        return mark

    def stopped_s(self):
        return 0.0


def measured(work):
    measurement = Measurement(Metered(None), NoSampler())
    measurement.start()
    work()
    measurement.step_done(8)
    measurement.stop()
    return measurement


@pytest.fixture
def program():
    """A new program, its argument, and the same after a first call."""
    x = jnp.ones(3)
    compiles.count_programs()
    return jax.jit(lambda a: a * 2.5 + 0.25), x


def test_a_compilation_is_counted_once_and_a_call_is_not(program):
    double, x = program
    before = compiles.count_programs()
    double(x)
    assert compiles.count_programs() == before + 1
    double(x)
    assert compiles.count_programs() == before + 1


def test_a_segment_with_a_compilation_has_no_energy_and_no_times(program):
    double, x = program
    spoilt = measured(lambda: double(x).block_until_ready())
    assert spoilt.compiled == 1 and spoilt.windows[0].energy_j is None and "compiled" in spoilt.windows[0].reason
    assert "1 program(s) were compiled" in row._why_unmeasured(spoilt)
    clean = measured(lambda: double(x).block_until_ready())
    assert clean.compiled == 0 and clean.windows[0].energy_j == 100.0 and row._why_unmeasured(clean) is None


def test_a_spoilt_run_keeps_what_needs_no_clock(program, monkeypatch):
    double, x = program
    spoilt = measured(lambda: double(x).block_until_ready())
    monkeypatch.setattr(row.formulas, "count_parameters", lambda lm, boxed: {"total": 3, "active": 3})
    monkeypatch.setattr(row, "physical_of_model", lambda run, params: {"params_total": row.Reading(3, "1", "tree")})
    study, physical = row.readings(types.SimpleNamespace(lm=None, boxed=None), spoilt, None, None)
    assert all(reading.value is None and "compiled" in reading.reason for reading in study.values())
    assert physical["params_total"].value == 3 and physical["tokens_per_s"].value is None
