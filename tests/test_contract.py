"""The contract suite over every registered mixer and ffn. A new technique needs no test of its own to be in it."""

import pytest

import contract
from efficientllm import registry

KINDS = ("mixer", "ffn", "position")
TECHNIQUES = [(kind, registry.example(kind, name)) for kind in KINDS for name in registry.names(kind)]
MESHES = ("data=2, fsdp=2, tensor=2", "data=1, fsdp=4, tensor=2")  # test_sharding.py has one axis at a time

every_technique = pytest.mark.parametrize("kind, spec", TECHNIQUES, ids=[spec for _, spec in TECHNIQUES])


@every_technique
@pytest.mark.parametrize(
    "check",
    [
        contract.check_dtypes,
        contract.check_causality,
        contract.check_segments,
        contract.check_decode,
        contract.check_gradients,
        contract.check_scan,
        contract.check_fields,
        contract.check_flops,
        contract.check_state_bytes,
    ],
    ids=lambda check: check.__name__,
)
def test_contract(check, kind, spec):
    check(kind, spec)


@every_technique
@pytest.mark.parametrize("mesh", MESHES)
def test_one_device_equals_eight(kind, spec, mesh):
    contract.check_sharded(kind, spec, mesh)
