"""Scaled dot-product attention: the context that mixers share, and the choice of a kernel."""

import typing

import flax.struct
import jax
import jax.numpy as jnp

from efficientllm import sharding
from efficientllm.errors import FieldError, UserError
from efficientllm.ops import attention_kernels as kernels
from efficientllm.ops import native, splash_attention
from efficientllm.ops import rematerialization as remat
from efficientllm.ops.attention_kernels import Cached, key_leaves
from efficientllm.ops.attention_mask import CHUNK, Mask
from efficientllm.ops.int8_kv_cache import as_array
from efficientllm.ops.native import flash
from efficientllm.registry import lookup
from efficientllm.runtime import kernel_choice


@flax.struct.dataclass
class Context:
    """Context of a forward pass, which all mixers share.

    `positions_BT` restart at each segment. `mask` covers the row, or the state's slots in decoding. `memo` holds arrays
    by name that mixers of earlier layers hand to later ones (`Mixer.init_memo`). `reach_B` is the length of each row
    after its prompt, for positions with `Position.by_length`; None takes it from the positions.

    Args:
      coordinates_BTA: the position of each token on A axes, for positions with several `Position.axes`; None is
        `positions_BT` on every axis.
      condition_BD: the vector that modulates blocks, before its SiLU; None without conditioning.
      text_BSD: the hidden vectors of the text that cross-attention reads.
      text_segments_BS: the segment of `mask` that each text token belongs to, 0 for padding; None where every token of
        a row reads all of its text.
      windows_BT: the window of each patch of images, 0 for padding, where some layers attend within windows alone;
        None where none do.
      images: the `embeds.vision_tower.Images` of a vision-language model's rows; None without images.
      recomputes_recurrence: whether the checkpoint of a whole group recomputes what is around a recurrence.
    """

    positions_BT: jax.Array
    mask: Mask
    memo: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    reach_B: jax.Array | None = None
    coordinates_BTA: jax.Array | None = None
    condition_BD: jax.Array | None = None
    text_BSD: jax.Array | None = None
    text_segments_BS: jax.Array | None = None
    windows_BT: jax.Array | None = None
    images: typing.Any = None
    recomputes_recurrence: bool = flax.struct.field(pytree_node=False, default=False)
    replace: typing.ClassVar[typing.Callable]  # flax.struct makes it: a copy with other values of the fields named

    def rotate(self, position: typing.Any, x_BTHK: jax.Array) -> jax.Array:
        """Rotates queries or keys of this pass by a `positions.base.Position`."""
        if position.axes > 1 and self.coordinates_BTA is not None:
            return position.rotate(x_BTHK, self.coordinates_BTA)
        if self.reach_B is None or not position.by_length:
            return position.rotate(x_BTHK, self.positions_BT)
        return position.rotate(x_BTHK, self.positions_BT, self.reach_B)

    def bias(self, position: typing.Any, num_heads: int) -> typing.Callable | None:
        """Returns the bias of the scores of a `positions.base.Position`; None without."""
        return position.bias(num_heads, self.memo) if position.shared else position.bias(num_heads)

    def check_order(self, *layers: typing.Any) -> None:
        """Raises UserError for a mixer or an ffn that does not honour the order of this pass; a layer may be None."""
        for layer in filter(None, layers):
            if self.mask.order not in layer.orders:
                raise UserError(
                    f"{type(layer).__name__.lower()}: reads tokens in {' or '.join(layer.orders)} order, and this pass "
                    f"is in {self.mask.order} order; take another"
                )

    @property
    def real_BT(self) -> jax.Array | None:
        """False for padding tokens, True for others; None without padding."""
        return None if self.mask.segments_BT is None else self.mask.segments_BT > 0

    @classmethod
    def packed(cls, positions_BT: jax.Array, segments_BT: jax.Array | None = None) -> "Context":
        """Makes the context of training and evaluation: rows that may hold several documents."""
        return cls(positions_BT, Mask(segments_BT=segments_BT))

    @classmethod
    def whole(cls, positions_BT: jax.Array, segments_BT: jax.Array | None = None) -> "Context":
        """Makes the context of rows whose tokens read one another in both directions, within their segment."""
        return cls(positions_BT, Mask(segments_BT=segments_BT, order="bidirectional"))

    @classmethod
    def decoding(cls, positions_BT: jax.Array, reach_B: jax.Array | None = None) -> "Context":
        """Makes the context of prefill and decode: one document a row, its token t in slot t of the state."""
        return cls(positions_BT, Mask(query_index_BT=positions_BT), reach_B=reach_B)


