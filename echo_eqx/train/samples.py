"""Samples generated during training, written with their recordings and references."""

import logging
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
from jax.sharding import Mesh

from echo_eqx.codec.codec import Codec
from echo_eqx.data.audio import save_audio
from echo_eqx.data.loader import HostBatch
from echo_eqx.errors import EchoError
from echo_eqx.flow.sampler import sample
from echo_eqx.generation import GenerationConfig
from echo_eqx.model.dit import EchoDiT
from echo_eqx.sharding.mesh import replicated
from echo_eqx.speech.codec import codec_mismatch, silence_latent
from echo_eqx.speech.joining import decode_with_silence, fade_edges
from echo_eqx.trees import cast
from echo_eqx.weights.load import load_codec

logger = logging.getLogger(__name__)


class SampleWriter:
    """Generates the rows of `batch`, always from the same noise. Process 0 decodes and writes."""

    def __init__(
        self,
        run_dir: Path,
        batch: HostBatch,
        codec: str,
        mesh: Mesh,
        dtype: str,
        generation: GenerationConfig,
        writes: bool,
    ):
        self._folder = run_dir / "samples"
        self._batch = batch
        self._codec: Codec | None = None
        if writes:
            self._codec = load_codec(codec)
            width, channels = batch.latents.shape[-1], self._codec.config.latent_dim
            if channels != width:
                raise EchoError(
                    f"expected a codec with {width} channels, as in the data, got {channels} in "
                    f"{codec}; give --codec with the one that encoded the data"
                )
            self._silence = silence_latent(self._codec)
            if problem := codec_mismatch(generation, self._silence):
                logger.warning(f"codec {codec}: {problem}")

        def generate(model: EchoDiT, text_ids, text_mask, speaker_latents, speaker_mask):
            return sample(
                cast(model, dtype),
                text_ids,
                text_mask,
                speaker_latents,
                speaker_mask,
                settings=generation.sampler,
                key=jr.key(0),
            )

        # Every process holds shards of the model, so every process generates.
        self._generate = jax.jit(generate, out_shardings=replicated(mesh))

    def write(self, model: EchoDiT, step: int) -> None:
        """Generate with `model` and write `samples/step_N/`."""
        rows = self._batch
        latents = self._generate(
            model, rows.text_ids, rows.text_mask, rows.speaker_latents, rows.speaker_mask
        )
        if self._codec is None:
            return
        folder = self._folder / f"step_{step:09d}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, latent in enumerate(np.asarray(latents.addressable_data(0))):
            text = bytes(rows.text_ids[i][rows.text_mask[i]][1:].astype(np.uint8))
            (folder / f"{i}.txt").write_text(text.decode(errors="replace") + "\n")
            self._save(folder / f"{i}.wav", latent)
            self._save(folder / f"{i}.original.wav", rows.latents[i][rows.frame_mask[i]])
            if rows.speaker_mask[i].any():
                self._save(folder / f"{i}.ref.wav", rows.speaker_latents[i][rows.speaker_mask[i]])

    def _save(self, path: Path, latents: np.ndarray) -> None:
        assert self._codec is not None
        if not len(latents) or not np.isfinite(latents).all():  # an untrained model may diverge
            return
        rate = self._codec.config.sample_rate
        audio = decode_with_silence(self._codec, latents, silence=self._silence)
        save_audio(path, fade_edges(audio, rate), rate)
