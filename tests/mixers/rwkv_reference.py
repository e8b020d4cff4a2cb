"""Reference logits and gradients of the authors' package `rwkv`. A script, because its switches are set at import.

    python rwkv_reference.py folder

reads `*.pth` and `*.npz` (tokens, targets) there and writes `*.out.npz`: `logits` of the package's own forward pass,
`loss`, and a gradient a parameter through the package's functions of one token, which are differentiable.
"""

import os
import pathlib
import sys

os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}

import numpy as np
import torch
from rwkv import model as package

MIX = [f"x_{name}" for name in "rwkvag"] + [f"{name}{i}" for name in "wav" for i in range(3)]
MIX += ["g1", "g2", "k_k", "k_a", "r_k", *(f"{name}.weight" for name in ("receptance", "key", "value", "output"))]
MIX += ["ln_x.weight", "ln_x.bias"]


def layer_norm(x, weights, name):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def logits(model, weights, tokens):
    """The package's forward pass of one token, over a row, without its `no_grad`."""
    x_TD = layer_norm(weights["emb.weight"][tokens], weights, "blocks.0.ln0")
    state, out = model.generate_zero_state(), []
    for x in x_TD:
        v_first = torch.empty_like(x)
        for i in range(model.n_layer):
            block, att, shape = f"blocks.{i}.", f"blocks.{i}.att.", (model.n_head, model.head_size)
            normed, mix = layer_norm(x, weights, block + "ln1"), [weights[att + name] for name in MIX]
            y, state[3 * i], state[3 * i + 1], v_first = package.RWKV_x070_TMix_one(
                i, *shape, normed, state[3 * i], v_first, state[3 * i + 1], *mix
            )
            x = x + y
            ffn = [weights[f"{block}ffn.{name}"] for name in ("x_k", "key.weight", "value.weight")]
            y, state[3 * i + 2] = package.RWKV_x070_CMix_one(
                layer_norm(x, weights, block + "ln2"), state[3 * i + 2], *ffn
            )
            x = x + y
        out.append(layer_norm(x, weights, "ln_out") @ weights["head.weight"])
    return torch.stack(out)


def run(path):
    model = package.RWKV(str(path.with_suffix("")), "cpu fp32")
    batch = np.load(path.with_suffix(".npz"))
    arrays = {"logits": model.forward(batch["tokens"].tolist(), None, full_output=True)[0].numpy()}
    raw = torch.load(path)
    weights = model.z | {"emb.weight": raw["emb.weight"]}
    weights = {name: leaf.clone().requires_grad_() for name, leaf in weights.items()}
    loss = torch.nn.functional.cross_entropy(logits(model, weights, batch["tokens"]), torch.tensor(batch["targets"]))
    loss.backward()
    arrays["loss"] = loss.detach().numpy()
    arrays |= {f"grad/{name}": leaf.grad.numpy() for name, leaf in weights.items() if leaf.grad is not None}
    np.savez(path.with_suffix(".out.npz"), **arrays)


if __name__ == "__main__":
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pth")):
        run(path)
