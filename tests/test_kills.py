"""Training and preparation that are killed at random moments and restarted end with the same bits.

Three in four kills come after a launch has first written something, within the time that a whole
run takes; the others may also come before. The seed is printed; ECHO_KILL_SEED repeats a test.
"""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from conftest import GOLDEN
from processes import SCRIPTS, Process, flags, xla_flags
from shards import make_dataset

TRAIN = Path(__file__).parent / "small_train.py"
STEPS = 12


def start(command: list[object]) -> Process:
    return Process(*command, JAX_PLATFORMS="cpu", XLA_FLAGS=xla_flags())


def finished(process: Process) -> bool:
    """Wait for the process to end; returns whether it finished before it was killed."""
    said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said[1][-3000:]
    return process.returncode == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    make_dataset(folder / "data", shards=4, per_shard=8, latent_dim=128, frames=(3, 24))
    np.save(folder / "data" / "silence.npy", np.full((20, 128), 0.25, np.float16))
    for i in range(6):
        path = folder / "recordings" / f"voice{i % 2}" / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        t = np.arange(int(16_000 * (0.3 + 0.05 * i))) / 16_000
        sf.write(path, 0.2 * np.sin(2 * np.pi * (150 + 20 * i) * t), 16_000)
        path.with_suffix(".txt").write_text(f"Tone number {i}.")
    return folder


@pytest.fixture(scope="module")
def seed() -> int:
    return int(os.environ.get("ECHO_KILL_SEED") or random.SystemRandom().randrange(10**6))


def train(home: Path, run: Path) -> list[object]:
    settings = flags(
        model="nano",
        data=home / "data",
        run_dir=run,
        max_frames=24,
        max_text_bytes=32,
        max_speaker_frames=16,
        batch_size=4,
        num_steps=STEPS,
        checkpoint_every=2,
        log_every=1,
        ema_decay=0.9,
    )
    return [TRAIN, *settings]


def trained(run: Path) -> dict[str, Any]:
    """The result of a run: every loss, and the bits of its last checkpoint."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "each step once"
    checkpoints = run / "checkpoints"
    kept = sorted(path.name for path in checkpoints.iterdir())
    last = checkpoints / f"step_{STEPS:09d}"
    manifest = json.loads((last / "manifest.json").read_text())
    crcs = {
        name: [(piece["box"], piece["crc32"]) for piece in tensor["pieces"]]
        for name, tensor in manifest["tensors"].items()
    }
    return {
        "losses": [line["loss"] for line in lines],
        "kept": kept,
        "tensors": crcs,
        "cursor": manifest["cursor"],
        "export": last.with_suffix(".safetensors").read_bytes(),
    }


def prepare(home: Path, output: Path) -> list[object]:
    codec = GOLDEN / "dacvae_tiny" / "weights.pth"
    source = home / "recordings"
    settings = flags(input=source, output=output, codec=codec, shard_samples=2)
    return [SCRIPTS / "prepare.py", *settings]


def prepared(output: Path) -> dict[str, bytes]:
    """Everything that a preparation leaves, except what differs by launch."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.suffix != ".html"}


JOBS = {"train": (train, trained), "prepare": (prepare, prepared)}


def traces(folder: Path) -> int:
    """A number that grows while something is written below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += 1 + path.lstat().st_size
    return total


def wait_for_traces(folder: Path, before: int, process: Process) -> None:
    """Wait until something is written below a folder, or the process has ended."""
    deadline = time.monotonic() + 120
    while traces(folder) == before and process.poll() is None:
        assert time.monotonic() < deadline, f"nothing new in {folder}"
        time.sleep(0.02)


def killed(job: str, count: int, home: Path, seed: int) -> list[str]:
    """Kill a job `count` times and compare each result; returns when the kills came."""
    command, result = JOBS[job]
    rng = random.Random(f"{seed} {job}")
    whole = home / f"{job}-{count}-whole"
    process = start(command(home, whole))
    wait_for_traces(whole, 0, process)
    begun = time.monotonic()
    assert finished(process)
    seconds = time.monotonic() - begun
    expected, moments, number = result(whole), [], 0
    while len(moments) < count:
        folder = home / f"{job}-{count}-{number}"
        begun, before = time.monotonic(), traces(folder)
        process = start(command(home, folder))
        if rng.random() < 3 / 4:  # else before anything is written
            wait_for_traces(folder, before, process)
        delay = rng.uniform(0, seconds)
        time.sleep(delay)
        process.kill()
        if finished(process):  # it was quicker, as the first run had to compile
            seconds = max(delay, 0.1)
            assert result(folder) == expected, f"seed {seed}, {moments}"
            number += 1
        else:
            moments.append(f"{time.monotonic() - begun:.2f}")
    assert finished(start(command(home, folder)))
    assert result(folder) == expected, f"seed {seed}, {moments}"
    return moments


@pytest.mark.parametrize("job, count", [("train", 1), ("prepare", 1)])
def test_runs_killed_at_random_moments_end_with_the_same_bits(job, count, home, seed):
    moments = killed(job, count, home, seed)
    print(f"{job}: seed {seed}, killed after {', '.join(moments)} s")


@pytest.mark.slow
@pytest.mark.parametrize("job, count", [("train", 38), ("prepare", 12)])
def test_runs_killed_fifty_times_end_with_the_same_bits(job, count, home, seed):
    moments = killed(job, count, home, seed)
    print(f"{job}: seed {seed}, killed after {', '.join(moments)} s")
