"""The contract suite over every registered technique. A new one needs no test of its own to be in it."""

import pytest

import contract
import contract_fields
import contract_parts
from efficientllm import registry

KINDS = ("mixer", "ffn", "position")
MESH = "data=2, fsdp=2, tensor=2"  # test_sharding.py has one axis at a time
CHECKS = [
    contract.check_dtypes,
    contract.check_causality,
    contract.check_segments,
    contract.check_decode,
    contract.check_gradients,
    contract.check_scan,
    contract.check_compressed,
    contract_fields.check_fields,
    contract.check_flops,
    contract.check_state_bytes,
    contract.check_leaves,
]
# Positions have no products and no state of their own.
POSITION_CHECKS = [
    contract.check_segments,
    contract.check_decode,
    contract.check_gradients,
    contract_fields.check_fields,
]


# Techniques that share their code with another (mha, mqa and window are gqa's module, ...), or that parity tests cover,
# run all but the cheap checks with the slow tests.
ALIKE = ("mha", "mqa", "window", "moba", "mamba2", "t5", "sinusoidal", "learned", "channel_mix", "gelu")
CHEAP = (contract.check_causality, contract.check_segments, contract.check_flops, contract.check_state_bytes)
# What is the model's work rather than the technique's is slow but for these.
MACHINERY = (
    contract.check_dtypes,
    contract.check_scan,
    contract.check_compressed,
    contract_fields.check_fields,
    contract.check_leaves,
)
WHOLE = ("gqa", "mla", "moe", "swiglu", "relative", "gated")


def names(kind):
    """The package's own and those of --imports; other tests register some of theirs."""
    for name in registry.names(kind):
        if registry.lookup(kind, name).__module__.startswith(("efficientllm.", "efficientllm_plugin_", "functools")):
            yield name


def cases(kinds, others):
    """A case for each technique of the kinds and each of the others; a technique's all go to one worker, whose
    programs they share."""
    for kind in kinds:
        for name in names(kind):
            spec = registry.example(kind, name)
            for other in others:
                marks = [pytest.mark.xdist_group(f"{kind} {spec}")]
                if (name in ALIKE and other not in CHEAP) or (name not in WHOLE and other in MACHINERY):
                    marks.append(pytest.mark.slow)
                case = f"{kind} {spec}-{getattr(other, '__name__', other)}"
                yield pytest.param(kind, spec, other, marks=marks, id=case)


@pytest.mark.parametrize(
    "kind, spec, check", [*cases(("mixer", "ffn"), CHECKS), *cases(("position",), POSITION_CHECKS)]
)
def test_contract(kind, spec, check):
    check(kind, spec)


@pytest.mark.parametrize("kind, spec, mesh", list(cases(KINDS, [MESH])))
def test_one_device_equals_eight(kind, spec, mesh):
    contract.check_sharded(kind, spec, mesh)


# Tokens of a row on several devices: attention, latent attention, a scan and experts with the quick tests.
LONG = "fsdp=2, sequence=4"
QUICK = ("gqa", "mamba", "moe")


def long_cases():
    for case in cases(KINDS, [LONG]):
        quick = case.values[1].partition("(")[0] in QUICK
        yield case if quick else pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow], id=case.id)


@pytest.mark.parametrize("kind, spec, mesh", list(long_cases()))
def test_one_device_equals_eight_of_long_rows(kind, spec, mesh):
    contract.check_sharded(kind, spec, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("kind, spec, mesh", list(cases(KINDS, ["data=1, fsdp=4, tensor=2"])))
def test_one_device_equals_eight_on_another_mesh(kind, spec, mesh):
    contract.check_sharded(kind, spec, mesh)


def part_cases():
    """Of the package's own the quickest, the others with the slow tests; all of one's own."""
    for kind, checks in contract_parts.CHECKS.items():
        for name in names(kind):
            if name in contract_parts.NOT:
                continue
            own = registry.lookup(kind, name).__module__.startswith("efficientllm_plugin_")
            marks = [] if own or name in contract_parts.QUICK else [pytest.mark.slow]
            for check in checks:
                spec = registry.example(kind, name)
                yield pytest.param(kind, spec, check, marks=marks, id=f"{kind} {spec}-{check.__name__}")


@pytest.mark.parametrize("kind, spec, check", list(part_cases()))
def test_parts(kind, spec, check):
    check(kind, spec)
