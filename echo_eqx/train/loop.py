"""A training run, from its settings to its last checkpoint."""

import dataclasses
import importlib
import json
import signal
import time
from typing import Any

import jax
import jax.random as jr
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from echo_eqx.command import note, on_terminal
from echo_eqx.config import to_json as sizes_to_json
from echo_eqx.data import stream
from echo_eqx.errors import EchoError
from echo_eqx.sharding.hosts import EXIT_PREEMPTED, PeerWatch, check_agreement, code_digest
from echo_eqx.sharding.mesh import check_batch, make_mesh, mesh_shape, replicated
from echo_eqx.sharding.specs import check_mesh
from echo_eqx.train.batches import Feeder
from echo_eqx.train.begin import begin, check_same_run, newest_restorable, pinned_source
from echo_eqx.train.checkpoint import CheckpointWriter, Retention, remove_leftovers
from echo_eqx.train.config import TrainConfig, to_json
from echo_eqx.train.data import TrainData
from echo_eqx.train.evaluate import evaluate, make_evaluate
from echo_eqx.train.flops import step_flops
from echo_eqx.train.metrics import MetricsLog
from echo_eqx.train.plan import check_memory
from echo_eqx.train.run_folder import MetricsFile, RunFolder
from echo_eqx.train.samples import Samples
from echo_eqx.train.state import TrainState, abstract_state, sharded_abstract_state
from echo_eqx.train.step import abstract_batch, make_train_step


def train(config: TrainConfig, watch: PeerWatch) -> int:
    """Train until `num_steps`, or until asked to stop; returns the exit code.

    **Raises**: `EchoError` for what was given and cannot be used, as far as possible before
    anything is compiled or fetched.
    """
    config = _resolved(config)
    dit_config = config.dit_config()
    sizes = mesh_shape(config.mesh, jax.device_count())
    check_batch(config.batch_size, config.optimizer.accumulate, sizes)
    check_mesh(abstract_state(dit_config, config.optimizer).model, sizes)
    mesh = make_mesh(sizes)
    source = pinned_source(config)
    data = TrainData(source, config, dit_config, mesh)
    held_out = TrainData(config.eval_data, config, dit_config, mesh) if config.eval_data else None
    mark = check_agreement(_facts(config, data, held_out))
    with RunFolder(config.run_dir, writes=jax.process_index() == 0) as folder:
        folder.check_shared(mark)
        return _train_in(folder, config, mesh, data, held_out, mark, watch)


def _train_in(
    folder: RunFolder,
    config: TrainConfig,
    mesh: Mesh,
    data: TrainData,
    held_out: TrainData | None,
    mark: str,
    watch: PeerWatch,
) -> int:
    first = jax.process_index() == 0
    dit_config = config.dit_config()
    checkpoint = newest_restorable(config.run_dir)
    if checkpoint is not None:
        check_same_run(checkpoint, dit_config, config.seed, data.listing)
    if first:
        remove_leftovers(config.run_dir, checkpoint)
        folder.describe(config)
    multihost_utils.sync_global_devices("ready")

    state, samples_seen, cursor = begin(config, checkpoint, mesh)
    step = int(state.step)
    if first and step:
        note(f"going on after step {step}")
    compiled, seconds = compile_step(config, mesh)
    if first:
        note(f"compiled the step in {seconds:.1f} s")
        if warning := check_memory(compiled.memory_analysis(), jax.local_devices()[0]):
            note(f"warning: {warning}")
    broken_log = config.run_dir / f"broken-{jax.process_index()}.jsonl"
    source = data.stream(config.batch_size, cursor=cursor, broken_log=broken_log)
    feeder = Feeder(source, mesh, config.batch_size)
    writer = CheckpointWriter(
        config.run_dir,
        mark=mark,
        process=jax.process_index(),
        num_processes=jax.process_count(),
        retention=Retention(config.keep_last, config.keep_every),
        export=config.export,
    )
    log = MetricsLog(
        MetricsFile(config.run_dir / "metrics.jsonl", step) if first else None,
        config.run_dir / f"nonfinite-{jax.process_index()}.jsonl",
        step_flops=step_flops(dit_config, config.batch_size),
        batch_size=config.batch_size,
        max_nonfinite=config.max_nonfinite,
        samples_seen=samples_seen,
        tensorboard=_tensorboard(config) if first and config.tensorboard else None,
    )
    eval_batches, samples = _held_out(config, held_out or data, mesh)
    run_evaluation = make_evaluate(mesh, config.objective)
    key = jax.jit(lambda: jr.key(config.seed + 1), out_shardings=replicated(mesh))()
    stop = _StopSignal()
    line = _ProgressLine(config.num_steps, step, first)

    def save(state: TrainState, cursor: dict[str, list[int]]) -> None:
        manifest = {
            "step": step,
            "samples_seen": log.samples_seen,
            "model": sizes_to_json(dit_config),
            "settings": to_json(config),
            "mesh": dict(mesh.shape),
            "processes": jax.process_count(),
            "seed": config.seed,
            "key": jr.key_data(jr.key(config.seed + 1)).tolist(),
            "data": {"revision": data.listing.revision, "digest": data.listing.digest()},
        }
        writer.save(state, manifest, cursor)

    try:
        placed = feeder.next() if step < config.num_steps else None
        log.restart_clock(feeder.waited)
        while placed is not None:
            with jax.transfer_guard_device_to_host("disallow"):  # nothing here waits for it
                state, metrics = compiled(state, placed.batch, key)
                step += 1
                log.add(step, metrics, placed.keys)
            writer.poll()

            last = step == config.num_steps
            stopping = stop.requested(step)
            saving = step % config.checkpoint_every == 0 or last or stopping
            evaluating = bool(eval_batches) and (step % config.eval_every == 0 or last)
            sampling = samples is not None and (step % config.sample_every == 0 or last)
            if evaluating:
                with log.aside():
                    weights = state.model if state.ema is None else state.ema
                    log.attach(evaluate(run_evaluation, weights, eval_batches))
            if step % config.log_every == 0 or evaluating or sampling or saving:
                line.show(step, log.flush(feeder.waited, source))
            if samples is not None and sampling:
                with log.aside():
                    samples.speak(state.model if state.ema is None else state.ema, step)
            if saving:
                started = time.perf_counter()
                save(state, placed.cursor)
                log.attach({"last_save_seconds": time.perf_counter() - started})
            placed = None if last or stopping else feeder.next()  # while the device works
    finally:
        writer.wait()  # a checkpoint that is being written is not lost to what stops the run
        line.close()
        source.close()
    multihost_utils.sync_global_devices("saved")
    if first:
        note(f"step {step} is saved in {config.run_dir}")
    watch.close()
    return 0 if step >= config.num_steps else stop.exit_code


