"""Training and sampling beside the same model in Flax and PyTorch, interleaved in one run."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import echo_eqx
from echo_eqx.config import DiTConfig, EncoderConfig
from echo_eqx.errors import EchoError
from echo_eqx.flow.sampler import sample
from echo_eqx.generation import SamplerSettings
from echo_eqx.json_data import to_json
from echo_eqx.sharding.mesh import AXES, make_mesh
from echo_eqx.train.config import ObjectiveConfig, OptimizerConfig
from echo_eqx.train.state import init_state
from echo_eqx.train.step import abstract_batch, make_train_step

Row = Literal["train", "joint", "joint_half", "independent"]
CONFIG = DiTConfig(
    latent_dim=128,
    model_dim=512,
    num_layers=12,
    num_heads=8,
    mlp_dim=1408,
    text=EncoderConfig(384, 6, 6, 1024),
    speaker=EncoderConfig(384, 6, 6, 1024),
    adaln_rank=64,
    blockwise=False,
    max_frames=256,
    max_text_bytes=128,
    max_speaker_frames=128,
)
"""80.5 M parameters."""


@dataclass(frozen=True)
class Peers:
    """Training and sampling of an 80 M model, beside the same in Flax and PyTorch.

    `train` is a step of 4 x 256 frames with AdamW in float32. `joint` are 32 Euler steps of 375
    frames with guidance at every step, `joint_half` with guidance for t >= 0.5 only, `independent`
    with separate guidance of text and reference.
    """

    rows: tuple[Row, ...] = ("train", "joint", "joint_half", "independent")
    flax: Path | None = None
    """Python of an environment with flax and optax. Without it, the training step of Flax is left
    out."""
    torch: Path | None = None
    """Python of an environment with torch and safetensors. Without it, PyTorch is left out."""
    scripts: Path = Path("tests/peers")
    """The folder with speed_flax.py and speed_torch.py, in a checkout of the sources."""
    runs: int = 3


def peers(args: Peers) -> None:
    for row in args.rows:
        peer, python = ("flax", args.flax) if row == "train" else ("torch", args.torch)
        with tempfile.TemporaryDirectory() as folder:
            sizes = Path(folder) / "sizes.json"
            sizes.write_text(json.dumps({**cast(dict, to_json(CONFIG)), **_lengths(row)}))
            runners = {"echo_eqx": _Runner([sys.executable, "-m", __name__, row])}
            if python is not None:
                runners[peer] = _Runner([python, args.scripts / f"speed_{peer}.py", sizes])
            try:
                times = {name: [] for name in runners}
                for _ in range(args.runs):
                    for name, runner in runners.items():
                        times[name].append(runner.seconds())
            finally:
                for runner in runners.values():
                    runner.close()
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        for name, seconds in times.items():
            print(
                f"{row}, {name}: median {medians[name]:.2f} s of {args.runs} runs "
                f"({min(seconds):.2f} to {max(seconds):.2f})"
            )
        if len(medians) == 2:
            ratio = medians["echo_eqx"] / medians[peer]
            print(f"{row}: {ratio:.2f} of the time of {peer}", flush=True)


def _lengths(row: Row) -> dict[str, Any]:
    if row == "train":
        return {"batch_size": 4, "frames": 256, "text_bytes": 128, "speaker_frames": 128}
    return {
        "frames": 375,
        "text_bytes": 256,
        "speaker_frames": 256,
        "steps": 32,
        "guidance": "independent" if row == "independent" else "joint",
        "cfg_min_t": 0.5 if row == "joint_half" else 0.0,
    }


class _Runner:
    """A process that says `ready`, and then runs once for each line it is sent."""

    def __init__(self, command: list[Any]):
        environment = dict(os.environ)
        if command[0] != sys.executable:
            environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._command = command
        self._read("ready")

    def seconds(self) -> float:
        stdin = cast(IO[str], self._process.stdin)
        stdin.write("\n")
        stdin.flush()
        return float(self._read("seconds"))

    def _read(self, expected: str) -> str:
        line = cast(IO[str], self._process.stdout).readline()
        if not line:
            raise EchoError(f"{self._command[1]}: expected {expected}, got the end of its output")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _training() -> Callable[[], object]:
    mesh = make_mesh(dict.fromkeys(AXES, 1))
    optimizer = OptimizerConfig()
    state = init_state(CONFIG, optimizer, mesh, 0)
    rng = np.random.default_rng(0)
    size = _lengths("train")["batch_size"]

    def leaf(abstract: jax.ShapeDtypeStruct) -> jax.Array:
        if abstract.dtype == bool:
            array = np.ones(abstract.shape, bool)
        elif jnp.issubdtype(abstract.dtype, jnp.integer):
            array = rng.integers(0, 256, abstract.shape, abstract.dtype)
        else:
            array = rng.standard_normal(abstract.shape, np.float32)
        return jax.device_put(array, abstract.sharding)

    batch = jax.tree.map(leaf, abstract_batch(mesh, size, CONFIG))
    objective = dataclasses.replace(ObjectiveConfig(), dtype="float32", grad_reduce_dtype="float32")
    step = make_train_step(mesh, state, objective, optimizer, 1000)

    def run() -> object:
        nonlocal state
        state, metrics = step(state, batch, jr.key(0))
        return metrics

    return run


def _sampling(row: Row) -> Callable[[], object]:
    lengths = _lengths(row)
    dit = jax.jit(lambda: echo_eqx.EchoDiT.init(CONFIG, key=jr.key(0)))()
    rng = np.random.default_rng(0)
    text = rng.integers(0, 256, (1, lengths["text_bytes"]), np.int32)
    speaker = rng.standard_normal((1, lengths["speaker_frames"], 128), np.float32)
    settings = SamplerSettings(
        steps=lengths["steps"],
        guidance=lengths["guidance"],
        cfg_min_t=lengths["cfg_min_t"],
        cfg_scale=3.0,
        speaker_scale=3.0,
    )
    return lambda: sample(
        dit,
        text,
        np.ones(text.shape, bool),
        speaker,
        np.ones(speaker.shape[:2], bool),
        num_frames=lengths["frames"],
        settings=settings,
        key=jr.key(0),
    )


def _answer(row: Row) -> None:
    """What a `_Runner` runs: once before `ready`, then once for each line."""
    run = _training() if row == "train" else _sampling(row)
    jax.block_until_ready(run())
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        jax.block_until_ready(run())
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    _answer(cast(Row, sys.argv[1]))
