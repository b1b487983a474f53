"""One Euler step of a batch, whose rows may be at different steps with different settings."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from echo_eqx.flow.guidance import guidance_update, rescale_score
from echo_eqx.generation import Guidance
from echo_eqx.model.dit import ConditionCache, EchoDiT, Prefix

TracedSettings = dict[str, Float[Array, "*b"]]
"""The numbers of `SamplerSettings` by name, as arrays: scalars, or one number per row."""
EulerState = tuple[Float[Array, "b t c"], Float[Array, "b t c"]]
"""Latents, and the guidance that was last added to their velocity; zeros before the first."""


def guidance_branches(guidance: Guidance, has_speaker: bool) -> tuple[str, ...]:
    """The condition that each guidance branch drops. Without a reference, only the text is."""
    if guidance == "joint":
        return ("both",)
    if not has_speaker:
        return ("text",)
    return ("text", "speaker") if guidance == "independent" else ("alternating",)


def timestep(step: Int[Array, "*b"], settings: TracedSettings) -> Float[Array, "*b"]:
    """The time before step `step` of `settings["steps"]`, from `start_t` down to 0.

    It is `start_t (1 - p')`, where `p' = p + sway (cos(pi p / 2) - 1 + p)` and `p` is the share of
    steps done: sway sampling (F5-TTS, Chen et al., arXiv:2410.06885), where 0 is noise and 1 data.
    """
    done = step.astype(jnp.float32) / settings["steps"]
    swayed = done + settings["sway"] * (jnp.cos(jnp.pi / 2 * done) - 1.0 + done)
    return settings["start_t"] * (1.0 - swayed)


def is_guided(step: Int[Array, "*b"], settings: TracedSettings) -> Bool[Array, "*b"]:
    """Whether guidance is added at a step."""
    t = timestep(step, settings)
    return (t >= settings["cfg_min_t"]) & (t <= settings["cfg_max_t"])


def computes_guidance(step: Int[Array, "*b"], settings: TracedSettings) -> Bool[Array, "*b"]:
    """Whether a step computes the guidance that it adds, instead of adding the last one again."""
    every = settings["guidance_every"].astype(jnp.int32)
    is_first = (step == 0) | ~is_guided(step - 1, settings)
    return is_guided(step, settings) & ((step % every == 0) | is_first)


def euler_step(
    dit: EchoDiT,
    state: EulerState,
    frame_mask: Bool[Array, "b t"],
    conditions: ConditionCache,
    prefix: Prefix | None,
    settings: TracedSettings,
    branches: tuple[str, ...],
    step: Int[Array, " b"],
    is_new: Bool[Array, ""],
) -> EulerState:
    """`x += v (t_next - t)` in each row, with one number of each setting and one step per row.

    `is_new` is `computes_guidance` of the rows, which must agree on it, since steps that do not
    compute guidance skip its branches. `branches` are by `guidance_branches`. A row does not depend
    on the other rows.
    """
    x, update = state
    t, t_next = timestep(step, settings), timestep(step + 1, settings)
    layers = jnp.arange(dit.config.num_layers, dtype=jnp.float32)[None]
    is_scaled = (t >= settings["speaker_kv_min_t"])[:, None]
    is_scaled = is_scaled & (layers < settings["speaker_kv_layers"][:, None])
    speaker_kv_scale = jnp.where(is_scaled, settings["speaker_kv_scale"][:, None], 1.0)

    def velocities(
        keeps_text: Bool[Array, "m b"], keeps_speaker: Bool[Array, "m b"]
    ) -> Float[Array, "m b t c"]:
        def velocity(x, t, frame_mask, speaker_scale, conditions, prefix, keeps):
            kept = ConditionCache(
                conditions.text,
                conditions.text_mask & keeps[0],
                conditions.speaker,
                conditions.speaker_mask & keeps[1],
            )
            return dit.velocity(
                x, t, kept, frame_mask=frame_mask, speaker_scale=speaker_scale, prefix=prefix
            )

        rows = (x, t, frame_mask, speaker_kv_scale, conditions, prefix)
        batched = jax.vmap(jax.vmap(velocity), in_axes=(0, *(None,) * 5, 0))
        branches_x = jnp.broadcast_to(x, (len(keeps_text), *x.shape))
        v = batched(branches_x, *rows[1:], (keeps_text, keeps_speaker))
        return jnp.where(frame_mask[None, :, :, None], v, 0.0)

    def reused(update: Array) -> EulerState:
        keeps = jnp.ones((1, len(x)), bool)
        return velocities(keeps, keeps)[0] + update, update

    def guided(_: Array) -> EulerState:
        yes = jnp.ones(len(x), bool)
        even = step // settings["guidance_every"].astype(jnp.int32) % 2 == 0
        text_scale, speaker_scale = settings["cfg_scale"], settings["speaker_scale"]
        # By branch: whether it keeps the text, whether it keeps the reference, and its scale.
        table = {
            "text": (~yes, yes, text_scale),
            "speaker": (yes, ~yes, speaker_scale),
            "both": (~yes, ~yes, text_scale),
            "alternating": (~even, even, jnp.where(even, text_scale, speaker_scale)),
        }
        keeps_text, keeps_speaker, scales = zip(*(table[name] for name in branches), strict=True)
        v, *dropped = velocities(jnp.stack([yes, *keeps_text]), jnp.stack([yes, *keeps_speaker]))
        first, *others = (
            _by_row(guidance_update)(v, without, scale, settings["apg_eta"])
            for scale, without in zip(scales, dropped, strict=True)
        )
        update = sum(others, first)
        return v + update, update

    update = jnp.where(is_guided(step, settings)[:, None, None], update, 0.0)
    v, update = jax.lax.cond(is_new, guided, reused, update)
    v = _by_row(rescale_score)(v, x, t, settings["rescale_k"], settings["rescale_sigma"])
    return x + v * (t_next - t)[:, None, None], update


@eqx.filter_jit
def euler_steps(
    dit: EchoDiT,
    state: EulerState,
    frame_mask: Bool[Array, " t"],
    conditions: ConditionCache,
    prefix: Prefix | None,
    settings: TracedSettings,
    branches: tuple[str, ...],
    bounds: tuple[Int[Array, ""], Int[Array, ""]],
) -> EulerState:
    """Steps `bounds[0]` to `bounds[1]` of all rows, which have the same settings and length."""
    rows, frames, _ = state[0].shape
    settings = {name: jnp.broadcast_to(number, rows) for name, number in settings.items()}
    frame_mask = jnp.broadcast_to(frame_mask, (rows, frames))

    def body(step: Array, state: EulerState) -> EulerState:
        steps = jnp.broadcast_to(step, rows)
        is_new = computes_guidance(steps, settings)[0]
        return euler_step(
            dit, state, frame_mask, conditions, prefix, settings, branches, steps, is_new
        )

    return jax.lax.fori_loop(*bounds, body, state)


def _by_row(function):
    """`function` of batches with one row each, and of one number per row."""

    def row(*arrays):
        return function(*(a if a.ndim == 0 else a[None] for a in arrays))[0]

    return jax.vmap(row)
