"""What whole runs give is what it was: losses bit for bit, trees, rows, adapters, completions, plans, sweeps."""

import math

import pytest

from golden import cases, process

pytestmark = pytest.mark.xdist_group("golden")
QUICK = ("gqa", "moe", "lora", "int4")  # cases of the quick tier
TOLERANCE = 1e-4  # relative, of losses of three steps in float32, where no bits are stored for this CPU and jax
MOST_SHOWN = 20


@pytest.fixture(scope="module")
def observed(request):
    """What came of the cases that are selected."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.module is request.module]
    return process.observe([call.params["name"] for call in calls if call])


def flatten(tree, path=""):
    """`{"a/b/0": leaf}` of nested dicts and lists; an empty one is a leaf."""
    if not isinstance(tree, dict | list) or not tree:
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: leaf for name, inner in items for key, leaf in flatten(inner, f"{path}/{name}").items()}


def differences(stored, observed, are_equal):
    """A line for each path whose leaf is another, or that only one of the trees has."""
    stored, observed = flatten(stored), flatten(observed)
    return [
        f"{path}: stored {stored.get(path, 'nothing')!r}, now {observed.get(path, 'nothing')!r}"
        for path in sorted(stored.keys() | observed.keys())
        if path not in stored or path not in observed or not are_equal(stored[path], observed[path])
    ]


def is_same(stored, observed):
    return stored == observed and type(stored) is type(observed)


def is_near(stored, observed):
    return math.isclose(float.fromhex(stored), float.fromhex(observed), rel_tol=TOLERANCE)


def losses(numbers):
    """Without kernels, which another machine has others of, and completions, where the last bit decides near ties."""
    return {key: numbers[key] for key in ("loss", "eval_loss") if key in numbers}


def check(name, lines):
    assert not lines, (
        f"{name}: {len(lines)} paths differ from tests/golden/data/{name}.json (tests/golden/README.md):\n"
        + "\n".join(lines[:MOST_SHOWN])
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.quick] if name in QUICK else []) for name in cases.NAMES]
)
def test_a_case_gives_what_it_gave(name, observed):
    stored, case = process.stored(name), observed[name]
    assert "failed" not in case, case["failed"]
    check(name, differences(stored["structure"], case["structure"], is_same))
    conditions = process.conditions()
    if conditions in stored["numbers"]:
        check(name, differences(stored["numbers"][conditions], case["numbers"], is_same))
    else:  # another CPU or another jax: near every set of numbers that is stored
        assert bool(stored["numbers"]) == bool(case["numbers"])
        for version, numbers in stored["numbers"].items():
            check(f"{name} ({version})", differences(losses(numbers), losses(case["numbers"]), is_near))


@pytest.mark.quick
def test_a_difference_is_named_by_its_path():
    stored = {"loss": {"step 1": "0x1.8p+1", "step 2": "0x1.0p+1"}, "tree": {"a": [2, 3]}}
    now = {"loss": {"step 1": "0x1.8p+1", "step 2": "0x1.1p+1"}, "tree": {"a": [2, 3], "b": [1]}}
    lines = ["/loss/step 2: stored '0x1.0p+1', now '0x1.1p+1'", "/tree/b/0: stored 'nothing', now 1"]
    assert differences(stored, now, is_same) == lines


def test_the_nearest_float32_is_near_and_a_thousandth_more_is_not():
    loss = 5.546960353851318
    assert is_near(loss.hex(), math.nextafter(loss, 6).hex()) and not is_same(loss.hex(), math.nextafter(loss, 6).hex())
    assert not is_near(loss.hex(), (loss * 1.001).hex())


def test_every_case_is_stored_and_nothing_else():
    assert sorted(file.stem for file in process.FOLDER.glob("*.json")) == sorted(cases.NAMES)
