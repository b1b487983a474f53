"""Scaled dot-product attention, and the gated self-attention of the encoders."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from echo_eqx.layers.linear import Linear
from echo_eqx.layers.norm import RMSNorm
from echo_eqx.layers.precision import matmul_precision
from echo_eqx.layers.rotary import apply_rope
from echo_eqx.model.pallas_attention import pallas_attention, supports

Kernel = Literal["auto", "pallas", "none"]
"""How attention is computed. `auto`: by cuDNN's fused kernel on GPU, elsewhere by plain products.
`pallas`: by a fused kernel for TPU. `none`: by plain products, which lower for every platform. So
are sizes and dtypes that a kernel does not support."""

_KERNEL: ContextVar[Kernel] = ContextVar("attention kernel", default="auto")


@contextmanager
def attention_kernel(kernel: Kernel) -> Iterator[None]:
    """Attention traced inside uses `kernel`."""
    token = _KERNEL.set(kernel)
    try:
        yield
    finally:
        _KERNEL.reset(token)


class KeyOrder(eqx.Module):
    """An order that puts the unmasked keys first.

    cuDNN's kernel takes a number of keys instead of a mask: of the keys at `indices`, the first
    `count` are attended to. `inverse` undoes the order.
    """

    indices: Int[Array, "*b j"]
    inverse: Int[Array, "*b j"]
    count: Int[Array, "*b"]

    @classmethod
    def of(cls, mask: Bool[Array, " j"]) -> "KeyOrder":
        count = jnp.sum(mask, dtype=jnp.int32)
        place = jnp.where(mask, jnp.cumsum(mask) - 1, count + jnp.cumsum(~mask) - 1)
        return cls(jnp.argsort(place), place, count)


class KeyMask(eqx.Module):
    """A mask over keys, and the order of the keys for cuDNN's kernel."""

    mask: Bool[Array, "*b j"]
    order: KeyOrder | None
    """None unless the attention kernel is `auto`."""

    @classmethod
    def of(cls, mask: Bool[Array, " j"]) -> "KeyMask":
        return cls(mask, KeyOrder.of(mask) if _KERNEL.get() == "auto" else None)


