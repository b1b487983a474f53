"""Encode clips to latents: audio is decoded in threads and encoded in batches of a few lengths."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from echo_eqx.codec.codec import Codec
from echo_eqx.data.reference import set_loudness
from echo_eqx.errors import EchoError
from echo_eqx.prepare.clips import Clip

LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768)
"""Lengths in frames that clips are padded to with silence, so that few programs are compiled."""


@dataclass(frozen=True)
class EncodeSettings:
    latents: str = "mean"
    """`mean`, or `sample`: drawn from the bottleneck's normal distribution, seeded by the key."""
    lufs: float | None = None
    """Integrated loudness to normalize to; None leaves it as it is."""
    batch_size: int = 1
    seed: int = 0


class ClipEncoder:
    """Encodes clips with a codec, on all local devices."""

    def __init__(self, codec: Codec, settings: EncodeSettings):
        self.codec, self.settings = codec, settings
        devices = np.array(jax.local_devices())
        self._rows = settings.batch_size * len(devices) if settings.batch_size > 1 else 1
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.sharding.Mesh(devices, ("batch",), axis_types=auto)
        self._sharding = NamedSharding(mesh, P("batch"))

    def __call__(
        self, clips: Sequence[Clip], done: Callable[[int], object]
    ) -> dict[str, np.ndarray | EchoError]:
        """(frames, channels) float16 of each clip by key, or why it cannot be decoded.

        `done` is called after each batch with its number of clips.
        """
        results: dict[str, np.ndarray | EchoError] = {}
        waiting: dict[int, list[tuple[Clip, np.ndarray]]] = defaultdict(list)
        for clip, audio in self._decoded(clips):
            if isinstance(audio, EchoError):
                results[clip.key] = audio
                done(1)
                continue
            frames = -(-len(audio) // self.codec.config.hop)
            # Pad at least by the receptive field, so that latents do not depend on the length.
            needed = frames + self.codec.encoder_context[1]
            length = next((n for n in LENGTHS if needed <= n), needed)
            waiting[length].append((clip, audio))
            if len(waiting[length]) == self._rows:
                results |= self._encoded(length, waiting.pop(length))
                done(self._rows)
        for length, batch in sorted(waiting.items()):
            results |= self._encoded(length, batch)
            done(len(batch))
        return results

    def _decoded(self, clips: Sequence[Clip]) -> Iterator[tuple[Clip, np.ndarray | EchoError]]:
        """Clips in order, decoded ahead by a few threads."""

        def load(clip: Clip) -> np.ndarray | EchoError:
            try:
                rate = self.codec.config.sample_rate
                audio, lufs = clip.load(rate), self.settings.lufs
                is_short = len(audio) <= 0.4 * rate  # loudness is measured in blocks of 0.4 s
                return audio if lufs is None or is_short else set_loudness(audio, rate, lufs)
            except EchoError as error:
                return error

        with ThreadPoolExecutor(4) as pool:
            ahead = 4 + 2 * self._rows
            futures = [pool.submit(load, clip) for clip in clips[:ahead]]
            for i, clip in enumerate(clips):
                audio = futures[i].result()
                futures[i] = None  # type: ignore[call-overload]
                if i + ahead < len(clips):
                    futures.append(pool.submit(load, clips[i + ahead]))
                yield clip, audio

    def _encoded(self, length: int, batch: list[tuple[Clip, np.ndarray]]) -> dict[str, np.ndarray]:
        hop = self.codec.config.hop
        padded = np.zeros((self._rows, length * hop), np.float32)
        for row, (_, audio) in zip(padded, batch, strict=False):
            row[: len(audio)] = audio
        if self._rows == 1:  # in chunks, with constant memory
            moments = [moment[None] for moment in self.codec.encode(padded[0])]
        else:
            moments = _encode_rows(self.codec, jax.device_put(padded, self._sharding))
        mean, std = (np.asarray(moment, np.float32) for moment in moments)
        out = {}
        for i, (clip, audio) in enumerate(batch):
            frames = -(-len(audio) // hop)
            latents = mean[i, :frames]
            if self.settings.latents == "sample":
                latents = latents + std[i, :frames] * _noise(clip, latents.shape, self.settings)
            out[clip.key] = latents.astype(np.float16)
        return out


@eqx.filter_jit
def _encode_rows(codec: Codec, audio: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(codec.moments)(audio)


def _noise(clip: Clip, shape: tuple[int, ...], settings: EncodeSettings) -> np.ndarray:
    digest = hashlib.sha256(f"{settings.seed} {clip.key}".encode()).digest()
    key = jr.key(int.from_bytes(digest[:4], "little"))
    return np.asarray(jr.normal(key, shape))


def encode_silence(codec: Codec, frames: int) -> np.ndarray:
    """(frames, channels) float16: latents of digital silence."""
    mean, _ = codec.encode(jnp.zeros(frames * codec.config.hop, jnp.float32))
    return np.asarray(mean).astype(np.float16)
