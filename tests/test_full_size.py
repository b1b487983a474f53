"""Both models at full size with random weights: `python -m pytest -m full -s`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.mark.full
def test_the_codec_processes_ten_minutes(golden_codec):
    audio = 0.1 * np.random.default_rng(0).standard_normal(600 * 48_000).astype(np.float32)
    mean, _ = golden_codec.encode(audio)
    assert mean.shape == (15_000, 12) and np.isfinite(mean).all()
    again = golden_codec.decode(mean, np.ones(16, np.int32))
    assert again.shape == audio.shape and np.isfinite(again).all()


@pytest.mark.full
@pytest.mark.parametrize("command", [["codec", "--runs", "1"], ["dit", "--runs", "1"]], ids=str)
def test_full_size_models_run(command):
    done = subprocess.run([sys.executable, SCRIPT, *command], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "peak memory" in done.stdout
