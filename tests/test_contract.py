"""The contract suite over every registered technique. A new one needs no test of its own to be in it."""

import pytest

import contract
from contract import fields, meshes, orders, parts  # noqa: F401  they declare checks
from efficientllm import registry


def names(kind):
    """The package's own and those of --imports; other tests register some of theirs."""
    for name in registry.names(kind):
        module = registry.lookup(kind, name).__module__
        if name not in parts.EXEMPT and module.startswith(("efficientllm.", "efficientllm_plugin_", "functools")):
            yield name


def marks(check, kind, name):
    """Your own technique is checked by default; a technique's checks go to one worker, whose programs they share."""
    is_plugin = registry.lookup(kind, name).__module__.startswith("efficientllm_plugin_")
    quick = check.quick is None or name in check.quick or (is_plugin and check.quick)
    return [pytest.mark.xdist_group(f"{kind} {name}"), pytest.mark.quick if quick else pytest.mark.slow]


def cases():
    """A case for each technique and each check of its kind."""
    for kind in dict.fromkeys(kind for check in contract.CHECKS for kind in check.kinds):
        for name in names(kind):
            spec = registry.example_spec(kind, name)
            for check in contract.CHECKS:
                if kind in check.kinds:
                    case = f"{kind} {spec}-{check.run.__name__}"
                    yield pytest.param(kind, spec, check.run, marks=marks(check, kind, name), id=case)


@pytest.mark.parametrize("kind, spec, check", list(cases()))
def test_contract(kind, spec, check):
    check(kind, spec)
