"""The environments of other runtimes, each in a folder of its own: `python -m venv FOLDER`."""

import os
import subprocess
from pathlib import Path

import pytest

HOME = Path(os.environ.get("ECHO_PEERS", "/tmp"))
"""The folder with `venv-NAME`, an environment for each peer."""


def python_of(name: str, *packages: str) -> Path:
    """The Python of an environment; the test is skipped if it or a package of it is missing."""
    folder = HOME / f"venv-{name}"
    python = folder / "bin" / "python"
    found = python.is_file() and subprocess.run(
        [python, "-c", f"import {', '.join(packages)}"], capture_output=True
    )
    if not found or found.returncode:
        wanted = " ".join(packages)
        pytest.skip(f"needs python -m venv {folder} && {python.parent}/pip install {wanted}")
    return python


def run(python: Path, script: Path, *words: object) -> str:
    """What a script prints in that environment, which sees nothing of this one."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, script, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
