"""Measure times and peak memory: medians over several runs, one topic per process.

    echo-eqx benchmark codec            # 5 s of audio through the 48 kHz codec
    echo-eqx benchmark dit              # one velocity evaluation of the 1.3B model
    echo-eqx benchmark cache            # a sampling step with and without cached keys
    echo-eqx benchmark step             # trace and compile the 1.3B training step
    echo-eqx benchmark stream           # records per second, against a plain tarfile loop
    echo-eqx benchmark save             # how long a checkpoint blocks the loop
    echo-eqx benchmark monitor          # the page of a long run, until its curves are drawn
    echo-eqx benchmark latency          # the first sound and the whole: one go, sentences, blocks
    echo-eqx benchmark serve            # many clients of a speech server
    echo-eqx benchmark gpu              # what an accelerator does, a row at a time
    echo-eqx benchmark peers            # beside the same model in Flax and PyTorch

Weights are random; that does not change the cost.
"""

import contextlib
import io
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import psutil
import tyro

import echo_eqx
from echo_eqx.cli import parse
from echo_eqx.commands._benchmark_gpu import Gpu, gpu
from echo_eqx.commands._benchmark_latency import Latency, latency
from echo_eqx.commands._benchmark_peers import Peers, peers
from echo_eqx.commands._benchmark_serve import Serve, serve
from echo_eqx.config import CODEC_PRESETS, DIT_PRESETS
from echo_eqx.data import loader
from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.shards import list_shards
from echo_eqx.json_data import to_json
from echo_eqx.sharding.mesh import make_mesh, mesh_shape
from echo_eqx.train.config import ObjectiveConfig, OptimizerConfig
from echo_eqx.train.state import abstract_state, sharded_abstract_state
from echo_eqx.train.step import abstract_batch, make_train_step
from echo_eqx.weights.checkpoint.retention import Retention
from echo_eqx.weights.checkpoint.writer import CheckpointWriter
from echo_eqx.weights.native import array_dtype

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Codec:
    """Encode and decode a recording."""

    model: Literal["48khz", "tiny"] = "48khz"
    seconds: float = 5.0
    runs: int = 5


@dataclass(frozen=True)
class DiT:
    """One velocity evaluation at the published lengths."""

    model: Literal["1.3B", "840M", "tiny"] = "1.3B"
    dtype: Dtype = "bfloat16"
    frames: int = 768
    text_bytes: int = 768
    speaker_frames: int = 512
    runs: int = 3


@dataclass(frozen=True)
class Cache:
    """A velocity evaluation with cached keys and values, against an uncached one."""

    model: Literal["1.3B", "840M", "tiny"] = "tiny"
    dtype: Dtype = "float32"
    frames: int = 384
    text_bytes: int = 768
    speaker_frames: int = 512
    runs: int = 9


@dataclass(frozen=True)
class Step:
    """Trace and compile the training step from shapes alone, without weights."""

    model: Literal["1.3B", "840M", "tiny"] = "1.3B"
    batch_size: int = 8
    devices: int = 1
    """Virtual devices, all along fsdp."""


@dataclass(frozen=True)
class Stream:
    """Finished batches from local shards of random latents at the published lengths."""

    shards: int = 8
    records: int = 256
    """Records per shard."""
    batch_size: int = 64
    runs: int = 5


@dataclass(frozen=True)
class Save:
    """A checkpoint of a training state: how long the loop waits, and when it is on disk."""

    model: Literal["1.3B", "840M", "tiny"] = "tiny"
    runs: int = 5


@dataclass(frozen=True)
class Monitor:
    """The monitor's page of one long run: time until all is read, and until curves are drawn."""

    lines: int = 1_000_000
    runs: int = 3


