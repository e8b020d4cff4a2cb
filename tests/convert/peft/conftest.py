"""A checkpoint that adapters go around."""

import pytest

from efficientllm import convert


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Its kernels' four largest singular values stand apart from the rest. Where they do not, what the four span is no
    more certain than float32's rounding over the gap, and for PiSSA each side takes the kernels apart for itself."""
    peers = pytest.importorskip("convert.peers")
    torch = peers.torch
    where = tmp_path_factory.mktemp("base") / "model"
    plain = peers.reference("llama")
    with torch.no_grad():
        for name, tensor in plain.named_parameters():
            if name.endswith("_proj.weight"):
                u, s, vt = torch.linalg.svd(tensor.double(), full_matrices=False)
                s[:4] += s[0].clone()
                tensor.copy_(0.5 * (u * s) @ vt)
    plain.save_pretrained(where)
    return convert.open_source(where)
