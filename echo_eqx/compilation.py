"""JAX's persistent compilation cache: compiled programs on disk, so that processes start fast."""

import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def use_compilation_cache(folder: str | Path | None = None) -> None:
    """Cache compiled programs in `folder`, by default `echo_eqx/xla` in the user's cache folder.

    `synthesize` and every command call this without a folder. Such a call keeps a cache that is
    already configured (by `JAX_COMPILATION_CACHE_DIR`, `jax.config`, or this function), and does
    nothing if `JAX_ENABLE_COMPILATION_CACHE=false` or the default folder is not writable.
    """
    if folder is None:
        if _option("jax_compilation_cache_dir") or not _option("jax_enable_compilation_cache"):
            return
        try:
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = root / "echo_eqx" / "xla"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # RuntimeError: no HOME and no entry in passwd
            return
        if not os.access(folder, os.W_OK):
            return
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    if _option("jax_persistent_cache_min_compile_time_secs") == 1.0:  # JAX's own default
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # JAX decides at its first compilation whether there is a cache; make it decide again.
    compilation_cache.reset_cache()


def _option(name: str) -> Any:
    return getattr(jax.config, name)  # the options are not declared for type checkers
