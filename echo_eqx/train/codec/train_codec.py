"""Trains a codec: from the settings to the training loop."""

import hashlib
import logging
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
from echo_eqx.data.quality import signal_to_distortion
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
from echo_eqx.train.loop import Trainer, train_loop
from echo_eqx.train.setup import compile_step, is_done, open_run
from echo_eqx.weights.checkpoint.reader import TrainingCheckpoint
from echo_eqx.weights.checkpoint.writer import restore_state
from echo_eqx.weights.load import load_codec

logger = logging.getLogger(__name__)

MAX_SECONDS = 1e6
"""No limit in practice: only crops of a recording are read."""


def train_codec(config: CodecTrainConfig, heartbeat: Heartbeat) -> int:
    """Train until `num_steps`, or until asked to stop; returns the exit code.

    **Raises**: `EchoError` for unusable inputs.
    """
    axes = mesh_shape(config.mesh, jax.device_count())
    check_batch(config.batch_size, 1, axes)
    mesh = make_mesh(axes)
    pretrained = _pretrained(config.init_from) if config.init_from is not None else None
    sizes = config.codec_config() if pretrained is None else pretrained.config
    samples = config.crop_frames(sizes) * sizes.hop
    if samples < WINDOWS[-1]:
        raise UsageError(
            f"crop_seconds: expected at least {WINDOWS[-1]} samples, the shortest STFT window, got "
            f"{config.crop_seconds} s ({samples} samples)"
        )
    assert config.data is not None
    clips = find_recordings(config.data)
    listing = "\n".join(f"{clip.key} {clip.start:.6f} {clip.seconds:.6f}" for clip in clips)
    data_id = {"digest": hashlib.sha256(listing.encode()).hexdigest(), "revision": None}
    with open_run(config, sizes, data_id) as (launch_id, checkpoint):
        if is_done(config, checkpoint):
            heartbeat.close()
            return 0
        state = _init_or_restore(config, sizes, pretrained, checkpoint, mesh)
        step = codec_step.make_step(mesh, sizes, config, state)
        batch = abstract_batch(mesh, config.batch_size, samples)
        compiled = compile_step(lambda: step.lower(state, batch, jax.eval_shape(lambda: jr.key(0))))
        crops = CropStream(
            clips,
            sample_rate=sizes.sample_rate,
            samples=samples,
            rows=owned_rows(mesh, config.batch_size).tolist(),
            seed=config.seed,
            step=int(state.step),
            max_broken=config.max_broken,
            augment=config.augment,
        )
        held_out = find_recordings(config.eval_data) if config.eval_data else clips
        eval_crops = _eval_crops(held_out, sizes, samples, config)
        trainer = Trainer(
            config=config,
            mesh=mesh,
            sizes=sizes,
            data=data_id,
            state=state,
            samples_seen=int(state.step) * config.batch_size,
            compiled=compiled,
            # As the compiler counts for one device: exact, as the step has no loops.
            step_flops=(compiled.cost_analysis() or {}).get("flops", 0.0) * jax.device_count(),
            frame_rate=sizes.frame_rate,
            loader=DeviceLoader(crops, AudioBatch, mesh, config.batch_size),
            evaluate=_make_evaluate(eval_crops, config, sizes) if config.eval_data else None,
            log_samples=_make_log_samples(eval_crops, config, sizes)
            if config.sample_every
            else None,
        )
        return train_loop(trainer, launch_id, heartbeat)


def _pretrained(source: str | Path) -> DACVAE:
    codec = load_codec(source)
    if not isinstance(codec, DACVAE):
        raise UsageError(f"init_from: expected a DACVAE, got a {type(codec).__name__}: {source}")
    return codec