def main() -> None:
    topics = {
        Codec: codec,
        DiT: dit,
        Cache: cache,
        Step: step,
        Stream: stream,
        Save: save,
        Monitor: monitor,
        Latency: latency,
        Serve: serve,
        Gpu: gpu,
        Peers: peers,
    }
    kinds = tuple(
        Annotated[kind, tyro.conf.subcommand(function.__name__)]
        for kind, function in topics.items()
    )
    args = parse(Union[kinds], __doc__)  # noqa: UP007
    topics[type(args)](args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_gib = peak / 2**30 if sys.platform == "darwin" else peak / 2**20
    print(f"peak memory of this process: {peak_gib:.2f} GiB")


def median_seconds(name: str, function: Callable[[], object], runs: int) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    first = time.perf_counter() - started
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    median = statistics.median(times)
    print(
        f"{name}: median {median:.3f} s of {runs} runs ({min(times):.3f} to {max(times):.3f}); "
        f"the first, with compilation, {first:.1f} s"
    )
    return median


def random_weights(init: Callable[[], Any]) -> Any:
    """A model of random numbers, made leaf by leaf as when loading, for a realistic peak memory."""
    rng = np.random.default_rng(0)

    def leaf(abstract: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = rng.standard_normal(abstract.shape, np.float32) * np.float32(0.02)
        return jax.device_put(numbers.astype(abstract.dtype))

    return jax.tree.map(leaf, jax.eval_shape(init))


def codec(args: Codec) -> None:
    config = CODEC_PRESETS[args.model]
    model = random_weights(lambda: echo_eqx.DACVAE.init(config, key=jr.key(0)))
    audio = 0.1 * np.random.default_rng(0).standard_normal(int(args.seconds * config.sample_rate))
    audio = audio.astype(np.float32)
    latents, _ = model.encode(audio)
    print(f"codec {args.model}, {args.seconds} s of audio, float32, {jax.devices()[0]}")
    median_seconds("encode", lambda: model.encode(audio), args.runs)
    plain = median_seconds("decode", lambda: model.decode(latents), args.runs)
    message = np.arange(16) % 2
    marked = median_seconds(
        "decode with watermark", lambda: model.decode(latents, message), args.runs
    )
    print(f"decoding with the watermark takes {marked / plain:.2f} times as long")


def dit_inputs(args: DiT | Cache) -> tuple[echo_eqx.EchoDiT, list[jax.Array]]:
    config = DIT_PRESETS[args.model]

    def init():
        dit = echo_eqx.EchoDiT.init(config, key=jr.key(0))
        return echo_eqx.cast(dit, array_dtype(args.dtype))

    model = random_weights(init)
    keys = jr.split(jr.key(1), 3)
    inputs = [
        jr.normal(keys[0], (args.frames, config.latent_dim)),
        jnp.float32(0.5),
        jr.randint(keys[1], (args.text_bytes,), 0, 256),
        jnp.ones(args.text_bytes, bool),
        jr.normal(keys[2], (args.speaker_frames, config.latent_dim)),
        jnp.ones(args.speaker_frames, bool),
    ]
    print(
        f"EchoDiT {args.model}, {args.dtype}, {args.frames} frames, {args.text_bytes} bytes, "
        f"{args.speaker_frames} reference frames, {jax.devices()[0]}"
    )
    return model, inputs


def dit(args: DiT) -> None:
    model, inputs = dit_inputs(args)
    velocity = eqx.filter_jit(lambda model, *inputs: model(*inputs))
    median_seconds("velocity", lambda: velocity(model, *inputs), args.runs)


def cache(args: Cache) -> None:
    model, inputs = dit_inputs(args)
    velocity = eqx.filter_jit(lambda model, *inputs: model(*inputs))
    whole = median_seconds("velocity", lambda: velocity(model, *inputs), args.runs)

    @eqx.filter_jit
    def context_of(model, ids, text_mask, speaker, speaker_mask):
        return model.encode_conditions(ids, text_mask, speaker, speaker_mask)

    context = context_of(model, *inputs[2:])

    @eqx.filter_jit
    def from_context(model, context, x, t):
        mask = jnp.ones(x.shape[0], bool)
        ones = jnp.ones(model.config.num_layers)
        return model.velocity(x, t, context, frame_mask=mask, speaker_scale=ones)

    x, t = inputs[:2]
    cached = median_seconds(
        "velocity from cached keys", lambda: from_context(model, context, x, t), args.runs
    )
    print(f"the cached evaluation takes {cached / whole:.2f} of the uncached one's time")


def step(args: Step) -> None:
    count = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    mesh = make_mesh(mesh_shape("", args.devices))
    config, optimizer = DIT_PRESETS[args.model], OptimizerConfig()
    started = time.perf_counter()
    state = sharded_abstract_state(config, optimizer, mesh)
    batch = abstract_batch(mesh, args.batch_size, config)
    train_step = make_train_step(mesh, state, ObjectiveConfig(dtype="bfloat16"), optimizer, 1000)
    lowered = train_step.lower(state, batch, jax.eval_shape(lambda: jr.key(0)))
    traced = time.perf_counter()
    memory: Any = lowered.compile().memory_analysis()
    compiled = time.perf_counter()
    print(
        f"training step of {args.model}, batch {args.batch_size} x {config.max_frames} frames, "
        f"{args.devices} device(s): trace {traced - started:.1f} s, "
        f"compile {compiled - traced:.1f} s"
    )
    print(
        f"on each device: state and batch {memory.argument_size_in_bytes / 2**30:.2f} GiB, "
        f"temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB"
    )


def stream(args: Stream) -> None:
    config = DIT_PRESETS["1.3B"]
    count = args.shards * args.records
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(Path(folder), args.shards, args.records, config.latent_dim)
        shard_index = list_shards(folder, Path(folder))

        def plain() -> None:
            for shard in shard_index.shards:
                with tarfile.open(shard.path) as tar:
                    for member in tar:
                        file = tar.extractfile(member)
                        assert file is not None
                        file.read()

        lengths = loader.SequenceLengths(
            config.latent_dim,
            config.max_frames,
            config.max_text_bytes,
            config.max_speaker_frames,
            config.patch_size,
        )
        streams = loader.choose_num_streams(args.batch_size, args.shards)
        source = loader.DataLoader(
            shard_index,
            lengths,
            np.zeros((1, config.latent_dim), np.float32),
            batch_size=args.batch_size,
            seed=0,
            num_streams=streams,
            streams=range(streams),
            cache=ShardCache(Path(folder) / "cache", 10**9),
        )

        def batches() -> None:
            for _ in range(count // args.batch_size):
                next(source)

        reading = median_seconds("plain tarfile reading", plain, args.runs)
        building = median_seconds("finished batches", batches, args.runs)
        source.close()
    print(
        f"{count / reading:.0f} records/s read, {count / building:.0f} records/s as batches: "
        f"{reading / building:.2f} of plain reading"
    )


def write_random_shards(folder: Path, shards: int, records: int, channels: int) -> None:
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for record in range(records):
                parts = {"json": json.dumps({"text": "word " * 60}).encode()}
                for name, frames in (("npy", 768), ("ref.npy", 512)):
                    file = io.BytesIO()
                    np.save(file, rng.standard_normal((frames, channels), np.float32).astype("f2"))
                    parts[name] = file.getvalue()
                for name, data in parts.items():
                    info = tarfile.TarInfo(f"{record:05d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def save(args: Save) -> None:
    config = DIT_PRESETS[args.model]
    state: Any = random_weights(lambda: abstract_state(config, OptimizerConfig()))
    manifest = {"step": 0, "samples_seen": 0, "model": to_json(config)}
    stalls, totals = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(
            Path(folder),
            launch_id="benchmark",
            process=0,
            num_processes=1,
            retention=Retention(last=1),
            export=True,
        )
        for run_number in range(args.runs):
            started = time.perf_counter()
            writer.save(state, {**manifest, "step": run_number}, {})
            stalls.append(time.perf_counter() - started)
            writer.wait()
            totals.append(time.perf_counter() - started)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(
        f"checkpoint of {args.model}, {size / 2**20:.0f} MiB: the loop waits "
        f"{statistics.median(stalls):.3f} s, it is on disk after {statistics.median(totals):.2f} s "
        f"(medians of {args.runs})"
    )


def monitor(args: Monitor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run" / "metrics.jsonl"
        file.parent.mkdir()
        with file.open("w") as out:
            out.writelines(metrics_line(step) for step in range(1, args.lines + 1))
        print(f"{args.lines} lines, {file.stat().st_size / 1e6:.0f} MB; each time a new monitor")
        measure_reading(file, args)
        measure_drawing(file, args)


def metrics_line(step: int) -> str:
    """A line as the trainer writes it."""
    loss = 0.3 + 2.0 / step**0.5 + 0.05 * math.sin(step)
    line: dict[str, Any] = {
        "step": step,
        "loss": loss,
        "grad_norm": loss / 3,
        "param_norm": 300 + loss / 7,
        "lr": 1e-4 * math.cos(1e-6 * step),
        "updated": True,
    }
    if step % 10 == 0:
        seconds = 0.9 + 0.01 * math.sin(step)
        line |= {
            "samples_seen": 256 * step,
            "skipped_updates": 0,
            "broken_records": 0,
            "time": 1.7e9 + step,
            "step_time_s": seconds,
            "data_wait_fraction": 0.001 * loss,
            "samples_per_second": 256 / seconds,
            "audio_hours_per_second": 1 / seconds,
            "flops_per_device": 1e14 / seconds,
            "mfu": 0.4 / seconds,
            "peak_memory_bytes": 3e10,
        }
    if step % 1000 == 0:
        line |= {"eval_loss": loss, "eval_loss_by_time": [loss] * 8}
    return json.dumps(line) + "\n"


@contextlib.contextmanager
def monitoring(file: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of a monitor that has just started to listen."""
    command = [sys.executable, "-m", "echo_eqx", "monitor"]
    command += ["--runs", str(file.parent), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield process.stderr.readline().split(" at ")[1].split(" until ")[0], process.pid
        finally:
            process.kill()


def measure_reading(file: Path, args: Monitor) -> None:
    whole, cpu, refresh, read = [], [], [], []
    for _ in range(args.runs):
        with monitoring(file) as (address, pid):
            used, started = cpu_seconds(pid), time.perf_counter()
            update, curves = ask_monitor(address, 0, {})
            while update["read"] < 1:
                update, curves = ask_monitor(address, update["version"], curves)
            whole.append(time.perf_counter() - started)
            cpu.append(cpu_seconds(pid) - used)
            with file.open("a") as out:
                out.writelines(metrics_line(args.lines + i) for i in range(1, 11))
            before, started = bytes_read(pid), time.perf_counter()
            ask_monitor(address, update["version"], curves)
            refresh.append(time.perf_counter() - started)
            read.append(bytes_read(pid) - before)
    print(
        f"over HTTP: all curves after {statistics.median(whole):.2f} s, of which the monitor "
        f"computes {statistics.median(cpu):.2f} s; 10 lines more after "
        f"{1e3 * statistics.median(refresh):.0f} ms, {statistics.median(read) / 1e3:.1f} kB read "
        f"(medians of {args.runs})"
    )


def ask_monitor(address: str, version: int, curves: dict[str, str]) -> tuple[Any, dict[str, str]]:
    """Request new data as the page would; returns it, and the state that the page keeps."""
    query = urllib.parse.urlencode({"version": version, "have": ",".join(curves.values())})
    with urllib.request.urlopen(f"{address}data.json?run=run&{query}") as answer:
        update = json.load(answer)
    found = {name: f"{name}:{c['stride']}:{c['full']}" for name, c in update["curves"].items()}
    return update, curves | found


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def bytes_read(pid: int) -> int:
    fields = Path(f"/proc/{pid}/io").read_text().split()
    return int(fields[fields.index("rchar:") + 1])


def measure_drawing(file: Path, args: Monitor) -> None:
    """Time until all curves are drawn in headless Chromium, by its own clock."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        print("in a browser: not measured, since chromium and chromedriver are not on PATH")
        return
    from selenium import webdriver  # of the extra dev

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    last = "[...document.querySelectorAll('.plot')].at(-1).data?.[0]?.x.at(-1)"
    script = f"return {last} >= {args.lines} && performance.now() / 1000"
    first, again = [], []
    try:
        for _ in range(args.runs):
            with monitoring(file) as (address, _):
                for seconds in (first, again):  # the second time Plotly is in the cache
                    browser.get(address)
                    while not (found := browser.execute_script(script)):
                        time.sleep(0.02)
                    seconds.append(found)
    finally:
        browser.quit()
    print(
        f"in a browser: all curves after {statistics.median(first):.2f} s the first time, "
        f"{statistics.median(again):.2f} s again"
    )
