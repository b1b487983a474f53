"""Attention on TPU as one Pallas kernel for each direction.

A program of the kernel has some queries of one head and all of its keys, which fit into VMEM at the
lengths of speech. So the softmax is not split, and logits never reach HBM. JAX's own splash
attention refuses a `shard_map` that checks its types, in which the training step runs.

The tests run it in Pallas' interpreter. For v4, v5e, v5p and v6e it was compiled, by the compiler
of libtpu 0.0.42. It has not run on a TPU yet, so `--attention pallas` has to ask for it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from echo_eqx.layers.precision import matmul_precision

ATTENTION = "attention"
"""Name of the result, for policies of `jax.checkpoint`."""
LANES = 128
QUERIES = 128
"""Queries of a program."""
MAX_KEYS = 3200
"""The most for which the compiler was seen to fit the backward pass into VMEM."""


def supports(queries: Array, keys: Array) -> bool:
    """Whether the kernel is for such queries and keys, (t, h, k) and (j, h, k)."""
    head_dim = queries.shape[-1]
    return queries.dtype == jnp.bfloat16 and head_dim % LANES == 0 and keys.shape[0] <= MAX_KEYS


def pallas_attention(
    queries: Float[Array, "t h k"],
    keys: Float[Array, "j h k"],
    values: Float[Array, "j h k"],
    mask: Bool[Array, " j"] | None,
    *,
    causal: bool = False,
    interpret: bool = False,
) -> Float[Array, "t h k"]:
    """`dot_product_attention` of `echo_eqx.model.attention`; `interpret` runs it on CPU."""
    length, _, head_dim = queries.shape
    if mask is None:
        mask = jnp.ones(keys.shape[0], bool)
    keys, values = (_padded(x, LANES) for x in (keys, values))
    allowed = _padded(mask.astype(jnp.float32), LANES)[None]
    padded = _padded(queries, QUERIES)
    # Heads are side by side, so a program finds its own by the number of a block.
    flat = [x.reshape(x.shape[0], -1) for x in (padded, keys, values)]
    out: Array = _attention((head_dim, causal, interpret), *flat, allowed)
    return checkpoint_name(out.reshape(padded.shape)[:length], ATTENTION)


def _padded(x: Array, multiple: int) -> Array:
    """`x` with zeros after it, to a length that is a multiple of `multiple`."""
    return jnp.pad(x, [(0, -x.shape[0] % multiple), *[(0, 0)] * (x.ndim - 1)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, queries, keys, values, allowed):
    head_dim, causal, interpret = static
    return _call(
        partial(_forward, causal=causal),
        head_dim,
        interpret,
        [queries, keys, values, allowed],
        results=[queries],
    )[0]


def _attention_forward(static, *operands):
    return _attention(static, *operands), operands


def _attention_backward(static, operands, gradient):
    head_dim, causal, interpret = static
    queries, keys, values, allowed = operands
    gradients = _call(
        partial(_backward, causal=causal),
        head_dim,
        interpret,
        [queries, keys, values, allowed, gradient],
        results=[queries, keys, values],
        accumulators=2,
    )
    return *gradients, jnp.zeros_like(allowed)


_attention.defvjp(_attention_forward, _attention_backward)


def _call(
    kernel: Any,
    head_dim: int,
    interpret: bool,
    operands: list[Array],
    results: list[Array],
    accumulators: int = 0,
) -> Sequence[Array]:
    """Run `kernel` for every head and every block of queries, in this order.

    The first operand and the gradients of the output are cut into blocks of queries, keys and
    values are not. `results` have the shapes and dtypes of the given arrays. Accumulators are
    float32 arrays in the shape of a head's keys, which the programs of a head share.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    queries, keys, _, allowed = operands[:4]
    length, num_keys = queries.shape[0], keys.shape[0]
    some = pl.BlockSpec((QUERIES, head_dim), lambda head, block: (block, head))
    all_keys = pl.BlockSpec((num_keys, head_dim), lambda head, block: (0, head))
    row = pl.BlockSpec(allowed.shape, lambda head, block: (0, 0))
    return pl.pallas_call(
        kernel,
        grid=(queries.shape[1] // head_dim, length // QUERIES),
        in_specs=[some, all_keys, all_keys, row, some][: len(operands)],
        out_specs=[some, all_keys, all_keys][: len(results)],
        # Like an array, so that it varies over the same axes of the mesh.
        out_shape=[jax.ShapeDtypeStruct.like(x) for x in results],
        scratch_shapes=[pltpu.VMEM((num_keys, head_dim), jnp.float32)] * accumulators,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(*operands)


def _exponentials(queries, keys, allowed, causal):
    """Unnormalized weights, their sums, and whether a key counts, for (q, k) and (j, k)."""
    from jax.experimental import pallas as pl

    logits = _product(queries, keys, 1, 1) * queries.shape[1] ** -0.5
    counts = jnp.broadcast_to(allowed > 0, logits.shape)
    if causal:
        first = pl.program_id(1) * QUERIES
        rows = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        counts &= rows >= jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(counts, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True), counts


def _product(a, b, axis_a, axis_b):
    return jax.lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=matmul_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _forward(q_ref, k_ref, v_ref, allowed_ref, out_ref, *, causal):
    values = v_ref[...]
    weights, sums, _ = _exponentials(q_ref[...], k_ref[...], allowed_ref[...], causal)
    out_ref[...] = (_product(weights.astype(values.dtype), values, 1, 0) / sums).astype(
        out_ref.dtype
    )


def _backward(
    q_ref,
    k_ref,
    v_ref,
    allowed_ref,
    gradient_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dk_sum_ref,
    dv_sum_ref,
    *,
    causal,
):
    from jax.experimental import pallas as pl

    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    queries, keys, gradient = q_ref[...], k_ref[...], gradient_ref[...]
    weights, sums, counts = _exponentials(queries, keys, allowed_ref[...], causal)
    weights = weights / sums
    dv_sum_ref[...] += _product(weights.astype(gradient.dtype), gradient, 0, 0)
    by_weight = _product(gradient, v_ref[...], 1, 1)
    mean = jnp.sum(weights * by_weight, axis=1, keepdims=True)
    by_logit = jnp.where(counts, weights * (by_weight - mean), 0.0) * queries.shape[1] ** -0.5
    by_logit = by_logit.astype(keys.dtype)
    dq_ref[...] = _product(by_logit, keys, 1, 0).astype(dq_ref.dtype)
    dk_sum_ref[...] += _product(by_logit, queries, 0, 0)

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
        dk_ref[...] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)
