"""Chunks of text sampled in batches, padded to a few lengths so that few programs are compiled."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.flow.sampler import FRAME_BUCKET, Progress, sample, sample_blockwise
from echo_eqx.generation import SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.chunks import Chunk

TEXT_BUCKETS = (64, 128, 256, 512)
"""Lengths in bytes to which texts are padded; longer ones to a multiple of 256."""


class BatchSampler:
    """Samples the latents of chunks, and reports progress over all batches together."""

    def __init__(
        self,
        dit: EchoDiT,
        num_frames: int,
        block_frames: int | None,
        settings: SamplerSettings,
        batch_size: int,
        progress: Progress | None,
    ):
        self._dit, self._num_frames, self._settings = dit, num_frames, settings
        self._block_sizes = _block_sizes(num_frames, block_frames, dit.config.patch_size)
        self._batch_size, self._progress = batch_size, progress
        self._batches_done = 0

    def __call__(
        self, chunks: list[Chunk], later: Sequence[Chunk] = ()
    ) -> dict[tuple[int, ...], np.ndarray]:
        """Latents (num_frames, c) of each chunk by its index.

        `later` are chunks that will follow; they count towards the total of the progress.
        """
        batches = list(_batches(chunks, self._batch_size))
        num_later = sum(1 for _ in _batches(later, self._batch_size))
        total = self._batches_done + len(batches) + num_later
        steps = self._settings.steps * max(1, len(self._block_sizes))
        latents = {}
        for lengths, members in batches:
            first_step = self._batches_done * steps
            progress = self._progress and _offset(self._progress, first_step, total * steps)
            for chunk, row in zip(members, self._sample(members, lengths, progress), strict=False):
                latents[chunk.index] = row
            self._batches_done += 1
        return latents

    def _sample(
        self, chunks: list[Chunk], lengths: tuple[int, int], progress: Progress | None
    ) -> np.ndarray:
        text_length, speaker_length = lengths
        # The number of rows is a power of two; the first chunk fills the rest.
        size = 1 << (len(chunks) - 1).bit_length()
        filled = chunks + chunks[:1] * (size - len(chunks))
        text = _padded([chunk.ids for chunk in filled], text_length)
        references = [chunk.speaker for chunk in filled if chunk.speaker is not None]
        speaker = _padded(references, speaker_length) if references else (None, None)
        noise = _noise(filled, self._num_frames, self._dit.config.latent_dim)
        if self._block_sizes:
            latents = sample_blockwise(
                self._dit,
                *text,
                *speaker,
                block_sizes=self._block_sizes,
                noise=jnp.split(noise, np.cumsum(self._block_sizes)[:-1], axis=1),
                settings=self._settings,
                progress=progress,
            )
        else:
            latents = sample(
                self._dit,
                *text,
                *speaker,
                noise=noise,
                settings=self._settings,
                progress=progress,
            )
        latents = np.asarray(latents)
        if not np.isfinite(latents).all():
            raise EchoError(
                "expected finite latents from the sampler, got NaN or infinity; use gentler "
                "settings (guidance scales, rescale_k, noise_scale) or other weights"
            )
        return latents


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not less than `length`."""
    return -(-length // multiple) * multiple


def _block_sizes(num_frames: int, block_frames: int | None, patch_size: int) -> list[int]:
    """Sizes of the blocks of block-wise sampling; empty without `block_frames`."""
    if block_frames is None:
        return []
    if block_frames < 1 or block_frames % patch_size or num_frames % patch_size:
        raise UsageError(
            f"block_frames, duration: expected multiples of {patch_size} frames, got blocks of "
            f"{block_frames} and a total of {num_frames}"
        )
    whole, rest = divmod(num_frames, block_frames)
    return [block_frames] * whole + [rest] * (rest > 0)


def _buckets(chunk: Chunk) -> tuple[int, int]:
    """Padded lengths of text and reference. Chunks with equal ones share a compiled program."""
    size = len(chunk.ids)
    text = next((n for n in TEXT_BUCKETS if size <= n), round_up(size, 256))
    return text, 0 if chunk.speaker is None else round_up(len(chunk.speaker), FRAME_BUCKET)


def _batches(
    chunks: Sequence[Chunk], batch_size: int
) -> Iterator[tuple[tuple[int, int], list[Chunk]]]:
    by_lengths = defaultdict(list)
    for chunk in chunks:
        by_lengths[_buckets(chunk)].append(chunk)
    for lengths, members in sorted(by_lengths.items(), key=lambda item: item[0]):
        for start in range(0, len(members), batch_size):
            yield lengths, members[start : start + batch_size]


def _offset(progress: Progress, first_step: int, total: int) -> Progress:
    return lambda step, _: progress(first_step + step, total)


def _noise(chunks: list[Chunk], num_frames: int, latent_dim: int) -> Array:
    """Standard normal; a row depends on the seed and the place in the text, not on the batch."""
    keys = jnp.stack([reduce(jr.fold_in, chunk.index[1:], jr.key(chunk.seed)) for chunk in chunks])
    return jax.vmap(lambda key: jr.normal(key, (num_frames, latent_dim)))(keys)


def _padded(arrays: list[np.ndarray], length: int) -> tuple[Array, Array]:
    """The arrays padded with zeros and stacked, and the mask of what is not padding."""
    out = np.zeros((len(arrays), length, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    mask = np.arange(length)[None] < np.array([[len(array)] for array in arrays])
    return jnp.asarray(out), jnp.asarray(mask)
