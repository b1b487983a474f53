"""SwiGLU (Shazeer, 2020, arXiv:2002.05202)."""

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.layers.linear import Linear


class SwiGLU(eqx.Module):
    """`w2(silu(w1 x) * w3 x)`."""

    w1: Linear
    w2: Linear
    w3: Linear

    @classmethod
    def init(cls, dim: int, mlp_dim: int, *, key: PRNGKeyArray) -> "SwiGLU":
        key1, key2, key3 = jr.split(key, 3)
        return cls(
            w1=Linear.init(dim, mlp_dim, key=key1),
            w2=Linear.init(mlp_dim, dim, key=key2),
            w3=Linear.init(dim, mlp_dim, key=key3),
        )

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        return self.w2(jax.nn.silu(self.w1(x)) * self.w3(x), row_parallel=True)
