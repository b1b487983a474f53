"""Metrics of a run: kept on the device until they are flushed, then written line by line."""

import contextlib
import importlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from echo_eqx.cli import on_terminal
from echo_eqx.errors import EchoError
from echo_eqx.train.flops import peak_flops

logger = logging.getLogger(__name__)


class StepMetrics(eqx.Module):
    """Metrics of one step, on the device until `MetricsLog.flush` fetches them."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    """Before clipping."""
    param_norm: Float[Array, ""]
    lr: Float[Array, ""]
    updated: Bool[Array, ""]
    """False if the update was skipped because loss or gradient was not finite."""
    skipped: Int[Array, ""]
    """Updates skipped since the start of training."""
    frames: Int[Array, ""]
    """Frames of recordings in the batch, without padding."""
    terms: dict[str, Float[Array, ""]]
    """Unweighted terms of the loss by name."""


class MetricsLog:
    """Collects the metrics of steps. Only `flush` waits for the device.

    Every process collects; only process 0 writes metrics.
    """

    def __init__(
        self,
        file: TextIO | None,
        nonfinite_log: Path,
        *,
        step_flops: float,
        batch_size: int,
        max_nonfinite: int,
        samples_seen: int,
        frame_rate: float,
        tensorboard: Any = None,
    ):
        """`frame_rate` is that of the latents, in frames per second."""
        self._file, self._nonfinite_log = file, nonfinite_log
        self._step_flops, self._batch_size = step_flops, batch_size
        self._max_nonfinite = max_nonfinite
        self._tensorboard = tensorboard
        self._frame_rate = frame_rate
        self.samples_seen = samples_seen
        self._pending: list[tuple[int, StepMetrics, list[str]]] = []
        self._extra: dict[str, Any] = {}
        self._nonfinite_in_a_row = 0
        self._started, self._waited = time.perf_counter(), 0.0

    def add(self, step: int, metrics: StepMetrics, keys: list[str]) -> None:
        self._pending.append((step, metrics, keys))
        self.samples_seen += self._batch_size

    def attach(self, values: dict[str, Any]) -> None:
        """Add values to the line of the most recent step."""
        self._extra |= values

    def flush(self, waited: float, counts: Mapping[str, int]) -> dict[str, Any]:
        """Fetch pending metrics, write a line for each step, and return the last one.

        `waited` is how long the loop has waited for data, in seconds, and `counts` how many samples
        were skipped or truncated, both since this launch.

        **Raises**: `EchoError` after `max_nonfinite` steps in a row that were not finite.
        """
        fetched = jax.device_get([metrics for _, metrics, _ in self._pending])
        lines = [
            {
                "step": step,
                "loss": float(metrics.loss),
                "grad_norm": float(metrics.grad_norm),
                "param_norm": float(metrics.param_norm),
                "lr": float(metrics.lr),
                "updated": bool(metrics.updated),
                **{name: float(value) for name, value in metrics.terms.items()},
            }
            for (step, _, _), metrics in zip(self._pending, fetched, strict=True)
        ]
        frames = sum(int(metrics.frames) for metrics in fetched)
        lines[-1] |= self._speed(len(lines), frames, waited)
        lines[-1] |= {
            "samples_seen": self.samples_seen,
            "skipped_updates": int(fetched[-1].skipped),
            **counts,
            **self._extra,
        }
        if self._file is not None:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        if self._tensorboard is not None:
            for line in lines:
                for name, value in line.items():
                    if isinstance(value, int | float):
                        self._tensorboard.add_scalar(name, value, line["step"])
        self._check_nonfinite(lines)
        self._pending, self._extra = [], {}
        return lines[-1]

    def restart_clock(self, waited: float) -> None:
        self._started, self._waited = time.perf_counter(), waited

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time spent inside out of the measured speed."""
        jax.block_until_ready([metrics for _, metrics, _ in self._pending])
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def _speed(self, steps: int, frames: int, waited: float) -> dict[str, Any]:
        seconds = time.perf_counter() - self._started
        device = jax.local_devices()[0]
        memory = device.memory_stats() or {}
        peak = peak_flops(device.device_kind)
        rate = self._step_flops * steps / seconds / jax.device_count()
        values = {
            "time": time.time(),
            "step_time_s": seconds / steps,
            "data_wait_fraction": min(1.0, (waited - self._waited) / seconds),
            "samples_per_second": steps * self._batch_size / seconds,
            "audio_hours_per_second": frames / self._frame_rate / 3600 / seconds,
            "flops_per_device": rate,
            "mfu": rate / peak if peak else None,
            "peak_memory_bytes": memory.get("peak_bytes_in_use"),
        }
        self.restart_clock(waited)
        return values

    def _check_nonfinite(self, lines: list[dict[str, Any]]) -> None:
        for line, (step, _, keys) in zip(lines, self._pending, strict=True):
            if line["updated"]:
                self._nonfinite_in_a_row = 0
                continue
            self._nonfinite_in_a_row += 1
            logger.info(f"step {step}: loss or gradient is not finite; skipped the update")
            with self._nonfinite_log.open("a") as file:
                file.write(json.dumps({"step": step, "keys": keys}) + "\n")
            if self._nonfinite_in_a_row >= self._max_nonfinite:
                raise EchoError(
                    f"loss or gradient was not finite in {self._nonfinite_in_a_row} consecutive "
                    f"steps, up to step {step}; their samples are listed in {self._nonfinite_log}"
                )


class ProgressLine:
    """A progress bar on a terminal, plain lines elsewhere; only the first host shows it."""

    def __init__(self, num_steps: int, step: int, shown: bool):
        self._shown = shown
        self._bar = None
        if shown and on_terminal():
            self._bar = tqdm(total=num_steps, initial=step, unit="step", dynamic_ncols=True)

    def show(self, step: int, line: dict[str, Any]) -> None:
        """Show the metrics of `step`."""
        if not self._shown:
            return
        parts = [f"loss {line['loss']:.4f}"]
        if "eval_loss" in line:
            parts.append(f"eval loss {line['eval_loss']:.4f}")
        parts.append(f"{line['samples_per_second']:.1f} samples/s")
        parts.append(f"data wait {line['data_wait_fraction']:.0%}")
        if line["mfu"] is not None:
            parts.append(f"MFU {line['mfu']:.1%}")
        if self._bar is None:
            print(f"step {step}: {', '.join(parts)}", flush=True)
            return
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def tensorboard_writer(run_dir: Path) -> Any:
    try:
        writer = importlib.import_module("tensorboardX").SummaryWriter
    except ImportError:
        raise EchoError(
            "--tensorboard needs tensorboardX, which is not installed: "
            "pip install 'echo_eqx[tensorboard]'"
        ) from None
    return writer(str(run_dir / "tensorboard"))
