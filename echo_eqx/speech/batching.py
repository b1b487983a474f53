"""Chunks of text sampled in batches, padded to a few lengths so that few programs are compiled."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.flow.sampler import FRAME_BUCKET, Progress, sample, sample_blocks, sample_blockwise
from echo_eqx.generation import SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.chunks import Chunk

TEXT_BUCKETS = (64, 128, 256, 512)
"""Lengths in bytes to which texts are padded; longer ones to a multiple of 256."""


class Lengths(NamedTuple):
    """Lengths of a batch. Chunks with equal ones share a compiled program."""

    frames: int
    text: int
    """Bytes to which the texts are padded."""
    speaker: int
    """Frames to which the references are padded, 0 without."""


class BatchSampler:
    """Samples the latents of chunks, and reports progress over all batches together."""

    def __init__(
        self,
        dit: EchoDiT,
        block_frames: int | None,
        settings: SamplerSettings,
        batch_size: int,
        progress: Progress | None,
    ):
        self._dit, self._block_frames, self._settings = dit, block_frames, settings
        self._batch_size, self._progress = batch_size, progress
        self._steps_done = 0

    def __call__(
        self, chunks: list[Chunk], later: Sequence[Chunk] = ()
    ) -> dict[tuple[int, ...], np.ndarray]:
        """Latents (chunk.num_frames, c) of each chunk by its index.

        `later` are chunks that will follow; they count towards the total of the progress.
        """
        batches = list(_batches(chunks, self._batch_size))
        all_lengths = [lengths for lengths, _ in [*batches, *_batches(later, self._batch_size)]]
        total = self._steps_done + sum(map(self._num_steps, all_lengths))
        latents = {}
        for lengths, members in batches:
            progress = self._progress and _offset(self._progress, self._steps_done, total)
            for chunk, row in zip(members, self._sample(members, lengths, progress), strict=False):
                latents[chunk.index] = row
            self._steps_done += self._num_steps(lengths)
        return latents

    def block_sizes(self, num_frames: int) -> list[int]:
        """Sizes of the blocks of block-wise sampling; empty without `block_frames`.

        **Raises**: `UsageError` if they are not whole patches.
        """
        size = self._block_frames
        return [] if size is None else plan_blocks([size], num_frames, self._dit.config.patch_size)

    def _num_steps(self, lengths: Lengths) -> int:
        return self._settings.steps * max(1, len(self.block_sizes(lengths.frames)))

    def _sample(
        self, chunks: list[Chunk], lengths: Lengths, progress: Progress | None
    ) -> np.ndarray:
        # The number of rows is a power of two; the first chunk fills the rest.
        size = 1 << (len(chunks) - 1).bit_length()
        filled = chunks + chunks[:1] * (size - len(chunks))
        inputs = conditions(filled)
        noise = _noise(filled, lengths.frames, self._dit.config.latent_dim)
        if sizes := self.block_sizes(lengths.frames):
            latents = sample_blockwise(
                self._dit,
                *inputs,
                block_sizes=sizes,
                noise=jnp.split(noise, np.cumsum(sizes)[:-1], axis=1),
                settings=self._settings,
                progress=progress,
            )
        else:
            latents = sample(
                self._dit, *inputs, noise=noise, settings=self._settings, progress=progress
            )
        return read_latents(latents)


def plan_blocks(sizes: Sequence[int], total: int, patch: int) -> list[int]:
    """Frames of each block of block-wise sampling: `sizes`, of which the last one repeats until
    there are `total` frames. The last block may be shorter.

    **Raises**: `UsageError` if the frames are not whole patches.
    """
    for size in (*sizes, total):
        if size < 1 or size % patch:
            raise UsageError(
                f"blocks: expected positive multiples of {patch} frames, got blocks of "
                f"{', '.join(map(str, sizes))} and a total of {total}; see block_frames, duration"
            )
    planned: list[int] = []
    while total:
        planned.append(min(sizes[min(len(planned), len(sizes) - 1)], total))
        total -= planned[-1]
    return planned


def start_chunk(dit: EchoDiT, chunk: Chunk, settings: SamplerSettings) -> Array:
    """Latents (1, chunk.num_frames, c) of a chunk as a `BatchSampler` gives them, which the device
    starts to compute."""
    noise = _noise([chunk], chunk.num_frames, dit.config.latent_dim)
    return sample(dit, *conditions([chunk]), noise=noise, settings=settings)


def start_blocks(
    dit: EchoDiT, chunk: Chunk, block_sizes: Sequence[int], settings: Sequence[SamplerSettings]
) -> Iterator[Array]:
    """The blocks (1, size, c) of a chunk, each with its settings. When one is given, the device
    starts to compute it."""
    noise = _noise([chunk], sum(block_sizes), dit.config.latent_dim)
    return sample_blocks(
        dit,
        *conditions([chunk]),
        block_sizes=block_sizes,
        settings=settings,
        noise=jnp.split(noise, np.cumsum(block_sizes)[:-1], axis=1),
    )


def read_latents(latents: Array) -> np.ndarray:
    """Latents from the device.

    **Raises**: `EchoError` if they are not finite.
    """
    array = np.asarray(latents)
    if not np.isfinite(array).all():
        raise EchoError(
            "expected finite latents from the sampler, got NaN or infinity; use gentler settings "
            "(guidance scales, rescale_k, noise_scale) or other weights"
        )
    return array


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not less than `length`."""
    return -(-length // multiple) * multiple


def _lengths(chunk: Chunk) -> Lengths:
    size = len(chunk.ids)
    text = next((n for n in TEXT_BUCKETS if size <= n), round_up(size, 256))
    speaker = 0 if chunk.speaker is None else round_up(len(chunk.speaker), FRAME_BUCKET)
    return Lengths(chunk.num_frames, text, speaker)


def _batches(chunks: Sequence[Chunk], batch_size: int) -> Iterator[tuple[Lengths, list[Chunk]]]:
    by_lengths = defaultdict(list)
    for chunk in chunks:
        by_lengths[_lengths(chunk)].append(chunk)
    for lengths, members in sorted(by_lengths.items(), key=lambda item: item[0]):
        for start in range(0, len(members), batch_size):
            yield lengths, members[start : start + batch_size]


def _offset(progress: Progress, first_step: int, total: int) -> Progress:
    return lambda step, _: progress(first_step + step, total)


def conditions(chunks: list[Chunk]) -> tuple[Any, ...]:
    """Texts and references as `sample` takes them, each with its mask. Chunks of a batch have the
    same padded lengths."""
    lengths = _lengths(chunks[0])
    text = _padded([chunk.ids for chunk in chunks], lengths.text)
    references = [chunk.speaker for chunk in chunks if chunk.speaker is not None]
    return *text, *(_padded(references, lengths.speaker) if references else (None, None))


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
