"""The velocity model: parity, masks, cached keys, parameter counts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import max_difference

import echo_eqx
from echo_eqx.config import DIT_PRESETS

CONDITIONS = ("text_ids", "text_mask", "speaker_latents", "speaker_mask")
batched = eqx.filter_jit(lambda dit, *inputs: jax.vmap(dit.__call__)(*inputs))


def inputs_of(cases):
    return [jnp.asarray(cases[name]) for name in ("x", "t", *CONDITIONS)]


@pytest.mark.parametrize("preset, count", [("1.3B", 1_303_763_072), ("840M", 840_536_960)])
def test_presets_have_the_published_parameter_counts(preset, count):
    init = lambda key: echo_eqx.EchoDiT.init(DIT_PRESETS[preset], key=key)  # noqa: E731
    assert echo_eqx.num_parameters(eqx.filter_eval_shape(init, jr.key(0))) == count


def test_velocity_equals_golden(golden_dit, dit_cases):
    velocity = batched(golden_dit, *inputs_of(dit_cases))
    assert velocity.dtype == jnp.float32
    assert max_difference(velocity, dit_cases["velocity"]) < 1e-4


def test_bfloat16_velocity_is_close_to_golden(golden_dit, dit_cases):
    velocity = batched(echo_eqx.cast(golden_dit, jnp.bfloat16), *inputs_of(dit_cases))
    golden = dit_cases["velocity"]
    assert velocity.dtype == jnp.float32
    assert np.linalg.norm(velocity - golden) < 2e-2 * np.linalg.norm(golden)
    assert max_difference(velocity, golden) < 2e-2 * np.abs(golden).max()


def test_projection_scale_and_narrow_latents_equal_pytorch(blockwise_dit, blockwise_cases):
    assert blockwise_dit.config.speaker_proj_scale == pytest.approx(1 / 6)
    assert blockwise_dit.config.latent_dim == 20
    velocity = batched(blockwise_dit, *inputs_of(blockwise_cases))
    assert max_difference(velocity, blockwise_cases["velocity"]) < 1e-4


def test_velocity_after_a_prefix_equals_pytorch(blockwise_dit, blockwise_cases):
    x, t, *conditions = inputs_of(blockwise_cases)
    earlier = jnp.pad(jnp.asarray(blockwise_cases["continuation"]), ((0, 0), (0, 24), (0, 0)))

    @jax.vmap
    def velocity(x, t, earlier, *conditions):
        return blockwise_dit.velocity(
            x[:8],
            t,
            blockwise_dit.encode_conditions(*conditions),
            frame_mask=jnp.ones(8, bool),
            speaker_scale=jnp.ones(3),
            prefix=blockwise_dit.encode_prefix(earlier, jnp.int32(8)),
        )

    golden = blockwise_cases["velocity_block"]
    assert max_difference(velocity(x, t, earlier, *conditions), golden) < 1e-4


@pytest.mark.parametrize("dropped", ["text", "speaker"])
@pytest.mark.parametrize("content", [1e3, np.inf, np.nan])
def test_the_content_of_a_masked_condition_does_not_matter(golden_dit, dit_cases, dropped, content):
    cases = {name: jnp.asarray(value) for name, value in dit_cases.items()}
    cases[f"{dropped}_mask"] = jnp.zeros_like(cases[f"{dropped}_mask"])
    before = batched(golden_dit, *inputs_of(cases))
    if dropped == "text":
        cases["text_ids"] = (
            (cases["text_ids"] + 77) % 256
            if np.isfinite(content)
            else (jnp.full_like(cases["text_ids"], -5))
        )
    else:
        cases["speaker_latents"] = jnp.full_like(cases["speaker_latents"], content)
    after = batched(golden_dit, *inputs_of(cases))
    assert np.isfinite(before).all()
    assert np.array_equal(before, after)


def test_numpy_arrays_and_a_python_float_time_are_accepted(golden_dit, dit_cases):
    row = [dit_cases[name][0] for name in ("x", *CONDITIONS)]
    velocity = golden_dit(row[0], float(dit_cases["t"][0]), *row[1:])
    assert max_difference(velocity, dit_cases["velocity"][0]) < 1e-4


def test_padding_of_text_and_reference_changes_nothing(golden_dit, dit_cases):
    x, t, ids, text_mask, speaker, speaker_mask = (value[:1] for value in inputs_of(dit_cases))
    short = batched(
        golden_dit, x, t, ids[:, :23], text_mask[:, :23], speaker[:, :12], speaker_mask[:, :12]
    )
    text_mask = text_mask.at[:, 23:].set(False)
    speaker_mask = speaker_mask.at[:, 12:].set(False)
    speaker = speaker.at[:, 12:].set(jnp.nan)
    padded = batched(golden_dit, x, t, ids, text_mask, speaker, speaker_mask)
    assert max_difference(short, padded) < 1e-5


def test_velocity_from_cached_keys_equals_uncached(golden_dit, dit_cases):
    x, t, *conditions = inputs_of(dit_cases)

    @jax.jit
    @jax.vmap
    def cached(x, t, *conditions):
        mask, ones = jnp.ones(len(x), bool), jnp.ones(golden_dit.config.num_layers)
        cache = golden_dit.encode_conditions(*conditions)
        return golden_dit.velocity(x, t, cache, frame_mask=mask, speaker_scale=ones)

    uncached = batched(golden_dit, x, t, *conditions)
    assert max_difference(cached(x, t, *conditions), uncached) < 1e-5


def test_padding_frames_change_nothing(golden_dit, dit_cases):
    x, t, *conditions = (value[0] for value in inputs_of(dit_cases))
    cache = golden_dit.encode_conditions(*conditions)
    ones = jnp.ones(golden_dit.config.num_layers)

    @jax.jit
    def velocity(x, mask):
        return golden_dit.velocity(x, t, cache, frame_mask=mask, speaker_scale=ones)

    short = velocity(x[:21], jnp.ones(21, bool))
    padded = velocity(x.at[21:].set(jnp.nan), jnp.arange(len(x)) < 21)
    assert max_difference(short, padded[:21]) < 1e-5


def test_a_new_model_has_zero_velocity():
    config = DIT_PRESETS["tiny"]
    x = jr.normal(jr.key(1), (7, config.latent_dim))
    ones = jnp.ones(8, bool)

    @jax.jit
    def fresh(key):
        dit = echo_eqx.EchoDiT.init(config, key=key)
        return dit(x, jnp.float32(0.3), jnp.arange(8), ones, jnp.tile(x[:4], (2, 1)), ones)

    velocity = fresh(jr.key(0))
    assert velocity.shape == x.shape and not velocity.any()


def test_gradients_are_finite_when_everything_is_dropped(golden_dit, dit_cases):
    x, t, ids, _, speaker, _ = (value[0] for value in inputs_of(dit_cases))
    off = jnp.zeros(len(ids), bool), jnp.zeros(len(speaker), bool)

    def loss(dit):
        return jnp.mean(dit(x, t, ids, off[0], speaker, off[1]) ** 2)

    gradients = eqx.filter_jit(eqx.filter_grad(loss))(golden_dit)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_wrong_shapes_give_a_one_line_error(golden_dit, dit_cases):
    x, t, ids, seen, speaker, heard = (value[0] for value in inputs_of(dit_cases))
    for arguments, message in (
        ((x[:, :5], t, ids, seen, speaker, heard), r"x: expected latents \(t, 128\), got"),
        ((x[None], t, ids, seen, speaker, heard), r"x: expected latents .* jax\.vmap"),
        ((x, jnp.ones(2), ids, seen, speaker, heard), "t: expected a scalar"),
        ((x, t, ids[None], seen, speaker, heard), "text_ids: expected integers"),
        ((x, t, ids.astype(jnp.float32), seen, speaker, heard), "text_ids: expected integers"),
        ((x, t, ids, seen[:-1], speaker, heard), "text_mask: expected booleans"),
        ((x, t, ids, seen, speaker[:, :5], heard), r"speaker_latents: expected latents \(t, 128"),
        ((x, t, ids, seen, speaker[:-1], heard[:-1]), "a multiple of 4 frames"),
        ((x, t, ids, seen, speaker, heard.astype(jnp.int32)), "speaker_mask: expected booleans"),
    ):
        with pytest.raises(echo_eqx.EchoError, match=message):
            golden_dit(*arguments)