def compile_step(config: TrainConfig, mesh: Mesh) -> tuple[Any, float]:
    """The training step, compiled from shapes alone, and the seconds that took.

    A compiled step takes batches of these shapes and no others: it says what differs, and cannot
    compile a second time behind one's back.
    """
    started = time.perf_counter()
    dit_config = config.dit_config()
    state = sharded_abstract_state(dit_config, config.optimizer, mesh)
    batch = abstract_batch(mesh, config.batch_size, dit_config)
    step = make_train_step(mesh, state, config.objective, config.optimizer, config.num_steps)
    key = jax.eval_shape(lambda: jr.key(0))
    compiled = step.lower(state, batch, key).compile()
    return compiled, time.perf_counter() - started


def _held_out(config: TrainConfig, data: TrainData, mesh: Mesh) -> tuple[list, Samples | None]:
    """Batches to evaluate on, and the speaker of samples, as far as they are asked for."""
    samples, batches = None, []
    if config.sample_every:
        source = data.stream(config.batch_size)
        rows = _first_rows(next(source).batch, config.sample_count)
        source.close()
        assert config.codec is not None
        samples = Samples(
            config.run_dir,
            rows,
            config.codec,
            mesh,
            config.objective.dtype,
            writes=jax.process_index() == 0,
        )
    if config.eval_data:
        source = data.stream(config.batch_size)
        feeder = Feeder(source, mesh, config.batch_size)
        batches = [feeder.next().batch for _ in range(config.eval_batches)]
        source.close()
    return batches, samples


def _first_rows(batch: stream.Batch, count: int) -> stream.Batch:
    """The first rows of process 0, in all processes."""
    rows = stream.Batch(*(array[:count] for array in batch))
    return stream.Batch(*map(np.asarray, multihost_utils.broadcast_one_to_all(tuple(rows))))


def _resolved(config: TrainConfig) -> TrainConfig:
    if config.objective.dtype != "auto":
        return config
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, dtype=dtype))


def _facts(config: TrainConfig, data: TrainData, held_out: TrainData | None) -> dict[str, str]:
    """What must be the same on all hosts, each under the name it is reported by."""
    settings = dataclasses.replace(config, process_id=None)
    return {
        "code": code_digest(),
        "settings": json.dumps(to_json(settings)),
        "data": data.listing.digest() + (held_out.listing.digest() if held_out else ""),
        "version of jax": jax.__version__,
        "number of processes and devices": f"{jax.process_count()} {jax.device_count()}",
    }


def _tensorboard(config: TrainConfig) -> Any:
    try:
        writer = importlib.import_module("tensorboardX").SummaryWriter
    except ImportError:
        raise EchoError(
            "--tensorboard needs a package that is not here: pip install 'echo_eqx[tensorboard]'"
        ) from None
    return writer(str(config.run_dir / "tensorboard"))


class _StopSignal:
    """SIGTERM, on all hosts at the same step; in a single process also Ctrl-C."""

    def __init__(self) -> None:
        self.exit_code = EXIT_PREEMPTED
        self._asked = False
        # With several processes JAX listens for SIGTERM itself, and a handler would hide it.
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._ask)
            signal.signal(signal.SIGINT, self._ask)

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
        parts.append(f"data {line['data_wait']:.0%}")
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
