"""Euler integration from noise (t = 1) to latents (t = 0), in one go or block by block.

Keys and values of text and reference are computed once, and the guidance branches run as one batch.
All numbers in `SamplerSettings`, the step count among them, are traced, so changing them never
recompiles. Latents are padded to a multiple of `FRAME_BUCKET` frames, and the padding is masked, so
that few lengths are ever compiled.
"""

import dataclasses
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from echo_eqx.errors import UsageError
from echo_eqx.flow.conditions import encode_conditions
from echo_eqx.flow.guidance import guidance_update, rescale_score
from echo_eqx.generation import Guidance, SamplerSettings
from echo_eqx.model.dit import ConditionCache, EchoDiT, Prefix, SpeakerCache

FRAME_BUCKET = 128
"""Lengths in latent frames are padded to a multiple of this."""
Progress = Callable[[int, int], None]
"""Called with the number of steps done and the total."""
TracedSettings = dict[str, Float[Array, ""]]
"""The numbers of `SamplerSettings` by name, as arrays."""
EulerState = tuple[Float[Array, "b t c"], Float[Array, "b t c"]]
"""Latents, and the guidance that was last added to their velocity; zeros before the first."""


def sample(
    dit: EchoDiT,
    text_ids: Int[Array | np.ndarray, "b s"],
    text_mask: Bool[Array | np.ndarray, "b s"],
    speaker_latents: Float[Array | np.ndarray, "b r c"] | SpeakerCache | None = None,
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
      the voice is arbitrary. `speaker_latents` may be a `SpeakerCache` instead, of references
      encoded by `encode_speaker` and stacked by `stack_speakers`, without `speaker_mask`.
    - `num_frames`: by default the longest seen in training.
    - `settings`: by default `SamplerSettings()`, not what the checkpoint recommends.
    - Either `key`, from which each row gets its own noise, or standard normal `noise` of shape
      (b, num_frames, latent_dim).
    - `progress`: called after every step.

    **Raises**: `UsageError` if a setting is out of range or shapes do not match.
    """
    settings = settings or SamplerSettings()
    traced = _trace(settings, dit.config.num_layers)
    batch, latent_dim = text_ids.shape[0], dit.config.latent_dim
    if (noise is None) == (key is None):
        raise UsageError("sample: expected either key or noise")
    if num_frames is None:
        num_frames = dit.config.max_frames if noise is None else int(np.shape(noise)[1])
    if num_frames < 1:
        raise UsageError(f"num_frames: expected at least 1, got {num_frames}")
    padded = -(-num_frames // FRAME_BUCKET) * FRAME_BUCKET
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
    branches = _branches(settings.guidance, speaker_latents is not None)
    x = noise * traced["noise_scale"]
    x = _integrate(dit, x, frame_mask, conditions, None, traced, branches, settings.steps, progress)
    return x[:, :num_frames]


def sample_blockwise(
    dit: EchoDiT,
    text_ids: Int[Array | np.ndarray, "b s"],
    text_mask: Bool[Array | np.ndarray, "b s"],
    speaker_latents: Float[Array | np.ndarray, "b r c"] | SpeakerCache | None = None,
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
    settings = settings or SamplerSettings()
    traced = _trace(settings, dit.config.num_layers)
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
    branches = _branches(settings.guidance, speaker_latents is not None)
    latents = jnp.zeros((batch, done + sum(block_sizes), latent_dim))
    if continuation is not None:
        latents = _write(latents, jnp.asarray(continuation), jnp.int32(0))
    total_steps = settings.steps * len(block_sizes)
    for index, size in enumerate(block_sizes):
        if key is not None:
            block = initial_noise(jr.fold_in(key, index), batch, size, latent_dim)
        else:
            assert noise is not None
            block = noise[index]
        start = jnp.int32(done)
        prefix = _batched_prefix(dit, latents, start)
        block_progress = progress and _offset(progress, index * settings.steps, total_steps)
        x = block * traced["noise_scale"]
        mask = jnp.ones(size, bool)
        x = _integrate(
            dit, x, mask, conditions, prefix, traced, branches, settings.steps, block_progress
        )
        latents = _write(latents, x, start)
        done += size
    return latents


def initial_noise(key: PRNGKeyArray, batch: int, num_frames: int, latent_dim: int) -> Array:
    """Standard normal (batch, num_frames, latent_dim); a row is the same in any batch size."""
    keys = jax.vmap(lambda row: jr.fold_in(key, row))(jnp.arange(batch))
    return jax.vmap(lambda key: jr.normal(key, (num_frames, latent_dim)))(keys)


def _trace(settings: SamplerSettings, num_layers: int) -> TracedSettings:
    settings.check()
    numbers = dataclasses.asdict(settings) | {"start_t": settings.first_time}
    del numbers["guidance"]
    if settings.speaker_kv_layers is None:
        numbers["speaker_kv_layers"] = num_layers
    return {name: jnp.float32(number) for name, number in numbers.items()}


def _offset(progress: Progress, done: int, total: int) -> Progress:
    return lambda step, _: progress(done + step, total)


def _branches(guidance: Guidance, has_speaker: bool) -> tuple[str, ...]:
    """The condition that each guidance branch drops. Without a reference, only the text is."""
    if guidance == "joint":
        return ("both",)
    if not has_speaker:
        return ("text",)
    return ("text", "speaker") if guidance == "independent" else ("alternating",)


@eqx.filter_jit
def _batched_prefix(dit: EchoDiT, latents: Array, start: Array) -> Prefix:
    return jax.vmap(dit.encode_prefix, in_axes=(0, None))(latents, start)


@jax.jit
def _write(latents: Array, block: Array, start: Array) -> Array:
    """`latents` with `block` at frame `start`, which is traced: one program for all blocks."""
    return jax.lax.dynamic_update_slice_in_dim(latents, block, start, axis=1)


def timestep(step: Int[Array, ""], settings: TracedSettings) -> Float[Array, ""]:
    """The time before step `step` of `settings["steps"]`, from `start_t` down to 0.

    It is `start_t (1 - p')`, where `p' = p + sway (cos(pi p / 2) - 1 + p)` and `p` is the share of
    steps done: sway sampling (F5-TTS, Chen et al., arXiv:2410.06885), where 0 is noise and 1 data.
    """
    done = step.astype(jnp.float32) / settings["steps"]
    swayed = done + settings["sway"] * (jnp.cos(jnp.pi / 2 * done) - 1.0 + done)
    return settings["start_t"] * (1.0 - swayed)


def _integrate(dit, x, frame_mask, conditions, prefix, traced, branches, steps, progress):
    def run(state: EulerState, first: int, last: int) -> EulerState:
        bounds = jnp.int32(first), jnp.int32(last)
        return _euler(dit, state, frame_mask, conditions, prefix, traced, branches, bounds)

    state = x, jnp.zeros_like(x)
    if progress is None:
        return run(state, 0, steps)[0]
    for step in range(steps):  # the same program as above, one step at a time
        state = jax.block_until_ready(run(state, step, step + 1))
        progress(step + 1, steps)
    return state[0]


@eqx.filter_jit
def _euler(
    dit: EchoDiT,
    state: EulerState,
    frame_mask: Bool[Array, " t"],
    conditions: ConditionCache,
    prefix: Prefix | None,
    settings: TracedSettings,
    branches: tuple[str, ...],
    bounds: tuple[Int[Array, ""], Int[Array, ""]],
) -> EulerState:
    """Steps `bounds[0]` to `bounds[1]` of `settings["steps"]`: `x += v (t_next - t)`."""
    layers = jnp.arange(dit.config.num_layers, dtype=jnp.float32)
    every = settings["guidance_every"].astype(jnp.int32)

    def velocities(
        x: Array, t: Array, keeps_text: Bool[Array, " m"], keeps_speaker: Bool[Array, " m"]
    ) -> Float[Array, "m b t c"]:
        is_scaled = (t >= settings["speaker_kv_min_t"]) & (layers < settings["speaker_kv_layers"])
        speaker_scale = jnp.where(is_scaled, settings["speaker_kv_scale"], 1.0)

        def velocity(x, conditions: ConditionCache, prefix, keeps_text, keeps_speaker):
            kept = ConditionCache(
                conditions.text,
                conditions.text_mask & keeps_text,
                conditions.speaker,
                conditions.speaker_mask & keeps_speaker,
            )
            return dit.velocity(
                x, t, kept, frame_mask=frame_mask, speaker_scale=speaker_scale, prefix=prefix
            )

        batched = jax.vmap(velocity, in_axes=(0, 0, 0, None, None))
        batched = jax.vmap(batched, in_axes=(0, None, None, 0, 0))
        branches_x = jnp.broadcast_to(x, (len(keeps_text), *x.shape))
        v = batched(branches_x, conditions, prefix, keeps_text, keeps_speaker)
        return jnp.where(frame_mask[None, None, :, None], v, 0.0)

    def reused(x: Array, t: Array, step: Array, update: Array) -> EulerState:
        keeps = jnp.ones(1, bool)
        return velocities(x, t, keeps, keeps)[0] + update, update

    def guided(x: Array, t: Array, step: Array, _: Array) -> EulerState:
        even, yes, no = step // every % 2 == 0, jnp.bool_(True), jnp.bool_(False)
        text_scale, speaker_scale = settings["cfg_scale"], settings["speaker_scale"]
        # By branch: whether it keeps the text, whether it keeps the reference, and its scale.
        table = {
            "text": (no, yes, text_scale),
            "speaker": (yes, no, speaker_scale),
            "both": (no, no, text_scale),
            "alternating": (~even, even, jnp.where(even, text_scale, speaker_scale)),
        }
        keeps_text, keeps_speaker, scales = zip(*(table[name] for name in branches), strict=True)
        v, *dropped = velocities(
            x, t, jnp.stack([yes, *keeps_text]), jnp.stack([yes, *keeps_speaker])
        )
        update = sum(
            guidance_update(v, without, scale, settings["apg_eta"])
            for scale, without in zip(scales, dropped, strict=True)
        )
        return v + update, update

    def is_guided(step: Array) -> Bool[Array, ""]:
        t = timestep(step, settings)
        return (t >= settings["cfg_min_t"]) & (t <= settings["cfg_max_t"])

    def body(step: Array, state: EulerState) -> EulerState:
        x, update = state
        t, t_next = timestep(step, settings), timestep(step + 1, settings)
        is_first = (step == 0) | ~is_guided(step - 1)
        is_new = is_guided(step) & ((step % every == 0) | is_first)
        update = jnp.where(is_guided(step), update, 0.0)
        v, update = jax.lax.cond(is_new, guided, reused, x, t, step, update)
        v = rescale_score(v, x, t, settings["rescale_k"], settings["rescale_sigma"])
        return x + v * (t_next - t), update

    return jax.lax.fori_loop(*bounds, body, state)
