"""Training runs in real processes: resumed, preempted, and with several processes."""

import json
import math
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_runs
from conftest import random_model
from processes import Process, xla_flags
from shards import make_dataset
from small_runs import STEPS

import echo_eqx
from echo_eqx.config import CodecConfig, WatermarkConfig


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return small_runs.shared_home(tmp_path_factory)


def start(home: Path, run: str, *more: object, devices: int = 1, folder=None) -> Process:
    settings = small_runs.settings(home, home / run)
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
    return Process(small_runs.TRAIN, *settings, *more, cwd=folder, **environment)


def finish(process: Process, code: int = 0, timeout: float = 300) -> str:
    out, err = process.communicate(timeout)
    assert process.returncode == code, f"code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out + err


def lines_of(home: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (home / run / "metrics.jsonl").read_text().splitlines()]


def losses_of(home: Path, run: str) -> dict[int, float]:
    lines = lines_of(home, run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step once"
    return {line["step"]: line["loss"] for line in lines}


def wait_for(condition, process: Process, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[1][-3000:]}")
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(home):
    return losses_of(home, small_runs.whole_run(home).name)


def test_a_run_writes_its_description(home, uninterrupted):
    folder = home / "whole"
    first, last = lines_of(home, "whole")[0], lines_of(home, "whole")[-1]
    assert first["lr"] == pytest.approx(3e-4) and last["samples_seen"] == STEPS * 8
    assert 0 <= last["data_wait_fraction"] <= 1 and last["audio_hours_per_second"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == "nano" and config["max_frames"] == 24
    assert json.loads((folder / "environment.json").read_text())[0]["packages"]["jax"]
    assert echo_eqx.load_dit(folder).config.max_frames == 24
    assert len(list((folder / "checkpoints").glob("step_*/manifest.json"))) == 3


def test_sigterm_saves_and_exits_with_code_76(home, uninterrupted):
    process = start(home, "stopped", "--log_every", "1", "--checkpoint_every", "100")
    wait_for((home / "stopped" / "metrics.jsonl").is_file, process)
    wait_for(lambda: len(lines_of(home, "stopped")) >= 2, process)
    process.terminate()
    said = finish(process, code=76)
    step = int(re.search(r"saved step (\d+)", said)[1])
    assert 2 <= step < STEPS
    finish(start(home, "stopped"))
    assert losses_of(home, "stopped") == uninterrupted


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_two(home: Path, run: str, mesh: str, *flags: str) -> list[Process]:
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", "2"]
    devices = math.prod(int(size) for size in re.findall(r"=(\d+)", mesh)) // 2
    return [
        start(home, run, *flags, "--mesh", mesh, *together, "--process_id", str(i), devices=devices)
        for i in range(2)
    ]


def assert_close(losses: dict[int, float], expected: dict[int, float]) -> None:
    assert losses.keys() == expected.keys()
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step


def test_two_processes_resume_a_run_of_one_and_stop_together(home, uninterrupted):
    # From step 6 in two processes until SIGTERM, then in one again.
    shutil.copytree(home / "whole", home / "spread")
    for path in (home / "spread" / "checkpoints").iterdir():
        if path.name.startswith(("step_000000009", "step_000000012")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    both = start_two(home, "spread", "data=2,fsdp=2,tensor=2", "--log_every", "1")
    wait_for(lambda: 6 < lines_of(home, "spread")[-1]["step"] < STEPS, both[0])
    both[1].terminate()
    said = [finish(process, code=76) for process in both]
    step = int(re.search(r"saved step (\d+)", said[0])[1])
    assert 6 < step < STEPS
    finish(start(home, "spread"))
    assert_close(losses_of(home, "spread"), uninterrupted)


def assert_death_is_reported(victim: int, both: list[Process], begun: Callable[[], bool]) -> None:
    try:
        wait_for(begun, both[0])
        both[victim].kill()
        died = time.monotonic()
        said = finish(both[1 - victim], code=75, timeout=30)
        assert f"process {victim} died" in said
        assert time.monotonic() - died < 30
    finally:
        for process in both:
            process.kill()
            process.communicate()


COLLECTIVES = """
import dataclasses, sys
from pathlib import Path
import jax
from jax.experimental import multihost_utils
from echo_eqx.train.config import TRAIN_PRESETS
from echo_eqx.train.distributed import run_training

def train(config, heartbeat):
    assert not jax.config.jax_enable_compilation_cache  # only process 0 would find its programs
    for step in range(1_000_000):
        multihost_utils.sync_global_devices(str(step))
        Path(f"step_{step}").touch()

settings = {"data": "none", "coordinator": sys.argv[1], "num_processes": 2}
settings["process_id"] = int(sys.argv[2])
run_training(dataclasses.replace(TRAIN_PRESETS["tiny"], **settings), train)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_others_report_it_and_stop(victim, tmp_path):
    script, port = tmp_path / "collectives.py", f"127.0.0.1:{free_port()}"
    script.write_text(COLLECTIVES)
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags()}
    both = [Process(script, port, i, cwd=tmp_path, **environment) for i in range(2)]
    assert_death_is_reported(victim, both, (tmp_path / "step_3").is_file)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_of_a_run_dies_the_others_report_it_and_stop(home, victim):
    run = f"widowed{victim}"
    both = start_two(home, run, "fsdp=2", "--log_every", "1")

    def begun() -> bool:
        return (home / run / "metrics.jsonl").is_file() and len(lines_of(home, run)) >= 2

    assert_death_is_reported(victim, both, begun)


def test_hosts_that_differ_are_reported(home):
    port = f"127.0.0.1:{free_port()}"
    together = ["--mesh", "fsdp=8", "--coordinator", port, "--num_processes", "2"]
    both = [
        start(home, "differ", *together, "--process_id", "0", devices=4),
        start(home, "differ", *together, "--process_id", "1", "--max_grad_norm", "2.0", devices=4),
    ]
    said = "".join(out for process in both for out in process.communicate(timeout=120))
    assert re.search(r"host \S+ \(process [01]\): expected the same settings on all hosts", said)
    assert all(process.returncode != 0 for process in both)


def test_a_run_folder_in_use_is_rejected(home, uninterrupted):
    first = start(home, "busy")
    wait_for((home / "busy" / "config.json").is_file, first)
    first.send_signal(signal.SIGSTOP)
    said = finish(start(home, "busy"), code=1)
    assert re.search(rf"error: \S+busy is in use by process {first.pid} on \S+\n", said)
    first.kill()
    first.communicate()


def test_a_run_from_the_weights_of_another_stops_after_nonfinite_losses(home, uninterrupted):
    flags = ["--learning_rate", "1e30", "--max_nonfinite", "3", "--log_every", "2"]
    said = finish(start(home, "wild", "--init_from", home / "whole", *flags), code=1)
    assert "loss or gradient was not finite in 3 consecutive steps" in said
    lines = lines_of(home, "wild")
    assert lines[0]["loss"] != uninterrupted[1]
    assert [line["updated"] for line in lines][-3:] == [False] * 3
    assert lines[-3]["param_norm"] == lines[-1]["param_norm"]
    noted = [json.loads(x) for x in (home / "wild" / "nonfinite-0.jsonl").read_text().splitlines()]
    assert [note["step"] for note in noted] == [x["step"] for x in lines if not x["updated"]]
    assert len(noted[0]["keys"]) == 8 and ".tar:" in noted[0]["keys"][0]


def test_held_out_loss_and_samples(home, tmp_path):
    watermark = WatermarkConfig(dim=2, bottleneck_dim=8)
    sizes = CodecConfig(encoder_dim=2, hidden_dim=12, decoder_dim=32, watermark=watermark)
    echo_eqx.save(random_model(echo_eqx.DACVAE, sizes, 0.12), tmp_path / "codec")
    make_dataset(tmp_path / "data", shards=2, per_shard=8, latent_dim=128, reference=(8, 20))
    np.save(tmp_path / "data" / "silence.npy", np.full((20, 128), 0.25, np.float16))
    flags = [
        "--sample_every",
        str(STEPS),
        "--codec",
        str(tmp_path / "codec"),
        "--sample_count",
        "2",
    ]
    flags += ["--data", str(tmp_path / "data"), "--eval_data", str(tmp_path / "data")]
    flags += ["--eval_every", "6", "--eval_batches", "2", "--sampler.steps", "2"]
    finish(start(home, "heard", *flags))
    lines = lines_of(home, "heard")
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [6, 12]
    assert len(evaluated[0]["eval_loss_by_time"]) == 4
    samples = home / "heard" / "samples" / "step_000000012"
    names = sorted(path.name for path in samples.iterdir())
    assert names == [
        f"{i}.{end}" for i in (0, 1) for end in ("original.wav", "ref.wav", "txt", "wav")
    ]
    assert (samples / "0.txt").read_text().startswith("This is record")


def test_a_finished_run_and_a_run_with_other_shards(home, uninterrupted):
    shutil.copytree(home / "whole", home / "again")
    said = finish(start(home, "again", "--keep_last", "1"))
    assert "nothing to do" in said and "compil" not in said
    assert losses_of(home, "again") == uninterrupted
    # As a launch would have done that was killed before it deleted them.
    left = [path.name for path in (home / "again" / "checkpoints").iterdir() if path.is_dir()]
    assert left == ["step_000000012"]
    shutil.copytree(home / "data", home / "renamed")
    (home / "renamed" / "00003.tar").rename(home / "renamed" / "00099.tar")
    said = finish(start(home, "again", "--data", str(home / "renamed")), code=1)
    assert "renamed differs from what" in said and len(said.splitlines()) == 1


def test_a_run_folder_that_hosts_do_not_share_is_rejected(home, tmp_path):
    together = ["--mesh", "fsdp=8", "--coordinator", f"127.0.0.1:{free_port()}"]
    both = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
    for i in range(2):
        flags = ["--num_processes", "2", "--process_id", str(i), "--run_dir", "relative"]
        both.append(start(home, "x", *together, *flags, devices=4, folder=tmp_path / str(i)))
    said = "".join(out for process in both for out in process.communicate(timeout=120))
    assert "expected the folder that process 0 writes to, got another" in said
    assert all(process.returncode == 1 for process in both)
