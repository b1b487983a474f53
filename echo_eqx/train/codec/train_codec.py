"""A training run of a codec, from its settings to the loop."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Mesh

import echo_eqx.train.codec.step as codec_step
from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CodecConfig
from echo_eqx.data.audio import save_audio
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.files import expand
from echo_eqx.prepare.clips import Clip, list_clips
from echo_eqx.sharding.hosts import Heartbeat
from echo_eqx.sharding.mesh import check_batch, make_mesh, mesh_shape, replicated
from echo_eqx.train.codec.config import CodecTrainConfig
from echo_eqx.train.codec.crops import CropStream
from echo_eqx.train.codec.losses import WINDOWS
from echo_eqx.train.codec.step import AudioBatch, CodecState, abstract_batch, abstract_state
from echo_eqx.train.device_loader import DeviceLoader, owned_rows
from echo_eqx.train.loop import Run, claim, compile_step, run_folder, run_steps
from echo_eqx.train.restore import check_same_run
from echo_eqx.weights.checkpoint.reader import TrainingCheckpoint
from echo_eqx.weights.checkpoint.writer import restore_state
from echo_eqx.weights.load import load_codec

LONGEST = 1e6
"""Seconds: a codec takes recordings of any length, crop by crop."""


def train_codec(config: CodecTrainConfig, heartbeat: Heartbeat) -> int:
    """Train until `num_steps`, or until asked to stop; returns the exit code.

    **Raises**: `EchoError` for what was given and cannot be used.
    """
    ways = mesh_shape(config.mesh, jax.device_count())
    check_batch(config.batch_size, 1, ways)
    mesh = make_mesh(ways)
    given = load_codec(config.init_from) if config.init_from is not None else None
    sizes = config.codec_config() if given is None else given.config
    samples = config.crop_frames(sizes) * sizes.hop
    if samples < WINDOWS[-1]:
        raise UsageError(
            f"crop_seconds is {config.crop_seconds}, which are {samples} samples; wanted at least "
            f"the {WINDOWS[-1]} of the shortest spectrum"
        )
    assert config.data is not None
    clips = find_recordings(config.data)
    digest = _digest(clips)
    with run_folder(config, digest) as (folder, launch_id, checkpoint):
        if checkpoint is not None:
            check_same_run(checkpoint, sizes, config, {"digest": digest}, config.data)
        claim(folder, config, checkpoint)
        state = _begin(config, sizes, given, checkpoint, mesh)
        step = codec_step.make_step(mesh, sizes, config, state)
        batch = abstract_batch(mesh, config.batch_size, samples)
        compiled = compile_step(lambda: step.lower(state, batch, jax.eval_shape(lambda: jr.key(0))))
        source = CropStream(
            clips,
            sample_rate=sizes.sample_rate,
            samples=samples,
            rows=owned_rows(mesh, config.batch_size).tolist(),
            seed=config.seed,
            step=int(state.step),
            max_broken=config.max_broken,
        )
        held_out = find_recordings(config.eval_data) if config.eval_data else clips
        crops = _held_out_crops(held_out, sizes, samples, config)
        run = Run(
            config=config,
            mesh=mesh,
            sizes=sizes,
            data={"digest": digest, "revision": None},
            state=state,
            samples_seen=int(state.step) * config.batch_size,
            compiled=compiled,
            step_flops=_flops(compiled) * jax.device_count(),
            frame_rate=sizes.frame_rate,
            loader=DeviceLoader(source, AudioBatch, mesh, config.batch_size),
            evaluate=_evaluation(crops, config, sizes) if config.eval_data else None,
            speak=_speaker(crops, config, sizes) if config.sample_every else None,
        )
        return run_steps(run, launch_id, heartbeat)


def find_recordings(source: str) -> list[Clip]:
    """Clips of a source that `prepare.py` takes.

    **Raises**: `EchoError` if it holds none.
    """
    cache = expand(Path("~/.cache/echo_eqx/recordings"))
    clips, refused = list_clips(source, max_seconds=LONGEST, cache=cache)
    if not clips:
        raise EchoError(
            f"{source} holds no recording that can be used ({len(refused)} left out); wanted "
            "recordings with transcripts, as prepare.py takes them"
        )
    return clips


def _digest(clips: list[Clip]) -> str:
    """What makes these recordings the same ones."""
    text = "\n".join(f"{clip.key} {clip.start:.6f} {clip.seconds:.6f}" for clip in clips)
    return hashlib.sha256(text.encode()).hexdigest()


def _begin(
    config: CodecTrainConfig,
    sizes: CodecConfig,
    given: DACVAE | None,
    checkpoint: TrainingCheckpoint | None,
    mesh: Mesh,
) -> CodecState:
    if checkpoint is not None:
        return restore_state(checkpoint, abstract_state(sizes, config, mesh))
    key_model, key_critic = jr.split(jr.key(config.seed))

    def fresh(model: DACVAE | None) -> CodecState:
        model = DACVAE.init(sizes, key=key_model) if model is None else model
        return codec_step.init_train_state(model, config, key_critic)

    # As NumPy's: of several hosts each has the same ones.
    return jax.jit(fresh, out_shardings=replicated(mesh))(jax.tree.map(np.asarray, given))


def _flops(compiled: Any) -> float:
    """Of one device, by the compiler's count, which is whole: nothing here is in a loop."""
    cost = compiled.cost_analysis()
    return float(cost.get("flops", 0.0)) if isinstance(cost, dict) else 0.0