def attend(
    q_BTHK: jax.Array,
    k_BSGK: Cached,
    v_BSGV: Cached,
    mask: Mask,
    kernel: str = "auto",
    bias: typing.Callable | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Computes scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, Eq. 1) -> `[B, T, H, V]`.

    Softmax is float32. H is a multiple of G: query head h reads KV head h // (H // G). V is the width of a value.

    Args:
      k_BSGK, v_BSGV: arrays of any dtype, or of a KV cache; keys may be two of them, their first and last channels.
        Those of one KV head may be `[B, S, K]` and `[B, S, V]`.
      kernel: `auto` or a registered `attention_kernel`; a pass over a state ignores it.
      bias: `(mask, queries, keys) -> [B or 1, H, T, S]`, added to the scores; the ranges are those of `Mask.rows`.
      scale: factor of the scores; None is K^-1/2.

    Raises UserError for a kernel that does not exist, that does not honour the mask's order, or that needs whole rows
    where the mesh shards them.
    """
    in_state = mask.query_index_BT is not None
    if kernel == "auto" or in_state:
        kernel = choose(q_BTHK, mask, bias, jax.tree.leaves(v_BSGV)[0].shape[1])
    compute = lookup("attention_kernel", kernel, where="attention_kernel")
    if not in_state and kernel not in kernels.DIVIDED and sharding.count_shards("length", q_BTHK.shape[1]) > 1:
        raise FieldError(
            "attention_kernel", "needs whole rows, and the mesh axis sequence divides them; take 'auto'", kernel
        )
    kernel_choice.record_kernel("attention", kernel)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if kernel != "ffi":
        k_BSGK, v_BSGV = (_with_heads(leaves) for leaves in (k_BSGK, v_BSGV))
        keys = [as_array(leaf, q_BTHK.dtype) for leaf in key_leaves(k_BSGK)]
        k_BSGK = keys[0] if len(keys) == 1 else jnp.concatenate(keys, -1)
        v_BSGV = as_array(v_BSGV, q_BTHK.dtype)
    if not in_state:
        q_BTHK, k_BSGK, v_BSGV = jax.tree.map(remat.name_attention_input, (q_BTHK, k_BSGK, v_BSGV))
    with jax.named_scope("attention"):
        return compute(q_BTHK, k_BSGK, v_BSGV, mask, bias, scale)


def _with_heads(leaves):
    return jax.tree.map(lambda leaf: leaf if leaf.ndim == 4 else leaf[:, :, None], leaves)


def choose(q_BTHK: jax.Array, mask: Mask, bias: typing.Callable | None = None, keys: int | None = None) -> str:
    """Chooses the attention kernel for these shapes and the platform being compiled for; `keys` is S, None for T."""
    T, K = q_BTHK.shape[1], q_BTHK.shape[-1]
    in_state = mask.query_index_BT is not None
    if not in_state and sharding.count_shards("length", T) > 1:
        return "gathered"
    if T == 1 and in_state and bias is None and native.is_usable():
        return "ffi"
    half = q_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    widest = 256 if kernel_choice.capability() >= (9, 0) else 128  # of heads in cuDNN, as JAX has it
    shaped = T % 2 == 0 and (keys or T) % 2 == 0 and not K % 8 and widest >= K
    if kernel_choice.platform() == "gpu" and half and shaped and not in_state and bias is None:
        return "cudnn"
    fills_blocks = mask.order != "causal" or T % splash_attention.LANES == 0
    if kernel_choice.platform() == "tpu" and fills_blocks and splash_attention.takes(mask, bias):
        return "splash"
    if in_state:
        return "xla"
    if bias is not None and T >= LONG and mask.aligned:
        return "looped"
    is_free = kernels.takes_flash(q_BTHK, mask, bias) and flash.is_usable()
    if is_free and flash.occupies(q_BTHK.shape[0] * q_BTHK.shape[2]):
        return "flash"
    if mask.order == "causal":
        # Measured on CPUs: skipping the masked half in static chunks is 1.4x to 2x faster from two chunks on.
        return "chunked" if kernel_choice.platform() == "cpu" and T > CHUNK else "xla"
    return "chunked" if max(T, keys or T) >= LONG else "xla"


LONG = 1024  # tokens of a row from which scores of all pairs are not held in memory together


def executed_pairs(kernel: str, length: int, window: int | None = None, order: str = "causal") -> int:
    """Counts query-key pairs per head that `kernel` computes for a row of `length` tokens."""
    return Mask(window=window, order=order).executed_pairs(kernel, length)
