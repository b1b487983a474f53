"""PyTorch loads our export strictly and computes the same velocities."""

from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, max_difference
from peers.environments import python_of, run
from processes import call
from test_dit import batched, inputs_of

import echo_eqx

SCRIPT = Path(__file__).parent / "peers" / "echo_dit_torch.py"
SOURCES = {
    "flax": (GOLDEN / "dit_tiny" / "weights_only.pkl", GOLDEN / "dit_tiny" / "cases.npz"),
    "blockwise": (GOLDEN / "blockwise" / "weights.safetensors", GOLDEN / "blockwise" / "cases.npz"),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", [*SOURCES, "voice"])
def test_velocity_of_pytorch_equals_ours(tmp_path, name):
    python = python_of("torch", "torch", "numpy", "safetensors")
    source, cases = SOURCES.get(name, ("voice", tmp_path / "cases.npz"))
    if name == "voice":
        rng = np.random.default_rng(0)
        np.savez(
            cases,
            x=rng.standard_normal((2, 11, 32), np.float32),
            t=np.array([0.3, 0.9], np.float32),
            text_ids=rng.integers(0, 256, (2, 20), np.int32),
            text_mask=np.arange(20) < [[20], [9]],
            speaker_latents=rng.standard_normal((2, 12, 32), np.float32),
            speaker_mask=np.arange(12) < [[12], [8]],
        )
    folder = tmp_path / "export"
    done = call("export", source, "--to", "pytorch", "--output", folder)
    assert done.returncode == 0, done.stderr
    run(python, SCRIPT, folder, cases, tmp_path / "velocity.npy")
    theirs, arrays = np.load(tmp_path / "velocity.npy"), np.load(cases)
    if "velocity" in arrays:
        assert max_difference(theirs, arrays["velocity"]) < 1e-4
    ours = batched(echo_eqx.load_dit(source), *inputs_of(arrays))
    difference = max_difference(theirs, ours)
    print(f"{name}: largest difference {difference:.1e}, largest value {np.abs(ours).max():.1f}")
    assert difference < 1e-4