def _held_out_crops(
    clips: list[Clip], sizes: CodecConfig, samples: int, config: CodecTrainConfig
) -> list[jax.Array]:
    """The same crops at every look."""
    if not config.eval_data and not config.sample_every:
        return []
    source = CropStream(
        clips,
        sample_rate=sizes.sample_rate,
        samples=samples,
        rows=range(config.batch_size),
        seed=config.seed + 1,
    )
    crops = [jnp.asarray(next(source).batch.audio) for _ in range(config.eval_batches)]
    source.close()
    return crops


def _weights(state: CodecState) -> DACVAE:
    """On this host: a codec is whole on every device."""
    model = state.model if state.ema is None else state.ema
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), model)


@eqx.filter_jit
def _decoded(codec: DACVAE, audio: jax.Array) -> codec_step.Decoded:
    return jax.vmap(lambda row: codec_step.pass_through(codec, row, None, False))(audio)


@eqx.filter_jit
def _distances(decoded: codec_step.Decoded, audio: jax.Array, rate: int) -> dict[str, jax.Array]:
    return codec_step.distances(decoded, audio, rate)


def _evaluation(
    crops: list[jax.Array], config: CodecTrainConfig, sizes: CodecConfig
) -> Callable[[Any], dict[str, Any]]:
    """`eval_loss`, its terms, and the median SI-SDR, decoding means without noise."""

    def evaluate(state: CodecState) -> dict[str, Any]:
        codec = _weights(state)
        totals: dict[str, float] = {}
        ratios = []
        for audio in crops:
            decoded = _decoded(codec, audio)
            for name, value in _distances(decoded, audio, sizes.sample_rate).items():
                totals[name] = totals.get(name, 0.0) + float(value) / len(crops)
            pairs = zip(np.asarray(decoded.audio), np.asarray(audio), strict=True)
            ratios += [codec_step.signal_to_distortion(a, b) for a, b in pairs if np.any(b)]
        loss = sum(getattr(config.loss, name) * value for name, value in totals.items())
        figures = {f"eval_{name}": value for name, value in totals.items()}
        return {"eval_loss": loss, **figures, "eval_si_sdr": float(np.median(ratios))}

    return evaluate


def _speaker(
    crops: list[jax.Array], config: CodecTrainConfig, sizes: CodecConfig
) -> Callable[[Any, int], None]:
    """Writes held-out crops as they are (`.original.wav`) and as they come back (`.wav`)."""
    audio = jnp.concatenate(crops)[: config.sample_count]

    def speak(state: CodecState, step: int) -> None:
        decoded = np.asarray(_decoded(_weights(state), audio).audio)
        if jax.process_index() != 0 or not np.isfinite(decoded).all():
            return
        folder = config.run_dir / "samples" / f"step_{step:09d}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, (ours, theirs) in enumerate(zip(decoded, np.asarray(audio), strict=True)):
            (folder / f"{i}.txt").write_text(f"held-out crop {i}\n")
            save_audio(folder / f"{i}.wav", ours, sizes.sample_rate)
            save_audio(folder / f"{i}.original.wav", theirs, sizes.sample_rate)

    return speak
