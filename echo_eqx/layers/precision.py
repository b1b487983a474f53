"""Precision of matrix products and convolutions."""

from typing import Any

import jax
import jax.numpy as jnp


def matmul_precision(dtype: Any) -> str | None:
    """What `jax.default_matmul_precision` asks for; float32 products are exact by default.

    JAX by itself rounds float32 operands to TF32 on GPU and to bfloat16 on TPU. Here that has to be
    asked for: `with jax.default_matmul_precision("tensorfloat32"): ...`.
    """
    if dtype != jnp.float32:
        return None
    return jax.config.jax_default_matmul_precision or "highest"  # type: ignore[attr-defined]
