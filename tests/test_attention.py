"""Attention is the softmax over the unmasked keys, whichever way it is computed."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from echo_eqx.model import attention
from echo_eqx.model.attention import KeyMask
from echo_eqx.model.pallas_attention import pallas_attention

QUERIES, KEYS, HEADS, HEAD_DIM = 5, 7, 3, 4
MASKS = {
    "all": np.ones(KEYS, bool),
    "prefix": np.arange(KEYS) < 4,
    "holes": np.array([1, 0, 0, 1, 1, 0, 1], bool),
    "last": np.arange(KEYS) == KEYS - 1,
}


def inputs(num_keys: int = KEYS, dtype=jnp.float32):
    keys = jr.split(jr.key(0), 4)
    lengths = (QUERIES, num_keys, num_keys, QUERIES)
    shapes = [(length, HEADS, HEAD_DIM) for length in lengths]
    return [jr.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def reference_attention(queries, keys, values, allowed):
    """In float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (queries, keys, values))
    logits = np.einsum("thk,jhk->htj", q, k) / np.sqrt(HEAD_DIM)
    logits[:, ~np.broadcast_to(allowed, (QUERIES, k.shape[0]))] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("htj,jhk->thk", weights / weights.sum(-1, keepdims=True), v)


def fused(queries, keys, values, mask, causal=False):
    """The code path of the fused kernel, computed by XLA if there is no such kernel."""
    return attention._flash_attention(queries, keys, values, mask, causal, "xla")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("attend", [attention.dot_product_attention, fused])
def test_attention_equals_the_equation(attend, name):
    queries, keys, values, _ = inputs()
    mask = KeyMask.of(jnp.asarray(MASKS[name]))
    expected = reference_attention(queries, keys, values, MASKS[name][None])
    np.testing.assert_allclose(attend(queries, keys, values, mask), expected, atol=1e-6)


@pytest.mark.parametrize("attend", [attention.dot_product_attention, fused])
def test_causal_attention_equals_the_equation(attend):
    queries, keys, values, _ = inputs(QUERIES)
    expected = reference_attention(
        queries, keys, values, np.tril(np.ones((QUERIES, QUERIES), bool))
    )
    result = attend(queries, keys, values, None, causal=True)
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("attend", [attention.dot_product_attention, fused])
def test_gradients_equal_plain_jax(attend):
    *operands, gradient = inputs()
    allowed = jnp.asarray(MASKS["holes"])

    def plain(queries, keys, values):
        logits = jnp.einsum("thk,jhk->htj", queries, keys, precision="highest") * HEAD_DIM**-0.5
        weights = jax.nn.softmax(jnp.where(allowed[None, None], logits, -jnp.inf), axis=-1)
        return jnp.einsum("htj,jhk->thk", weights, values, precision="highest")

    expected = jax.vjp(plain, *operands)[1](gradient)
    mask = KeyMask.of(allowed)
    result = jax.vjp(lambda q, k, v: attend(q, k, v, mask), *operands)[1](gradient)
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_fused_path_supports_a_mask_per_example():
    queries, keys, values, _ = inputs()
    masks = jnp.asarray(np.stack(list(MASKS.values())))
    batched = jax.vmap(lambda mask: fused(queries, keys, values, KeyMask.of(mask)))(masks)
    for result, mask in zip(batched, MASKS.values(), strict=True):
        expected = reference_attention(queries, keys, values, mask[None])
        np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("attend", [attention.dot_product_attention, fused])
def test_a_query_with_no_keys_gives_a_finite_result(attend):
    queries, keys, values, gradient = inputs()
    mask = KeyMask.of(jnp.zeros(KEYS, bool))
    result, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask), queries, keys, values)
    assert all(np.isfinite(x).all() for x in (result, *vjp(gradient)))


# Two blocks of queries, and more keys than one lane has.
LONG, LONG_KEYS = 130, 140
LONG_MASKS = {
    "all": np.ones(LONG_KEYS, bool),
    "no text": np.abs(np.arange(LONG_KEYS) - 60) > 30,
    "one key": np.arange(LONG_KEYS) == LONG_KEYS - 1,
    "none": np.zeros(LONG_KEYS, bool),
}


def long_inputs(num_keys: int, dtype):
    lengths = (LONG, num_keys, num_keys, LONG)
    keys = jr.split(jr.key(1), 4)
    shapes = [(length, HEADS, HEAD_DIM) for length in lengths]
    return [jr.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(attend, operands, gradient):
    result, vjp = jax.vjp(attend, *operands)
    return [np.asarray(x, np.float32) for x in (result, *vjp(gradient))]


def test_the_tpu_kernel_equals_plain_attention_and_its_gradients():
    *operands, gradient = long_inputs(LONG_KEYS, jnp.float32)
    masks = jnp.asarray(np.stack(list(LONG_MASKS.values())))

    def kernel(*x):
        return jax.vmap(lambda mask: pallas_attention(*x, mask, interpret=True))(masks)

    def plain(*x):
        return jax.vmap(lambda m: attention.dot_product_attention(*x, KeyMask.of(m)))(masks)

    gradients = jnp.broadcast_to(gradient, (len(masks), *gradient.shape))
    kept = gradients.at[-1].set(0.0)  # the result without keys is meaningless
    for a, b in zip(
        with_gradients(jax.jit(kernel), operands, kept),
        with_gradients(jax.jit(plain), operands, kept),
        strict=True,
    ):
        np.testing.assert_allclose(*((a[:-1], b[:-1]) if a.ndim == 4 else (a, b)), atol=2e-5)
    for a in with_gradients(jax.jit(kernel), operands, gradients):
        assert np.isfinite(a).all()


def test_the_tpu_kernel_equals_plain_causal_attention_in_bfloat16():
    *operands, gradient = long_inputs(LONG, jnp.bfloat16)

    def kernel(*x):
        return pallas_attention(*x, None, causal=True, interpret=True)

    def plain(*x):
        return attention.dot_product_attention(*x, None, causal=True)

    ours = with_gradients(jax.jit(kernel), operands, gradient)
    wide = [x.astype(jnp.float32) for x in operands]
    exact = with_gradients(jax.jit(plain), wide, gradient.astype(jnp.float32))
    for a, b in zip(ours, exact, strict=True):
        assert np.abs(a - b).max() < 0.01 * np.abs(b).max()
