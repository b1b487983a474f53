"""What a run reports: kept on the device until a look at it, then written line by line."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int

from echo_eqx.errors import EchoError
from echo_eqx.train.flops import peak_flops
from echo_eqx.train.run_folder import MetricsFile

logger = logging.getLogger(__name__)

FRAMES_PER_HOUR = 25 * 3600
"""Of latents, at the 25 a second of the published codec."""


class StepMetrics(eqx.Module):
    """What a step reports; it stays on the device until someone asks."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    """Before clipping."""
    param_norm: Float[Array, ""]
    lr: Float[Array, ""]
    updated: Bool[Array, ""]
    """False where loss or gradient was not finite and nothing changed."""
    skipped: Int[Array, ""]
    """Updates skipped since the beginning."""
    frames: Int[Array, ""]
    """Frames of recordings in the batch."""
    terms: dict[str, Float[Array, ""]]
    """Parts of the loss by name, before they are weighted."""


class MetricsLog:
    """Collects what steps report. Only `flush` waits for the device.

    Every process counts; process 0 writes.
    """

    def __init__(
        self,
        file: MetricsFile | None,
        nonfinite_log: Path,
        *,
        step_flops: float,
        batch_size: int,
        max_nonfinite: int,
        samples_seen: int,
        frame_rate: float,
        tensorboard: Any = None,
    ):
        """`frame_rate` is that of the latents, in frames a second."""
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
        """Values for the line of the last step."""
        self._extra |= values

    def flush(self, waited: float, counts: Mapping[str, int]) -> dict[str, Any]:
        """Fetch what is pending, write a line for each step, and return the last one.

        `waited` is how long the loop has waited for data, `counts` what the data's reader has
        skipped or cut, both since this start.

        **Raises**: `EchoError` after too many steps in a row that were not finite.
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
            self._file.write(lines)
        if self._tensorboard is not None:
            for line in lines:
                for name, value in line.items():
                    if isinstance(value, int | float):
                        self._tensorboard.add_scalar(name, value, line["step"])
        self._watch_nonfinite(lines)
        self._pending, self._extra = [], {}
        return lines[-1]

    def restart_clock(self, waited: float) -> None:
        self._started, self._waited = time.perf_counter(), waited

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens within is no part of the speed of training."""
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

    def _watch_nonfinite(self, lines: list[dict[str, Any]]) -> None:
        for line, (step, _, keys) in zip(lines, self._pending, strict=True):
            if line["updated"]:
                self._nonfinite_in_a_row = 0
                continue
            self._nonfinite_in_a_row += 1
            logger.info(f"step {step}: loss or gradient is not finite; the update is skipped")
            with self._nonfinite_log.open("a") as file:
                file.write(json.dumps({"step": step, "keys": keys}) + "\n")
            if self._nonfinite_in_a_row >= self._max_nonfinite:
                raise EchoError(
                    f"{self._nonfinite_in_a_row} steps in a row had a loss or gradient that is not "
                    f"finite, up to step {step}; their samples are in {self._nonfinite_log}"
                )
