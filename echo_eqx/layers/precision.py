"""Precision of matrix products and convolutions."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

MatmulPrecision = Literal["highest", "tensorfloat32", "bfloat16"]


def matmul_precision(dtype: Any) -> str | None:
    """The precision set by `jax.default_matmul_precision`, or else full precision for float32.

    JAX's own default rounds float32 operands to TF32 on GPU and to bfloat16 on TPU. Here that is
    opt-in: `with jax.default_matmul_precision("tensorfloat32"): ...`.
    """
    if dtype != jnp.float32:
        return None
    return jax.config.jax_default_matmul_precision or "highest"  # type: ignore[attr-defined]


def set_matmul_precision(precision: MatmulPrecision) -> None:
    """Use `precision` for float32 operands in all of this process."""
    if precision != "highest":  # which holds where nothing is set
        jax.config.update("jax_default_matmul_precision", precision)
