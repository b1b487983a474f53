"""Killed at random moments and started again, training and preparation end with the same bits.

Moments are drawn from when a start first writes something to as long after as a whole run takes,
and one in four also from before that. The seed of the moments is printed; ECHO_KILL_SEED repeats
them. A parent imports everything once and forks, so that a start costs little.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from conftest import GOLDEN
from shards import make_dataset

TESTS = Path(__file__).parent
TRAIN = TESTS / "small_train.py"
PREPARE = TESTS.parent / "scripts" / "prepare.py"
STEPS = 12
PARENT = """
import json, os, runpy, sys
import echo_eqx, echo_eqx.train.train_dit, echo_eqx.prepare.encode, echo_eqx.prepare.write, tyro
for line in sys.stdin:
    log, *command = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        sys.argv, code = command, 1
        try:
            runpy.run_path(command[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Starter:
    """Starts commands in processes that are forks of one with everything imported."""

    def __init__(self, folder: Path):
        self.log = folder / "log"
        self._parent = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
                ),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_backend_optimization_level=0",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
        )

    def start(self, command: list[str]) -> int:
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps([str(self.log), *command]) + "\n")
        self._parent.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """Status of the process that was started."""
        status = self._answer()
        assert status in (0, signal.SIGKILL), self.log.read_text()[-3000:]
        return status

    def _answer(self) -> int:
        assert self._parent.stdout is not None
        return int(self._parent.stdout.readline())

    def close(self) -> None:
        self._parent.communicate()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    make_dataset(folder / "data", shards=4, per_shard=8, latent_dim=128, frames=(3, 24))
    np.save(folder / "data" / "silence.npy", np.full((20, 128), 0.25, np.float16))
    for i in range(12):
        path = folder / "recordings" / f"voice{i % 2}" / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        t = np.arange(int(16_000 * (0.3 + 0.05 * i))) / 16_000
        sf.write(path, 0.2 * np.sin(2 * np.pi * (150 + 20 * i) * t), 16_000)
        path.with_suffix(".txt").write_text(f"Tone number {i}.")
    return folder


@pytest.fixture(scope="module")
def starter(home) -> Iterator[Starter]:
    starter = Starter(home)
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def seed() -> int:
    return int(os.environ.get("ECHO_KILL_SEED") or random.SystemRandom().randrange(10**6))


def train(home: Path, run: Path) -> list[str]:
    lengths = [
        "--max_frames",
        "24",
        "--max_text_bytes",
        "32",
        "--max_speaker_frames",
        "16",
        "--batch_size",
        "4",
    ]
    where = ["--data", str(home / "data"), "--run_dir", str(run)]
    steps = ["--num_steps", str(STEPS), "--checkpoint_every", "2", "--log_every", "1"]
    return [str(TRAIN), "--model", "nano", *where, *lengths, *steps, "--ema_decay", "0.9"]


def trained(run: Path) -> dict[str, Any]:
    """What a run came to: every loss, and the bits of its last checkpoint."""
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


def prepare(home: Path, output: Path) -> list[str]:
    where = ["--input", str(home / "recordings"), "--output", str(output)]
    codec = ["--codec", str(GOLDEN / "dacvae_tiny" / "weights.pth")]
    return [str(PREPARE), *where, *codec, "--shard_samples", "3"]


def prepared(output: Path) -> dict[str, bytes]:
    """All that a preparation leaves, but for what has a mark of its own in it."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.suffix != ".html"}


JOBS = {"train": (train, trained), "prepare": (prepare, prepared)}


def traces(folder: Path) -> int:
    """Grows while something is written below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += 1 + path.lstat().st_size
    return total


def wait_for_traces(folder: Path, before: int, child: int) -> None:
    """Until something is written below a folder, or the child has ended."""
    deadline = time.monotonic() + 120
    with contextlib.suppress(ProcessLookupError):
        while traces(folder) == before:
            assert time.monotonic() < deadline, f"nothing new in {folder}"
            time.sleep(0.002)
            os.kill(child, 0)


def killed(job: str, count: int, home: Path, starter: Starter, seed: int) -> list[str]:
    """Kill a job `count` times and compare each result; returns when the kills came."""
    command, result = JOBS[job]
    rng = random.Random(f"{seed} {job}")
    whole = home / f"{job}-{count}-whole"
    child = starter.start(command(home, whole))
    wait_for_traces(whole, 0, child)
    begun = time.monotonic()
    assert starter.wait() == 0
    seconds = time.monotonic() - begun
    expected, moments, number = result(whole), [], 0
    while len(moments) < count:
        folder = home / f"{job}-{count}-{number}"
        begun, before = time.monotonic(), traces(folder)
        child = starter.start(command(home, folder))
        if rng.random() < 3 / 4:  # else before anything is written
            wait_for_traces(folder, before, child)
        delay = rng.uniform(0, seconds)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        if starter.wait() == 0:  # it was quicker, as the first run had to compile
            seconds = max(delay, 0.1)
            assert result(folder) == expected, f"seed {seed}, {moments}"
            number += 1
        else:
            moments.append(f"{time.monotonic() - begun:.2f}")
    starter.start(command(home, folder))
    assert starter.wait() == 0
    assert result(folder) == expected, f"seed {seed}, {moments}"
    return moments


@pytest.mark.parametrize("job, count", [("train", 4), ("prepare", 2)])
def test_killed_at_random_moments_the_result_has_the_same_bits(job, count, home, starter, seed):
    moments = killed(job, count, home, starter, seed)
    print(f"{job}: seed {seed}, killed after {', '.join(moments)} s")


@pytest.mark.slow
@pytest.mark.parametrize("job, count", [("train", 38), ("prepare", 12)])
def test_killed_fifty_times_the_result_has_the_same_bits(job, count, home, starter, seed):
    moments = killed(job, count, home, starter, seed)
    print(f"{job}: seed {seed}, killed after {', '.join(moments)} s")
