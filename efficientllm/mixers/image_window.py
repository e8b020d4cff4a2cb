"""Attention within the windows of an image (Qwen2.5-VL: Bai et al. 2025, arXiv:2502.13923, Section 2.1.1)."""

import jax

from efficientllm.mixers.attention import MHA
from efficientllm.mixers.base import Context, State
from efficientllm.registry import register


@register("mixer", "image_window")
class ImageWindow(MHA, kw_only=True):
    """Multi-head attention of patches within their window (`Context.windows_BT`); without windows it is `mha`.

    The host puts whole windows into bins of `bin` slots, one bin after another, so that scores are those of a bin.

    Args:
      bin: the slots of a bin, at least the patches of a window.
    """

    bin: int = 64

    family = "attention"

    def __call__(self, x_BTD: jax.Array, ctx: Context, state: State | None = None) -> tuple[jax.Array, State | None]:
        if ctx.windows_BT is None:
            return super().__call__(x_BTD, ctx, state)
        # b: the bins of all rows
        x_bTD, *binned = (leaf.reshape(-1, self.bin, *leaf.shape[2:]) for leaf in (x_BTD, *_of_patches(ctx)))
        positions_bT, windows_bT, coordinates_bTA = binned
        mask = ctx.mask.replace(segments_BT=windows_bT)  # type: ignore[attr-defined]
        ctx = ctx.replace(positions_BT=positions_bT, mask=mask, coordinates_BTA=coordinates_bTA, windows_BT=None)
        y_bTD, state = super().__call__(x_bTD, ctx, state)
        return y_bTD.reshape(x_BTD.shape), state


def _of_patches(ctx):
    """The arrays of a context that have a value for each patch."""
    return ctx.positions_BT, ctx.windows_BT, ctx.coordinates_BTA
