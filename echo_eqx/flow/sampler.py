"""Euler integration from noise (t = 1) to latents (t = 0), in one go or block by block.

Keys and values of text and reference are computed once, and the guidance branches run as one batch.
All numbers in `SamplerSettings`, the step count among them, are traced, so changing them never
recompiles. Latents are padded to `padded_frames`, and the padding is masked, so that few lengths
are ever compiled.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from echo_eqx.errors import UsageError
from echo_eqx.flow.conditions import encode_conditions
from echo_eqx.flow.euler import EulerState, TracedSettings, euler_steps, guidance_branches
from echo_eqx.generation import SamplerSettings
from echo_eqx.model.dit import EchoDiT, Prefix

FRAME_BUCKET = 128
"""Lengths in latent frames are padded to a multiple of this, if they are not short."""
SHORT_BUCKETS = (32, 64, 96, 128, 192)
"""What shorter lengths are padded to."""
Progress = Callable[[int, int], None]
"""Called with the number of steps done and the total."""


def sample(
    dit: EchoDiT,
    text_ids: Int[Array | np.ndarray, "b s"],
    text_mask: Bool[Array | np.ndarray, "b s"],
    speaker_latents: Float[Array | np.ndarray, "b r c"] | None = None,
    speaker_mask: Bool[Array | np.ndarray, "b r"] | None = None,
    *,
    num_frames: int | None = None,
    settings: SamplerSettings | None = None,
    noise: Float[Array | np.ndarray, "b t c"] | None = None,
    progress: Progress | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "b t c"]:
    """Latents (b, num_frames, latent_dim) for a batch of texts, float32.

    **Arguments**:
    - Text and reference as in `EchoDiT.__call__`, with a leading batch axis. Without a reference
      the voice is arbitrary.
    - `num_frames`: by default the longest seen in training.
    - `settings`: by default `SamplerSettings()`, not what the checkpoint recommends.
    - Either `key`, from which each row gets its own noise, or standard normal `noise` of shape
      (b, num_frames, latent_dim).
    - `progress`: called after every step.

    **Raises**: `UsageError` if a setting is out of range or shapes do not match.
    """
    settings = settings or SamplerSettings()
    traced = trace_settings(settings, dit.config.num_layers)
    batch, latent_dim = text_ids.shape[0], dit.config.latent_dim
    if (noise is None) == (key is None):
        raise UsageError("sample: expected either key or noise")
    if num_frames is None:
        num_frames = dit.config.max_frames if noise is None else int(np.shape(noise)[1])
    if num_frames < 1:
        raise UsageError(f"num_frames: expected at least 1, got {num_frames}")
    padded = padded_frames(num_frames, dit.config.max_frames)
    if noise is None:
        assert key is not None
        noise = initial_noise(key, batch, padded, latent_dim)
    elif noise.shape == (batch, num_frames, latent_dim):
        noise = jnp.pad(noise, ((0, 0), (0, padded - num_frames), (0, 0)))
    else:
        raise UsageError(
            f"noise: expected shape {(batch, num_frames, latent_dim)}, got {noise.shape}"
        )
    conditions = encode_conditions(dit, text_ids, text_mask, speaker_latents, speaker_mask)
    frame_mask = jnp.arange(padded) < num_frames
    branches = guidance_branches(settings.guidance, speaker_latents is not None)
    x = noise * traced["noise_scale"]
    x = _integrate(dit, x, frame_mask, conditions, None, traced, branches, settings.steps, progress)
    return x[:, :num_frames]


def sample_blockwise(
    dit: EchoDiT,
    text_ids: Int[Array | np.ndarray, "b s"],
    text_mask: Bool[Array | np.ndarray, "b s"],
    speaker_latents: Float[Array | np.ndarray, "b r c"] | None = None,
    speaker_mask: Bool[Array | np.ndarray, "b r"] | None = None,
    *,
    block_sizes: Sequence[int],
    continuation: Float[Array | np.ndarray, "b f c"] | None = None,
    settings: SamplerSettings | None = None,
    noise: Sequence[Float[Array | np.ndarray, "b _ c"]] | None = None,
    progress: Progress | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "b t c"]:
    """Latents generated block by block, each conditioned on the previous ones.

    Only for models with `config.blockwise`.

    **Arguments**: as in `sample`, and
    - `block_sizes`: in frames, multiples of `config.patch_size`.
    - `continuation`: (b, f, c) latents to continue, f a multiple of `config.patch_size`.
    - `noise`: one (b, block_size, c) array per block, if no `key` is given.

    **Returns**: (b, f + sum(block_sizes), latent_dim) float32, including the continuation.

    **Raises**: `UsageError` if the model has no block-wise weights, or sizes do not match.
    """
    blocks = sample_blocks(
        dit,
        text_ids,
        text_mask,
        speaker_latents,
        speaker_mask,
        block_sizes=block_sizes,
        settings=[settings or SamplerSettings()] * len(block_sizes),
        continuation=continuation,
        noise=noise,
        progress=progress,
        key=key,
    )
    before = [] if continuation is None else [jnp.asarray(continuation, jnp.float32)]
    return jnp.concatenate([*before, *blocks], axis=1)


def sample_blocks(
    dit: EchoDiT,
    text_ids: Int[Array | np.ndarray, "b s"],
    text_mask: Bool[Array | np.ndarray, "b s"],
    speaker_latents: Float[Array | np.ndarray, "b r c"] | None = None,
    speaker_mask: Bool[Array | np.ndarray, "b r"] | None = None,
    *,
    block_sizes: Sequence[int],
    settings: Sequence[SamplerSettings],
    continuation: Float[Array | np.ndarray, "b f c"] | None = None,
    noise: Sequence[Float[Array | np.ndarray, "b _ c"]] | None = None,
    progress: Progress | None = None,
    key: PRNGKeyArray | None = None,
) -> Iterator[Float[Array, "b _ c"]]:
    """The blocks of `sample_blockwise`, one after the other, each with its own settings.

    Without `progress`, the device still computes a block when it is given.

    **Raises**: `UsageError` as `sample_blockwise` does.
    """
    patch, latent_dim = dit.config.patch_size, dit.config.latent_dim
    batch, done = text_ids.shape[0], 0 if continuation is None else continuation.shape[1]
    if not dit.config.blockwise:
        raise UsageError("this model has no latent_encoder, so it cannot generate block by block")
    for size in [*block_sizes, done]:
        if size % patch or (size < 1 and size != done):
            raise UsageError(
                f"block_sizes, continuation: expected positive multiples of {patch} frames, got "
                f"{size} frames"
            )
    if not block_sizes or (noise is None) == (key is None):
        raise UsageError("sample_blockwise: expected block_sizes, and either key or noise")
    given = [] if noise is None else [np.shape(block) for block in noise]
    if continuation is not None:
        given.append(np.shape(continuation))
    sizes = ([] if noise is None else [*block_sizes]) + ([done] if done else [])
    if given != [(batch, size, latent_dim) for size in sizes]:
        raise UsageError(
            f"noise, continuation: expected shapes ({batch}, frames, {latent_dim}) with {sizes} "
            f"frames, got {given}"
        )
    conditions = encode_conditions(dit, text_ids, text_mask, speaker_latents, speaker_mask)
    latents = jnp.zeros((batch, done + sum(block_sizes), latent_dim))
    if continuation is not None:
        latents = _write(latents, jnp.asarray(continuation), jnp.int32(0))
    steps_done, total = 0, sum(each.steps for each in settings)
    for index, (size, each) in enumerate(zip(block_sizes, settings, strict=True)):
        if key is not None:
            block = initial_noise(jr.fold_in(key, index), batch, size, latent_dim)
        else:
            assert noise is not None
            block = noise[index]
        traced = trace_settings(each, dit.config.num_layers)
        branches = guidance_branches(each.guidance, speaker_latents is not None)
        start = jnp.int32(done)
        prefix = _batched_prefix(dit, latents, start)
        block_progress = progress and _offset(progress, steps_done, total)
        x = block * traced["noise_scale"]
        mask = jnp.ones(size, bool)
        x = _integrate(
            dit, x, mask, conditions, prefix, traced, branches, each.steps, block_progress
        )
        yield x
        latents = _write(latents, x, start)
        done, steps_done = done + size, steps_done + each.steps


def padded_frames(num_frames: int, most: int) -> int:
    """`num_frames` rounded up to a bucket, or to `most` if that is less."""
    rounded = -(-num_frames // FRAME_BUCKET) * FRAME_BUCKET
    bucket = next((size for size in SHORT_BUCKETS if num_frames <= size), rounded)
    return min(bucket, most) if num_frames <= most else bucket


def initial_noise(key: PRNGKeyArray, batch: int, num_frames: int, latent_dim: int) -> Array:
    """Standard normal (batch, num_frames, latent_dim); a row is the same in any batch size."""
    keys = jax.vmap(lambda row: jr.fold_in(key, row))(jnp.arange(batch))
    return jax.vmap(lambda key: jr.normal(key, (num_frames, latent_dim)))(keys)


def settings_numbers(settings: SamplerSettings, num_layers: int) -> dict[str, np.float32]:
    """The numbers of the settings by name, as `TracedSettings` has them, on the host.

    **Raises**: `UsageError` if one is out of range.
    """
    settings.check()
    numbers = dataclasses.asdict(settings) | {"start_t": settings.first_time}
    del numbers["guidance"]
    if settings.speaker_kv_layers is None:
        numbers["speaker_kv_layers"] = num_layers
    return {name: np.float32(number) for name, number in numbers.items()}


def trace_settings(settings: SamplerSettings, num_layers: int) -> TracedSettings:
    return jax.tree.map(jnp.asarray, settings_numbers(settings, num_layers))


def _offset(progress: Progress, done: int, total: int) -> Progress:
    return lambda step, _: progress(done + step, total)


@eqx.filter_jit
def _batched_prefix(dit: EchoDiT, latents: Array, start: Array) -> Prefix:
    return jax.vmap(dit.encode_prefix, in_axes=(0, None))(latents, start)


@jax.jit
def _write(latents: Array, block: Array, start: Array) -> Array:
    """`latents` with `block` at frame `start`, which is traced: one program for all blocks."""
    return jax.lax.dynamic_update_slice_in_dim(latents, block, start, axis=1)


def _integrate(dit, x, frame_mask, conditions, prefix, traced, branches, steps, progress):
    def run(state: EulerState, first: int, last: int) -> EulerState:
        bounds = jnp.int32(first), jnp.int32(last)
        return euler_steps(dit, state, frame_mask, conditions, prefix, traced, branches, bounds)

    state = x, jnp.zeros_like(x)
    if progress is None:
        return run(state, 0, steps)[0]
    for step in range(steps):  # the same program as above, one step at a time
        state = jax.block_until_ready(run(state, step, step + 1))
        progress(step + 1, steps)
    return state[0]
