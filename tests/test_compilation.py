"""The compilation cache: on by default, untouched at import, never against the user's settings."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, jax
import echo_eqx
directory = lambda: str(jax.config.jax_compilation_cache_dir)
before = directory()
jax.jit(lambda x: x + 1)(1.0)  # by now JAX has decided that there is no cache
echo_eqx.use_compilation_cache(*sys.argv[1:])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 3 + 2)(1.0)
print(before, directory(), sep="|")
"""


def cache_in(home, *arguments: str, **environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(home / "cache"),
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.strip().split("|")
    return before, after


def test_the_default_cache_is_in_the_users_cache_folder(tmp_path):
    before, after = cache_in(tmp_path)
    folder = tmp_path / "cache" / "echo_eqx" / "xla"
    assert before == "None" and after == str(folder) and any(folder.iterdir())


@pytest.mark.parametrize("name", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_the_users_configuration_is_kept(tmp_path, name):
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    own |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    before, after = cache_in(tmp_path, **{name: own[name]})
    assert before == after and not (tmp_path / "cache").exists()
