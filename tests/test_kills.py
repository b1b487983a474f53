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
import small_runs
import soundfile as sf
from conftest import GOLDEN
from processes import SCRIPTS, Process, flags
from small_runs import STEPS


def start(command: list[object]) -> Process:
    return Process(*command, **small_runs.ENVIRONMENT)


def finished(process: Process) -> bool:
    """Wait for the process to end; returns whether it finished before it was killed."""
    said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said[1][-3000:]
    return process.returncode == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "shared").symlink_to(small_runs.shared_home(tmp_path_factory))
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
    return [small_runs.TRAIN, *small_runs.settings((home / "shared").resolve(), run)]


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


def prepared_whole(home: Path) -> Path:
    output = home / "prepared"
    if not output.exists():
        assert finished(start(prepare(home, output)))
    return output


def trained_whole(home: Path) -> Path:
    return small_runs.whole_run((home / "shared").resolve())


JOBS = {
    "train": (train, trained_whole, trained),
    "prepare": (prepare, prepared_whole, prepared),
}


def seconds_of_writing(folder: Path) -> float:
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return max(times) - min(times)


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
    command, make_whole, result = JOBS[job]
    rng = random.Random(f"{seed} {job}")
    whole = make_whole(home)
    seconds = seconds_of_writing(whole)
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
