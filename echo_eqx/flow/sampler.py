"""Euler integration from noise (t = 1) to latents (t = 0), one canvas or block by block.

Text and reference keys are computed once; the branches of guidance run as one batch. All numbers in
`SamplerSettings`, the step count among them, are data to the compiled program: changing them
compiles nothing. A canvas is padded to a multiple of `CANVAS_CLASS` frames, and frames behind its
end are masked, so that few lengths are ever compiled.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from echo_eqx.errors import UsageError
from echo_eqx.flow.guidance import guidance_update, rescale_score
from echo_eqx.generation import Guidance, SamplerSettings
from echo_eqx.model.dit import Context, EchoDiT, Prefix

CANVAS_CLASS = 128
Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


class _Knobs(eqx.Module):
    """The settings as arrays."""

    steps: Int[Array, ""]
    cfg_scale: Float[Array, ""]
    speaker_scale: Float[Array, ""]
    cfg_min_t: Float[Array, ""]
    cfg_max_t: Float[Array, ""]
    apg_eta: Float[Array, ""]
    start_t: Float[Array, ""]
    rescale_k: Float[Array, ""]
    rescale_sigma: Float[Array, ""]
    speaker_kv_scale: Float[Array, ""]
    speaker_kv_min_t: Float[Array, ""]
    speaker_kv_layers: Int[Array, ""]

    @classmethod
    def of(cls, settings: SamplerSettings, num_layers: int) -> "_Knobs":
        settings.check()
        layers = settings.speaker_kv_layers
        return cls(
            steps=jnp.int32(settings.steps),
            cfg_scale=jnp.float32(settings.cfg_scale),
            speaker_scale=jnp.float32(settings.speaker_scale),
            cfg_min_t=jnp.float32(settings.cfg_min_t),
            cfg_max_t=jnp.float32(settings.cfg_max_t),
            apg_eta=jnp.float32(settings.apg_eta),
            start_t=jnp.float32(settings.first_time),
            rescale_k=jnp.float32(settings.rescale_k),
            rescale_sigma=jnp.float32(settings.rescale_sigma),
            speaker_kv_scale=jnp.float32(settings.speaker_kv_scale),
            speaker_kv_min_t=jnp.float32(settings.speaker_kv_min_t),
            speaker_kv_layers=jnp.int32(num_layers if layers is None else layers),
        )


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

    **Arguments**: text and reference as in `EchoDiT.__call__` with a leading batch axis, the
    reference None for no voice in particular; `num_frames` the canvas, by default the longest seen
    in training; either `key`, from which each row of the batch draws its own noise, or `noise` of
    unit normals; `progress` is called after every step.

    **Raises**: `UsageError` if a setting is out of range or shapes contradict each other.
    """
    settings = settings or SamplerSettings()
    knobs = _Knobs.of(settings, dit.config.num_layers)
    batch, latent_dim = text_ids.shape[0], dit.config.latent_dim
    if (noise is None) == (key is None):
        raise UsageError("sample wants either key or noise")
    if num_frames is None:
        num_frames = dit.config.max_frames if noise is None else int(np.shape(noise)[1])
    if num_frames < 1:
        raise UsageError(f"num_frames is {num_frames}; wanted at least 1")
    padded = -(-num_frames // CANVAS_CLASS) * CANVAS_CLASS
    if noise is None:
        assert key is not None
        noise = draw_noise(key, batch, padded, latent_dim)
    elif noise.shape == (batch, num_frames, latent_dim):
        noise = jnp.pad(noise, ((0, 0), (0, padded - num_frames), (0, 0)))
    else:
        raise UsageError(f"noise has shape {noise.shape}; wanted {(batch, num_frames, latent_dim)}")
    context = _context_of(dit, text_ids, text_mask, speaker_latents, speaker_mask)
    frame_mask = jnp.arange(padded) < num_frames
    branches = _branches(settings.guidance, speaker_latents is not None)
    x = noise * jnp.float32(settings.noise_scale)
    x = _integrate(dit, x, frame_mask, context, None, knobs, branches, settings.steps, progress)
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
    """Latents block after block, each seeing the clean ones before it; for block-wise models.

    **Arguments**: as in `sample`; `block_sizes` in frames, multiples of the config's `patch_size`;
    `continuation` latents that stand already, f frames, also such a multiple; `noise` one array per
    block, where `key` is not given.

    **Returns**: (b, f + sum(block_sizes), latent_dim), the continuation included.

    **Raises**: `UsageError` if the model has no block-wise weights, or sizes do not fit.
    """
    settings = settings or SamplerSettings()
    knobs = _Knobs.of(settings, dit.config.num_layers)
    patch, latent_dim = dit.config.patch_size, dit.config.latent_dim
    batch, done = text_ids.shape[0], 0 if continuation is None else continuation.shape[1]
    if not dit.config.blockwise:
        raise UsageError("this model has no latent_encoder, so it cannot go on block by block")
    for size in [*block_sizes, done]:
        if size % patch or (size < 1 and size != done):
            raise UsageError(
                f"a block or continuation has {size} frames; wanted positive multiples of {patch}"
            )
    if not block_sizes or (noise is None) == (key is None):
        raise UsageError("sample_blockwise wants block_sizes, and either key or noise")
    given = [] if noise is None else [np.shape(block) for block in noise]
    if continuation is not None:
        given.append(np.shape(continuation))
    sizes = ([] if noise is None else [*block_sizes]) + ([done] if done else [])
    if given != [(batch, size, latent_dim) for size in sizes]:
        raise UsageError(
            f"noise and continuation have shapes {given}; wanted ({batch}, frames, {latent_dim}) "
            f"with {sizes} frames"
        )
    context = _context_of(dit, text_ids, text_mask, speaker_latents, speaker_mask)
    branches = _branches(settings.guidance, speaker_latents is not None)
    latents = jnp.zeros((batch, done + sum(block_sizes), latent_dim))
    if continuation is not None:
        latents = latents.at[:, :done].set(continuation)
    steps_in_all = settings.steps * len(block_sizes)
    for index, size in enumerate(block_sizes):
        if key is not None:
            block = draw_noise(jr.fold_in(key, index), batch, size, latent_dim)
        else:
            assert noise is not None
            block = noise[index]
        prefix = _batched_prefix(dit, latents, jnp.int32(done))
        shown = progress and _offset(progress, index * settings.steps, steps_in_all)
        x = block * jnp.float32(settings.noise_scale)
        mask = jnp.ones(size, bool)
        x = _integrate(dit, x, mask, context, prefix, knobs, branches, settings.steps, shown)
        latents = latents.at[:, done : done + size].set(x)
        done += size
    return latents


def draw_noise(key: PRNGKeyArray, batch: int, num_frames: int, latent_dim: int) -> Array:
    """Unit normals (batch, num_frames, latent_dim); a row does not depend on the batch's size."""
    keys = jax.vmap(lambda row: jr.fold_in(key, row))(jnp.arange(batch))
    return jax.vmap(lambda key: jr.normal(key, (num_frames, latent_dim)))(keys)


def _offset(progress: Progress, done: int, total: int) -> Progress:
    return lambda step, _: progress(done + step, total)


def _branches(guidance: Guidance, has_speaker: bool) -> tuple[str, ...]:
    """What each guidance branch drops. A reference that is not there needs no branch."""
    if guidance == "joint":
        return ("both",)
    if not has_speaker:
        return ("text",)
    return ("text", "speaker") if guidance == "independent" else ("text or speaker",)


def _context_of(dit, text_ids, text_mask, speaker_latents, speaker_mask) -> Context:
    batch, patch = text_ids.shape[0], dit.config.patch_size
    if (speaker_latents is None) != (speaker_mask is None):
        raise UsageError("a reference needs both its latents and its mask")
    if speaker_latents is None:
        speaker_latents = jnp.zeros((batch, patch, dit.config.latent_dim))
        speaker_mask = jnp.zeros((batch, patch), bool)
    shape = (batch, speaker_latents.shape[1], dit.config.latent_dim)
    if speaker_latents.shape != shape or shape[1] % patch or shape[1] == 0:
        raise UsageError(
            f"the reference has shape {speaker_latents.shape}; wanted "
            f"({batch}, frames, {dit.config.latent_dim}) with frames a multiple of {patch}"
        )
    return _batched_context(dit, text_ids, text_mask, speaker_latents, speaker_mask)


@eqx.filter_jit
def _batched_context(dit: EchoDiT, *inputs: Array) -> Context:
    return jax.vmap(dit.context)(*inputs)


@eqx.filter_jit
def _batched_prefix(dit: EchoDiT, latents: Array, start: Array) -> Prefix:
    return jax.vmap(dit.prefix, in_axes=(0, None))(latents, start)


def _integrate(dit, x, frame_mask, context, prefix, knobs, branches, steps, progress):
    def run(x, first: int, last: int):
        bounds = jnp.int32(first), jnp.int32(last)
        return _euler(dit, x, frame_mask, context, prefix, knobs, branches, bounds)

    if progress is None:
        return run(x, 0, steps)
    for step in range(steps):  # the same program as above, a step at a time
        x = jax.block_until_ready(run(x, step, step + 1))
        progress(step + 1, steps)
    return x


@eqx.filter_jit
def _euler(
    dit: EchoDiT,
    x: Float[Array, "b t c"],
    frame_mask: Bool[Array, " t"],
    context: Context,
    prefix: Prefix | None,
    knobs: _Knobs,
    branches: tuple[str, ...],
    bounds: tuple[Int[Array, ""], Int[Array, ""]],
) -> Float[Array, "b t c"]:
    """Steps `bounds[0]` to `bounds[1]` of `knobs.steps`: `x += v (t_next - t)`."""
    layers = jnp.arange(dit.config.num_layers)

    def velocities(
        x: Array, t: Array, text_on: Bool[Array, " m"], speaker_on: Bool[Array, " m"]
    ) -> Float[Array, "m b t c"]:
        holds = (t >= knobs.speaker_kv_min_t) & (layers < knobs.speaker_kv_layers)
        speaker_scale = jnp.where(holds, knobs.speaker_kv_scale, 1.0)

        def one(x, context: Context, prefix, text_on, speaker_on):
            context = Context(
                context.text,
                context.text_mask & text_on,
                context.speaker,
                context.speaker_mask & speaker_on,
            )
            return dit.velocity(
                x,
                t,
                context,
                frame_mask=frame_mask,
                speaker_scale=speaker_scale,
                prefix=prefix,
            )

        rows = jax.vmap(one, in_axes=(0, 0, 0, None, None))
        v = jax.vmap(rows, in_axes=(None, None, None, 0, 0))(
            x, context, prefix, text_on, speaker_on
        )
        return jnp.where(frame_mask[None, None, :, None], v, 0.0)

    def plain(x: Array, t: Array, step: Array) -> Array:
        on = jnp.ones(1, bool)
        return velocities(x, t, on, on)[0]

    def guided(x: Array, t: Array, step: Array) -> Array:
        even = step % 2 == 0
        drops_text = {"text": True, "both": True, "speaker": False, "text or speaker": even}
        drops_speaker = {"text": False, "both": True, "speaker": True, "text or speaker": ~even}
        scales = {
            "text": knobs.cfg_scale,
            "both": knobs.cfg_scale,
            "speaker": knobs.speaker_scale,
            "text or speaker": jnp.where(even, knobs.cfg_scale, knobs.speaker_scale),
        }
        text_on = jnp.stack([jnp.bool_(True), *(~jnp.bool_(drops_text[b]) for b in branches)])
        speaker_on = jnp.stack([jnp.bool_(True), *(~jnp.bool_(drops_speaker[b]) for b in branches)])
        v, *dropped = velocities(x, t, text_on, speaker_on)
        return v + sum(
            guidance_update(v, without, scales[branch], knobs.apg_eta)
            for branch, without in zip(branches, dropped, strict=True)
        )

    def time(step: Array) -> Array:
        done = step.astype(jnp.float32) / knobs.steps.astype(jnp.float32)
        return knobs.start_t * (1.0 - done)

    def body(step: Array, x: Array) -> Array:
        t, t_next = time(step), time(step + 1)
        within = (t >= knobs.cfg_min_t) & (t <= knobs.cfg_max_t)
        v = jax.lax.cond(within, guided, plain, x, t, step)
        v = rescale_score(v, x, t, knobs.rescale_k, knobs.rescale_sigma)
        return x + v * (t_next - t)

    return jax.lax.fori_loop(*bounds, body, x)
