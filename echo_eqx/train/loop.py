"""The loop of a training run, from its first batch to its last checkpoint."""

import contextlib
import importlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.random as jr
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from echo_eqx.cli import on_terminal
from echo_eqx.config import CodecConfig, DiTConfig
from echo_eqx.config import to_json as sizes_to_json
from echo_eqx.data.record_log import describe
from echo_eqx.errors import EchoError
from echo_eqx.generation import GenerationConfig, generation_to_json
from echo_eqx.sharding.hosts import EXIT_PREEMPTED, Heartbeat, check_agreement, code_digest
from echo_eqx.sharding.mesh import replicated
from echo_eqx.train.device_loader import DeviceLoader
from echo_eqx.train.metrics import MetricsLog
from echo_eqx.train.plan import check_memory
from echo_eqx.train.restore import newest_restorable
from echo_eqx.train.run_folder import MetricsFile, RunFolder, note_end
from echo_eqx.train.settings import RunConfig, to_json
from echo_eqx.weights.checkpoint.reader import TrainingCheckpoint
from echo_eqx.weights.checkpoint.writer import (
    CheckpointWriter,
    Retention,
    State,
    make_missing_export,
    remove_leftovers,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What one kind of training brings to the loop."""

    config: RunConfig
    mesh: Mesh
    sizes: DiTConfig | CodecConfig
    data: dict[str, Any]
    """What a checkpoint says of the data, so that no other run goes on from it."""
    state: State
    """A state with `step` among its fields."""
    samples_seen: int
    compiled: Callable[..., Any]
    """`(state, batch, key) -> (state, metrics)`, from `compile_step`."""
    step_flops: float
    frame_rate: float
    """Latent frames a second."""
    loader: DeviceLoader
    evaluate: Callable[[Any], dict[str, Any]] | None
    """Figures of the held-out data for a state."""
    speak: Callable[[Any, int], None] | None
    """Writes samples of a state and step."""
    generation: GenerationConfig | None = None
    """How to speak with the weights of an EchoDiT."""


@contextlib.contextmanager
def run_folder(
    config: RunConfig, data_digest: str
) -> Iterator[tuple[RunFolder, str, TrainingCheckpoint | None]]:
    """The locked folder of a run, the launch_id of this start, and the checkpoint to go on from.

    **Raises**: `EchoError` if the hosts do not agree on what they are about to do.
    """
    launch_id = check_agreement(_facts(config, data_digest))
    with RunFolder(config.run_dir, writes=jax.process_index() == 0) as folder:
        folder.check_shared(launch_id)
        yield folder, launch_id, newest_restorable(config.run_dir)


def claim(folder: RunFolder, config: RunConfig, checkpoint: TrainingCheckpoint | None) -> None:
    """Make the folder this run's, once nothing can be refused any more."""
    if jax.process_index() == 0:
        remove_leftovers(config.run_dir, checkpoint)
        if checkpoint is not None and config.export:
            make_missing_export(checkpoint)
        folder.describe(config)
    multihost_utils.sync_global_devices("ready")


def compile_step(lower: Callable[[], jax.stages.Lowered]) -> Any:
    """The step that `lower` makes from shapes alone, compiled; says how long both took, and warns
    if it takes too much memory.

    A compiled step takes batches of these shapes and no others: it says what differs, and cannot
    compile a second time behind one's back.
    """
    started = time.perf_counter()
    if jax.process_index() == 0:
        logger.info("compiling the step")
    compiled = lower().compile()
    if jax.process_index() == 0:
        logger.info(f"compiled the step in {time.perf_counter() - started:.1f} s")
        if warning := check_memory(compiled.memory_analysis(), jax.local_devices()[0]):
            logger.warning(warning)
    return compiled


def run_steps(run: Run, launch_id: str, heartbeat: Heartbeat) -> int:
    """Train until `num_steps`, or until asked to stop; returns the exit code."""
    config, loader, state = run.config, run.loader, run.state
    first = jax.process_index() == 0
    step = int(state.step)  # type: ignore[attr-defined]
    if first and step:
        logger.info(f"going on after step {step}")
    writer = CheckpointWriter(
        config.run_dir,
        launch_id=launch_id,
        process=jax.process_index(),
        num_processes=jax.process_count(),
        retention=Retention(config.keep_last, config.keep_every),
        export=config.export,
    )
    log = MetricsLog(
        MetricsFile(config.run_dir / "metrics.jsonl", step) if first else None,
        config.run_dir / f"nonfinite-{jax.process_index()}.jsonl",
        step_flops=run.step_flops,
        batch_size=config.batch_size,
        max_nonfinite=config.max_nonfinite,
        samples_seen=run.samples_seen,
        frame_rate=run.frame_rate,
        tensorboard=_tensorboard(config) if first and config.tensorboard else None,
    )
    key = jax.jit(lambda: jr.key(config.seed + 1), out_shardings=replicated(run.mesh))()
    stop = _StopSignal()
    line = _ProgressLine(config.num_steps, step, first)

    def save(state: State, cursor: dict[str, list[int]]) -> None:
        manifest = {
            "step": step,
            "samples_seen": log.samples_seen,
            "model_kind": "dit" if isinstance(run.sizes, DiTConfig) else "codec",
            "model": sizes_to_json(run.sizes),
            "settings": to_json(config),
            "mesh": dict(run.mesh.shape),
            "processes": jax.process_count(),
            "seed": config.seed,
            "key": jr.key_data(jr.key(config.seed + 1)).tolist(),
            "data": run.data,
        }
        if run.generation is not None:
            manifest["generation"] = generation_to_json(run.generation)
        writer.save(state, manifest, cursor)

    def tell_first() -> None:
        for sentence in loader.news():
            logger.warning(sentence)

    try:
        device_batch = loader.next() if step < config.num_steps else None
        tell_first()
        # From here processes meet in every step, and for the first time wait for only 30 s.
        multihost_utils.sync_global_devices("begin")
        log.restart_clock(loader.waited)
        while device_batch is not None:
            with jax.transfer_guard_device_to_host("disallow"):  # nothing here waits for it
                state, metrics = run.compiled(state, device_batch.batch, key)
                step += 1
                log.add(step, metrics, device_batch.keys)
            writer.poll()

            last = step == config.num_steps
            stopping = stop.requested(step)
            saving = step % config.checkpoint_every == 0 or last or stopping
            evaluating = run.evaluate is not None and (step % config.eval_every == 0 or last)
            sampling = run.speak is not None and (step % config.sample_every == 0 or last)
            if run.evaluate is not None and evaluating:
                with log.aside():
                    log.attach(run.evaluate(state))
            if step % config.log_every == 0 or evaluating or sampling or saving:
                line.show(step, log.flush(loader.waited, loader.counts))
                tell_first()
            if run.speak is not None and sampling:
                with log.aside():
                    run.speak(state, step)
            if saving:
                started = time.perf_counter()
                save(state, device_batch.cursor)
                log.attach({"save_time_s": time.perf_counter() - started})
            device_batch = None if last or stopping else loader.next()  # while the device works
    finally:
        writer.wait()  # a checkpoint that is being written is not lost to what stops the run
        line.close()
        loader.close()
    multihost_utils.sync_global_devices("saved")
    if first:
        note_end(config.run_dir, step)
        logger.info(f"step {step} is saved in {config.run_dir}")
        if counted := describe(loader.counts):
            logger.info(f"in the data read since this start: {counted}")
    heartbeat.close()
    return 0 if step >= config.num_steps else stop.exit_code


def _facts(config: RunConfig, data_digest: str) -> dict[str, str]:
    """What must be the same on all hosts, each under the name it is reported by."""
    settings = {**to_json(config), "process_id": None}
    return {
        "code": code_digest(),
        "settings": json.dumps(settings),
        "data": data_digest,
        "version of jax": jax.__version__,
        "number of processes and devices": f"{jax.process_count()} {jax.device_count()}",
    }


def _tensorboard(config: RunConfig) -> Any:
    try:
        writer = importlib.import_module("tensorboardX").SummaryWriter
    except ImportError:
        raise EchoError(
            "--tensorboard needs a package that is not here: pip install 'echo_eqx[tensorboard]'"
        ) from None
    return writer(str(config.run_dir / "tensorboard"))


class _StopSignal:
    """SIGTERM or SIGHUP, on all hosts at the same step; in a single process also Ctrl-C.

    A signal that was ignored at the start, as nohup ignores SIGHUP, stays ignored.
    """

    def __init__(self) -> None:
        self.exit_code = EXIT_PREEMPTED
        self._asked = False
        # With several processes JAX listens for SIGTERM itself, and a handler would hide it.
        handlers = {signal.SIGHUP: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        if jax.process_count() == 1:
            handlers = dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), self._ask)
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            self.exit_code = 130
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one is final
        self._asked = True

    def requested(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)


class _ProgressLine:
    """A bar on a terminal, plain lines elsewhere; silent on all hosts but one."""

    def __init__(self, num_steps: int, step: int, shown: bool):
        self._shown = shown
        self._bar = None
        if shown and on_terminal():
            self._bar = tqdm(total=num_steps, initial=step, unit="step", dynamic_ncols=True)

    def show(self, step: int, line: dict[str, Any]) -> None:
        if not self._shown:
            return
        parts = [f"loss {line['loss']:.4f}"]
        if "eval_loss" in line:
            parts.append(f"held out {line['eval_loss']:.4f}")
        parts.append(f"{line['samples_per_second']:.1f} samples/s")
        parts.append(f"data {line['data_wait_fraction']:.0%}")
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
