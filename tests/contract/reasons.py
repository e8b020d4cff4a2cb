"""Failure messages of the contract suite: what was compared, and where to look."""

from efficientllm import model
from efficientllm.cost import formulas

REASONS = {
    "dtype": "what it returns has the type and the shape of its input x_BTD",
    "precision": "softmax, norms, routers and angles are float32 under every precision; products go through "
    "weights.matmul or layers.Linear",
    "causality": "token 15 was changed, and so are outputs before it: who may read whom is in ctx.mask",
    "input": "token 15 was changed, and its logits hardly are: does it read its input?",
    "segments": "a document behind another in a row gives what it does not give alone. ctx.mask keeps them apart, and "
    "ctx.positions_BT are 0 where one begins: there states and convolutions begin too",
    "directions": "a bidirectional row has ctx.mask.order == 'bidirectional': each token reads those of its segment on "
    "both sides, and no padding",
    "permutation": "without a position a bidirectional mixer does not know the order of tokens",
    "kernels of order": "attention.attend has kernels that all honour ctx.mask",
    "prefix": "in a row with ctx.mask.order == 'prefix' tokens of a block read one another, and others are causal",
    "decode": "tokens that come one at a time do not give what all give at once: look at init_state and the state that "
    "the call returns (mixers.kv_cache.extend adds tokens to a KV cache and gives what queries read)",
    "finite": "a gradient is not finite",
    "gradient": "a gradient is all zero: nothing that is learnt reads the parameter",
    "scan": "layers in a scan and layers one after the other are not the same function",
    "remat": "with config.model.remat = 'full' it is not the same function: is anything random, or kept outside?",
    "sharding": "eight devices do not give what one gives: look at the logical axes of its parameters, and at what it "
    "computes over rows or tokens of the batch",
    "compressed": "with compressed kernels it is not the function that it is with their numbers as arrays: products go "
    "through weights.matmul or layers.Linear, and a kernel of its own is read by weights.parameter",
    "kernels": "none of its parameters is named kernel: no compressed form and no adapter finds one",
    "adapters": "with adapters around its kernels it is not what it is with both merged: products go through "
    "weights.matmul or layers.Linear",
    "state": "state_bytes(length) is not what init_state(batch, length) takes a row",
}


def of(name, kind, spec, detail=""):
    """The reason for a failure of `kind` `spec`."""
    return f"{kind} {spec}: {REASONS[name]}" + (f" ({detail})" if detail else "")


def flops(kind, spec, lm, boxed, length, counted):
    """The message for a FLOP count that differs from the formulas, with all terms of the formulas."""
    claimed = formulas.forward_flops(lm, boxed, length, executed=True)
    mixers = sum(mixer.mix_flops(length, True) for (mixer,), _ in model.parts(lm)) * lm.num_groups
    kernels = dict(formulas._kernel_flops(lm, boxed, length))
    others = sorted({path for path, *_ in formulas.leaves(boxed)} - set(kernels))
    return (
        f"{kind} {spec}: the program of a row of {length} tokens multiplies {counted:,.0f} FLOPs, the formulas say "
        f"{claimed:,.0f}: {counted - claimed:+,.0f}. They count {mixers:,.0f} of mix_flops({length}, True), the "
        f"kernels {', '.join(f'{path} {flops:,.0f}' for path, flops in kernels.items())}, and nothing of "
        f"{', '.join(others)}. Products of activations with one another, or with a parameter that is not named kernel, "
        "belong into mix_flops (attention.attend computes attention.executed_pairs(kernel, length, window) pairs, of "
        "2 H K each for scores and values); a kernel that does not multiply every token once says so by kernel_rows"
    )
