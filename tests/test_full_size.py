"""Both models at full size, with random weights: `python -m pytest -m full -s`."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.mark.full
@pytest.mark.parametrize("command", [["codec", "--runs", "1"], ["dit", "--runs", "1"]], ids=str)
def test_full_size_models_run_here(command):
    done = subprocess.run([sys.executable, SCRIPT, *command], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "peak memory" in done.stdout