def find_recordings(source: str) -> list[Clip]:
    """The recordings of `source`, in any layout that `prepare` accepts, also without transcripts.

    **Raises**: `EchoError` if there are none.
    """
    cache = expand(Path("~/.cache/echo_eqx/recordings"))
    clips, skipped = list_clips(source, max_seconds=MAX_SECONDS, cache=cache, need_text=False)
    if not clips:
        raise EchoError(
            f"no usable recordings in {source} ({len(skipped)} skipped); expected recordings as "
            "for prepare, with or without transcripts"
        )
    if skipped and jax.process_index() == 0:
        first = f"{skipped[0].name}: {skipped[0].detail}"
        logger.warning(f"left out {len(skipped)} inputs of {source}; the first: {first}")
    return clips


def _init_or_restore(
    config: CodecTrainConfig,
    sizes: CodecConfig,
    pretrained: DACVAE | None,
    checkpoint: TrainingCheckpoint | None,
    mesh: Mesh,
) -> CodecState:
    if checkpoint is not None:
        return restore_state(checkpoint, abstract_state(sizes, config, mesh))
    key_model, key_discriminators = jr.split(jr.key(config.seed))

    def init(model: DACVAE | None) -> CodecState:
        model = DACVAE.init(sizes, key=key_model) if model is None else model
        return codec_step.init_train_state(model, config, key_discriminators)

    # NumPy arrays are taken to be equal on all hosts.
    return jax.jit(init, out_shardings=replicated(mesh))(jax.tree.map(np.asarray, pretrained))


def _eval_crops(
    clips: list[Clip], sizes: CodecConfig, samples: int, config: CodecTrainConfig
) -> list[jax.Array]:
    """Crops to evaluate on, the same every time."""
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
    """The weights to evaluate, on this host: they are replicated."""
    model = state.model if state.ema is None else state.ema
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), model)


@eqx.filter_jit
def _decoded(codec: DACVAE, audio: jax.Array) -> codec_step.Decoded:
    return jax.vmap(lambda row: codec_step.reconstruct(codec, row, None, False))(audio)


_distances = eqx.filter_jit(codec_step.distances)


def _make_evaluate(
    crops: list[jax.Array], config: CodecTrainConfig, sizes: CodecConfig
) -> Callable[[Any], dict[str, Any]]:
    """Computes `eval_loss`, its terms and the median SI-SDR, decoding the mean latents."""

    def evaluate(state: CodecState) -> dict[str, Any]:
        codec = _weights(state)
        totals: dict[str, float] = {}
        ratios = []
        for audio in crops:
            decoded = _decoded(codec, audio)
            for name, value in _distances(decoded, audio, sizes.sample_rate).items():
                totals[name] = totals.get(name, 0.0) + float(value) / len(crops)
            pairs = zip(np.asarray(decoded.audio), np.asarray(audio), strict=True)
            ratios += [signal_to_distortion(a, b) for a, b in pairs if np.any(b)]
        loss = sum(getattr(config.loss, name) * value for name, value in totals.items())
        terms = {f"eval_{name}": value for name, value in totals.items()}
        return {"eval_loss": loss, **terms, "eval_si_sdr": float(np.median(ratios))}

    return evaluate


def _make_log_samples(
    crops: list[jax.Array], config: CodecTrainConfig, sizes: CodecConfig
) -> Callable[[Any, int], None]:
    """Writes held-out crops (`.original.wav`) and their reconstructions (`.wav`)."""
    audio = jnp.concatenate(crops)[: config.sample_count]

    def log_samples(state: CodecState, step: int) -> None:
        decoded = np.asarray(_decoded(_weights(state), audio).audio)
        if jax.process_index() != 0 or not np.isfinite(decoded).all():
            return
        folder = config.run_dir / "samples" / f"step_{step:09d}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, (ours, theirs) in enumerate(zip(decoded, np.asarray(audio), strict=True)):
            (folder / f"{i}.txt").write_text(f"held-out crop {i}\n")
            save_audio(folder / f"{i}.wav", ours, sizes.sample_rate)
            save_audio(folder / f"{i}.original.wav", theirs, sizes.sample_rate)

    return log_samples
