"""Spec strings: what is built, and what is refused in one line."""

import concurrent.futures
import gc
import subprocess
import sys
import time

import pytest

import runs
from efficientllm import registry
from efficientllm.architecture.sizes import Size
from efficientllm.errors import UserError
from efficientllm.registry import ranges

pytestmark = pytest.mark.quick


def make(a: int, b: float = 0.5, name: str = "n"):
    return a, b, name


def test_spec_then_fixed_then_defaults(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", {("toy", "make"): make})
    assert registry.build("toy", "make(a=1)") == (1, 0.5, "n")
    assert registry.build("toy", "make", {"a": 2, "b": 0.1, "other": 3}) == (2, 0.1, "n")
    assert registry.build("toy", "make(a=1)", {"a": 2}, b=0.7) == (1, 0.7, "n")
    assert registry.build("toy", "make(a=1, name='x')") == (1, 0.5, "x")
    assert registry.complete_spec("toy", "make(b=0.2)", {"a": 4, "b": 9.0}) == "make(a=4, b=0.2)"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("maek(a=1)", "no toy of that name; known: make; did you mean 'make'?"),
        ("make", "needs a value for a"),
        ("make(a=1, c=2)", "no field 'c'; fields: a, b, name"),
        ("make(a='1')", "a = '1': must be int"),
        ("make(a=True)", "a = True: must be int"),
        ("make(1)", "is not a spec"),
        ("make(a=1, a=2)", "is not a spec"),
        ("make(a=__import__('os'))", "is not a spec"),
        ("make(a=1", "is not a spec"),
        ("make(**{'a': 1})", "is not a spec"),
        (f"make(a={'-' * 3000}1)", "is not a spec"),
        (f"make(a={'(' * 3000})", "is not a spec"),
        (f"make(a={'9' * 5000})", "is not a spec"),
        (3, "is not a spec"),
    ],
)
def test_what_is_refused(spec, message, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", {("toy", "make"): make})
    with pytest.raises(UserError, match="config.toy = ") as error:
        registry.build("toy", spec, where="config.toy")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_technique_of_one_s_own_brings_its_ranges():
    registry.register("toy", "ranged", ranges={"a": ranges.whole(1, 9), "b": ranges.POSITIVE})(make)
    try:
        assert registry.build("toy", "ranged(a=9)") == (9, 0.5, "n")
        for spec, message in (
            ("ranged(a=0)", "a = 0: must be at least 1, at most 9 and whole"),
            ("ranged(a=1, b=0.0)", "b = 0.0: must be above 0 and finite"),
        ):
            with pytest.raises(UserError, match="config.toy = ") as error:
                registry.build("toy", spec, where="config.toy")
            assert message in str(error.value)
    finally:
        del registry._REGISTRY["toy", "ranged"]


def test_numbers_of_any_technique_are_finite_and_inherited_ones_in_range(monkeypatch):
    class Mine(Size):
        pass

    monkeypatch.setattr(registry, "_REGISTRY", {("toy", "make"): make, ("size", "mine"): Mine})
    monkeypatch.setattr(registry, "_import_modules", lambda kind: None)
    with pytest.raises(UserError, match="b = inf: must be finite"):
        registry.build("toy", "make(a=1, b=1e999)")
    with pytest.raises(UserError, match="dim = 0: must be at least 1"):
        registry.complete_spec("size", "mine(dim=0)", {})


def test_a_lookup_imports_no_technique_beside_the_one_it_names():
    code = """if True:
        import sys
        from efficientllm import registry
        registry.lookup("task", "pretrain")
        registry.lookup("optimizer", "lion")
        names = ("tasks.training", "optim.optimizers", "tasks.inference", "tasks.plan", "mixers.nsa", "data.images")
        print([name for name in names if f"efficientllm.{name}" in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.stdout == "['tasks.training', 'optim.optimizers']\n", done.stderr


def test_a_technique_of_ones_own_cannot_take_a_name_of_the_package():
    code = """if True:
        from efficientllm import registry
        registry.register("schedule", "cosine")(object)  # before the package's module is imported
        registry.lookup("schedule", "cosine")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True)
    assert "schedule 'cosine' is registered twice: object and cosine" in done.stderr


def test_a_name_is_registered_once(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", {("toy", "make"): make})
    registry.register("toy", "make")(make)  # the same again is no second one: a module may be imported twice
    with pytest.raises(KeyError, match="registered twice"):
        registry.register("toy", "make")(lambda: None)


def test_names_may_hold_dots():
    assert isinstance(registry.build("size", "0.5b"), Size)
    assert registry.build("size", "1.5b(num_layers=2)").num_layers == 2


def test_a_field_called_name_is_hidden_in_flax_modules_only():
    assert registry.build("data", "hf(path='x', name='y')").name == "y"
    with pytest.raises(UserError, match="no field 'name'"):
        registry.build("ffn", "swiglu(hidden=3, precision='float32', name='x')")


def test_threads_that_read_data_parse_specs_at_once():
    """Where the garbage collector lets another thread go on between two nodes of a syntax tree."""
    before, yields = gc.get_threshold(), lambda *_: time.sleep(0)
    gc.callbacks.append(yields)
    gc.set_threshold(7)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            parsed = list(pool.map(registry.parse_spec, ["nsa(window=512, sizes=((1, (2, 3)), ((4,), 5)))"] * 100))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(yields)
    assert parsed == [("nsa", {"window": 512, "sizes": ((1, (2, 3)), ((4,), 5))})] * 100