def dot_product_attention(
    queries: Float[Array, "t h k"],
    keys: Float[Array, "j h k"],
    values: Float[Array, "j h k"],
    mask: KeyMask | None,
    *,
    causal: bool = False,
) -> Float[Array, "t h k"]:
    """`softmax(q k^T / sqrt(k)) v` for each head, with the softmax in float32.

    Keys that `mask` excludes are ignored; `causal` also excludes keys after the query's position.
    The result for a query with no key left is finite but meaningless. See `Kernel` for how it is
    computed.
    """
    kernel = _KERNEL.get()
    if kernel == "auto" and jax.default_backend() == "gpu" and _has_kernel(queries):
        return _flash_attention(queries, keys, values, mask, causal)
    if kernel == "pallas" and supports(queries, keys):
        allowed = None if mask is None else mask.mask
        return pallas_attention(queries, keys, values, allowed, causal=causal)
    allowed = jnp.ones((1, 1), bool) if mask is None else mask.mask[None]
    if causal:
        allowed = allowed & jnp.tril(jnp.ones((queries.shape[0], keys.shape[0]), bool))
    logits = _logits(queries, keys) * queries.shape[-1] ** -0.5
    logits = jnp.where(allowed[None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    precision = matmul_precision(values.dtype)
    return jnp.einsum("htj,jhk->thk", weights, values, precision=precision)


@jax.custom_vjp
def _logits(queries: Float[Array, "t h k"], keys: Float[Array, "j h k"]) -> Float[Array, "h t j"]:
    """`q k^T`, accumulated and returned in float32.

    The gradient's matrix products are in the operands' dtype. JAX's own rule makes them float32.
    """
    return jnp.einsum(
        "thk,jhk->htj",
        queries,
        keys,
        precision=matmul_precision(queries.dtype),
        preferred_element_type=jnp.float32,
    )


def _logits_forward(queries, keys):
    return _logits(queries, keys), (queries, keys)


def _logits_backward(operands, gradient):
    queries, keys = operands
    gradient, precision = gradient.astype(queries.dtype), matmul_precision(queries.dtype)
    return (
        jnp.einsum("htj,jhk->thk", gradient, keys, precision=precision),
        jnp.einsum("htj,thk->jhk", gradient, queries, precision=precision),
    )


_logits.defvjp(_logits_forward, _logits_backward)


def _has_kernel(queries: Array) -> bool:
    """Whether cuDNN's flash attention (Dao et al., 2022, arXiv:2205.14135) supports the queries."""
    head_dim = queries.shape[-1]
    return queries.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128


def _flash_attention(
    queries: Float[Array, "t h k"],
    keys: Float[Array, "j h k"],
    values: Float[Array, "j h k"],
    mask: KeyMask | None,
    causal: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "t h k"]:
    lengths: dict[str, Any] = {}
    if mask is not None:
        assert mask.order is not None
        order, inverse = mask.order.indices, mask.order.inverse
        keys, values = (_permute(x, order, inverse) for x in (keys, values))
        count = jnp.maximum(mask.order.count, 1)[None]
        # Derived from `count`, so that vmap batches both lengths, as cuDNN's batching rule expects.
        lengths["query_seq_lengths"] = 0 * count + queries.shape[0]
        lengths["key_value_seq_lengths"] = count
    return jax.nn.dot_product_attention(
        queries, keys, values, is_causal=causal, implementation=implementation, **lengths
    )


@jax.custom_vjp
def _permute(
    x: Float[Array, "j h k"], order: Int[Array, " j"], inverse: Int[Array, " j"]
) -> Float[Array, "j h k"]:
    """`x[order]`. Its gradient is a gather as well; JAX's own rule makes it a scatter."""
    return jnp.take(x, order, axis=0, unique_indices=True, mode="clip")


def _permute_forward(x, order, inverse):
    return _permute(x, order, inverse), (order, inverse)


def _permute_backward(orders, gradient):
    order, inverse = orders
    return _permute(gradient, inverse, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)


def split_heads(x: Float[Array, "t d"], head_dim: int) -> Float[Array, "t h {head_dim}"]:
    return x.reshape(x.shape[0], -1, head_dim)


class SelfAttention(eqx.Module):
    """Self-attention with QK-norm, RoPE on all heads, and a sigmoid gate on the output."""

    wq: Linear
    wk: Linear
    wv: Linear
    wo: Linear
    gate: Linear
    q_norm: RMSNorm
    k_norm: RMSNorm

    @classmethod
    def init(cls, dim: int, num_heads: int, eps: float, *, key: PRNGKeyArray) -> "SelfAttention":
        keys = jr.split(key, 5)
        wq, wk, wv, wo, gate = (Linear.init(dim, dim, key=key) for key in keys)
        q_norm, k_norm = (RMSNorm.init((num_heads, dim // num_heads), eps) for _ in range(2))
        return cls(wq, wk, wv, wo, gate, q_norm, k_norm)

    @property
    def head_dim(self) -> int:
        return self.q_norm.weight.shape[-1]

    def __call__(
        self,
        x: Float[Array, "t d"],
        mask: KeyMask | None,
        angles: Float[Array, "t a"],
        *,
        causal: bool = False,
    ) -> Float[Array, "t d"]:
        queries = apply_rope(self.q_norm(split_heads(self.wq(x), self.head_dim)), angles)
        keys = apply_rope(self.k_norm(split_heads(self.wk(x), self.head_dim)), angles)
        values = split_heads(self.wv(x), self.head_dim)
        out = dot_product_attention(queries, keys, values, mask, causal=causal)
        out = out.reshape(x.shape[0], -1)
        return self.wo(jax.nn.sigmoid(self.gate(x)) * out, row_parallel=True)
