"""Runs of `train` with the preset `nano`, all with the same settings: one compiles for all."""

from pathlib import Path

import numpy as np
from conftest import shared_folder
from processes import flags, run, xla_flags
from shards import make_dataset
from speech_server import locked

TRAIN = Path(__file__).parent / "small_train.py"
STEPS = 12
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags()}


def shared_home(tmp_path_factory) -> Path:
    """A folder with shards, for all workers of a test run."""
    home = shared_folder(tmp_path_factory) / "train"
    with locked(home.with_suffix(".lock")):
        if not (home / "data" / "silence.npy").exists():
            make_dataset(home / "data", shards=8, per_shard=8, latent_dim=128, frames=(3, 40))
            np.save(home / "data" / "silence.npy", np.full((20, 128), 0.25, np.float16))
    return home


def settings(home: Path, run_dir: Path) -> list[str]:
    return flags(
        model="nano",
        data=home / "data",
        max_frames=24,
        max_text_bytes=32,
        max_speaker_frames=16,
        batch_size=8,
        run_dir=run_dir,
        num_steps=STEPS,
        checkpoint_every=3,
        learning_rate=3e-4,
        ema_decay=0.9,
    )


def whole_run(home: Path) -> Path:
    """The folder of a run that nothing interrupted, for all workers."""
    run_dir = home / "whole"
    with locked(home / "whole.lock"):
        if not run_dir.exists():
            done = run(TRAIN, *settings(home, run_dir), **ENVIRONMENT)
            assert done.returncode == 0, done.stderr[-3000:]
    return run_dir
