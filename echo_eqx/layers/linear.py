"""Linear maps and embeddings, computed in the dtype of the input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Int8, PRNGKeyArray

from echo_eqx.layers.parallel import psum_tensor
from echo_eqx.layers.precision import matmul_precision

INIT_STD = 0.02


class Linear(eqx.Module):
    """`x @ weight + bias`, with weight and bias cast to the dtype of `x`.

    Matrix products have the full precision of that dtype, float32 included, unless
    `jax.default_matmul_precision` says otherwise.

    With an int8 `weight` it is `(x @ weight) * scale + bias`: see `echo_eqx.model.int8`.
    """

    weight: Float[Array, "i o"] | Int8[Array, "i o"]
    bias: Float[Array, " o"] | None
    scale: Float[Array, " o"] | None = None

    @classmethod
    def init(
        cls, in_dim: int, out_dim: int, *, bias: bool = False, zero: bool = False, key: PRNGKeyArray
    ) -> "Linear":
        """Kernel: truncated normal, std 0.02, cut at 2 sigma, or zero; bias: zero."""
        shape = (in_dim, out_dim)
        weight = jnp.zeros(shape) if zero else INIT_STD * jr.truncated_normal(key, -2.0, 2.0, shape)
        return cls(weight, jnp.zeros(out_dim) if bias else None)

    def __call__(
        self, x: Float[Array, "*n i"], *, row_parallel: bool = False
    ) -> Float[Array, "*n o"]:
        """`row_parallel`: under tensor parallelism `x` and the rows of `weight` are shards, so the
        product is summed over the devices."""
        y = jnp.matmul(x, self.weight.astype(x.dtype), precision=matmul_precision(x.dtype))
        if row_parallel:
            y = psum_tensor(y)
        if self.scale is not None:
            y = (y.astype(jnp.float32) * jnp.broadcast_to(self.scale, y.shape)).astype(x.dtype)
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias.astype(y.dtype), y.shape)


class Embedding(eqx.Module):
    """One row per token id; ids out of range are clipped."""

    weight: Float[Array, "v d"]

    @classmethod
    def init(cls, vocab_size: int, dim: int, *, key: PRNGKeyArray) -> "Embedding":
        return cls(INIT_STD * jr.truncated_normal(key, -2.0, 2.0, (vocab_size, dim)))

    def __call__(self, ids: Int[Array, " s"]) -> Float[Array, "s d"]:
        # A product with one-hot rows picks rows exactly, and its gradient is a product too. The
        # gradient of a gather is a scatter: slow on TPU, and not deterministic on GPU.
        rows = self.weight.shape[0]
        one_hot = jax.nn.one_hot(jnp.clip(ids, 0, rows - 1), rows, dtype=self.weight.dtype)
        return jnp.matmul(one_hot, self.weight, precision=jax.lax.Precision.HIGHEST)
