"""Imports only go down the layers of the package, and importing it is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import echo_eqx

PACKAGE = Path(echo_eqx.__file__).parent
LAYERS = [
    {
        "errors",
        "hub",
        "upload",
        "files",
        "json_data",
        "config",
        "trees",
        "generation",
        "compilation",
    },
    {"layers"},
    {"model", "codec", "data", "sharding"},
    {"flow"},
    {"weights"},
    {"speech"},
    {"cli"},
    {"serve"},
    {"prepare", "voice", "export"},
    {"train"},
    {"ops"},
    {"__init__"},
    {"commands"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LOWEST_LAYER_ORDER = [
    "errors",
    "hub",
    "upload",
    "files",
    "json_data",
    "config",
    "trees",
    "generation",
    "compilation",
]


def imported(path: Path) -> set[str]:
    """Top-level modules and subpackages of this package that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("echo_eqx.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imported(path) - {own}:
        if LEVEL[other] == LEVEL[own] == 0:
            assert LOWEST_LAYER_ORDER.index(other) < LOWEST_LAYER_ORDER.index(own)
        else:
            assert LEVEL[other] < LEVEL[own], f"{path} imports from {other}"


def test_every_module_and_subpackage_has_a_layer():
    names = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name[0] != "."}
    assert names - {"__pycache__", "py.typed"} == set(LEVEL)


def test_import_is_light_and_has_no_side_effects():
    """No device is initialized; umask, logging, environment, signals and JAX's settings do not
    change; neither other frameworks nor modules that only some uses need are imported."""
    script = """
import logging, os, signal, sys, warnings
import jax, equinox  # these have side effects of their own

def state():
    umask = os.umask(0)
    os.umask(umask)
    loggers = [logging.root, logging.getLogger("echo_eqx"), logging.getLogger("jax")]
    return {
        "umask": umask,
        "logging": [(logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers],
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "jax": dict(jax.config.values),
        "warnings": warnings.filters[:],
        "output": (sys.stdout, sys.stderr, sys.excepthook),
        "folder": os.getcwd(),
    }

before = state()
import echo_eqx
after = state()
print([name for name in before if before[name] != after[name]])
heavy = "torch tensorflow flax haiku orbax optax tyro scipy num2words psutil huggingface_hub.hf_api"
print(sorted(set(heavy.split()) & set(sys.modules)))
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split("\n") == ["[]", "[]", "False", ""], done.stdout + done.stderr


def test_public_names_are_documented():
    for name in echo_eqx.__all__:
        value = getattr(echo_eqx, name)
        assert f"`{name}`" in echo_eqx.__doc__, name
        if callable(value):
            assert value.__doc__ and len(value.__doc__) > 20, name
