"""The sampler: parity, cached keys, guidance, and changes that must not recompile."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import max_difference

from echo_eqx import SamplerSettings, UsageError, sample, sample_blockwise
from echo_eqx.flow.conditions import encode_conditions, encode_speaker
from echo_eqx.flow.euler import euler_steps, timestep
from echo_eqx.flow.guidance import guidance_update, rescale_score
from echo_eqx.flow.sampler import padded_frames, trace_settings

CONDITIONS = ("text_ids", "text_mask", "speaker_latents", "speaker_mask")
GOLDEN_SETTINGS = {
    "independent": SamplerSettings(steps=8, start_t=0.999, noise_scale=0.9),
    "rescaled": SamplerSettings(steps=8, noise_scale=0.9, rescale_k=1.2, rescale_sigma=3.0),
    "joint": SamplerSettings(steps=8, guidance="joint", cfg_min_t=0.0),
}


@pytest.fixture
def conditions(dit_cases):
    return [jnp.asarray(dit_cases[name]) for name in CONDITIONS]


@pytest.mark.parametrize("name", list(GOLDEN_SETTINGS))
def test_samples_equal_golden(golden_dit, dit_cases, conditions, name):
    noise = jnp.asarray(dit_cases["noise"])
    latents = sample(golden_dit, *conditions, noise=noise, settings=GOLDEN_SETTINGS[name])
    assert max_difference(latents, dit_cases[f"sample_{name}"]) < 1e-3


def test_blocks_equal_pytorch(blockwise_dit, blockwise_cases):
    cases = {name: jnp.asarray(value) for name, value in blockwise_cases.items()}
    latents = sample_blockwise(
        blockwise_dit,
        *(cases[name] for name in CONDITIONS),
        block_sizes=[8, 4, 12],
        continuation=cases["continuation"],
        noise=[cases[f"noise_{i}"] for i in range(3)],
        settings=SamplerSettings(
            steps=6, noise_scale=0.9, rescale_k=1.2, speaker_kv_scale=1.3, speaker_kv_layers=2
        ),
    )
    assert max_difference(latents, cases["sample_blockwise"]) < 1e-3
    assert np.array_equal(latents[:, :8], cases["continuation"])


def plain_euler(dit, conditions, noise, settings):
    """The equations step by step; each branch calls the model with text and reference."""
    ids, text_mask, speaker, speaker_mask = conditions
    call = jax.jit(jax.vmap(dit.__call__, in_axes=(0, None, 0, 0, 0, 0)))
    done = np.linspace(0, 1, settings.steps + 1)
    done += settings.sway * (np.cos(np.pi / 2 * done) - 1 + done)
    every, updates = settings.guidance_every, []
    x = noise * np.float32(settings.noise_scale)
    for step, (t, t_next) in enumerate(itertools.pairwise((1 - done).astype(np.float32))):
        v = cond = call(x, jnp.float32(t), *conditions)
        is_guided = settings.cfg_min_t <= t <= settings.cfg_max_t
        if is_guided and (step % every == 0 or not updates):
            updates = []
            no_text = call(x, jnp.float32(t), ids, text_mask & False, speaker, speaker_mask)
            no_voice = call(x, jnp.float32(t), ids, text_mask, speaker, speaker_mask & False)
            text_on = settings.guidance == "independent" or step // every % 2 == 0
            voice_on = settings.guidance == "independent" or step // every % 2 == 1
            for on, scale, dropped in (
                (text_on, settings.cfg_scale, no_text),
                (voice_on, settings.speaker_scale, no_voice),
            ):
                if on:
                    difference = np.asarray(cond - dropped)
                    unit = np.asarray(cond) / np.linalg.norm(cond, axis=(1, 2), keepdims=True)
                    along = np.sum(difference * unit, axis=(1, 2), keepdims=True) * unit
                    updates.append(scale * (difference - (1 - settings.apg_eta) * along))
        if is_guided:
            v = v + sum(updates)
        x = x + v * np.float32(t_next - t)
    return x


@pytest.mark.parametrize(
    "settings",
    [
        SamplerSettings(steps=5, cfg_min_t=0.3, cfg_max_t=0.9),
        SamplerSettings(steps=5, guidance="alternating", cfg_min_t=0.1),
        SamplerSettings(steps=5, apg_eta=0.25),
        SamplerSettings(steps=5, sway=-1.0, cfg_min_t=0.6),
        SamplerSettings(steps=5, sway=1.0, cfg_min_t=0.6),
        SamplerSettings(steps=9, guidance_every=3, cfg_min_t=0.2, cfg_max_t=0.8),
        SamplerSettings(steps=9, guidance_every=2, cfg_min_t=0.2, guidance="alternating"),
    ],
    ids=["independent", "alternating", "projected", "sway", "late sway", "reused", "both reused"],
)
def test_batched_cached_branches_equal_plain_calls(golden_dit, dit_cases, conditions, settings):
    noise = jnp.asarray(dit_cases["noise"])
    latents = sample(golden_dit, *conditions, noise=noise, settings=settings)
    assert max_difference(latents, plain_euler(golden_dit, conditions, noise, settings)) < 1e-3


@pytest.mark.parametrize("sway", [-1.0, -0.4, 0.0, 0.7, 1.75])
def test_timesteps_fall_from_start_t_to_0_by_the_formula(sway):
    # F5-TTS counts from noise (0) to data (1), and we the other way round.
    steps, start_t = 32, np.float32(0.999)
    settings = {"steps": jnp.float32(steps), "start_t": start_t, "sway": jnp.float32(sway)}
    times = jax.vmap(lambda step: timestep(step, settings))(jnp.arange(steps + 1))
    share = np.arange(steps + 1) / steps
    swayed = share + sway * (np.cos(np.pi / 2 * share) - 1 + share)
    assert max_difference(times, start_t * (1 - swayed)) < 1e-6
    assert (np.diff(times) < 0).all() and times[0] == start_t
    assert (times[steps // 2] > start_t / 2) == (sway < 0)  # more of them near noise
    if sway == 0:
        even = start_t * (1 - np.arange(steps + 1, dtype=np.float32) / np.float32(steps))
        assert np.array_equal(times, even)


def test_steps_without_new_guidance_skip_its_branches(golden_dit, dit_cases, conditions):
    """The program has a conditional, which `vmap` would turn into a selection of both results."""
    traced = trace_settings(SamplerSettings(), golden_dit.config.num_layers)
    x, bounds = jnp.asarray(dit_cases["noise"]), (jnp.int32(0), jnp.int32(3))
    b, t, _ = x.shape
    mask = jnp.ones(t, bool)
    cache, branches = encode_conditions(golden_dit, *conditions), ("text", "speaker")
    lowered = euler_steps.lower(golden_dit, (x, x), mask, cache, None, traced, branches, bounds)
    conditionals = lowered.as_text().split('"stablehlo.case"')[1:]
    assert len(conditionals) == 1
    assert all(f"tensor<{rows}x{b}x{t}x" in conditionals[0] for rows in (3, 1))


def test_no_reference_equals_a_masked_one(golden_dit, dit_cases, conditions):
    ids, text_mask, speaker, speaker_mask = conditions
    noise = jnp.asarray(dit_cases["noise"])
    settings = SamplerSettings(steps=4)
    masked = sample(
        golden_dit, ids, text_mask, speaker, speaker_mask & False, noise=noise, settings=settings
    )
    without = sample(golden_dit, ids, text_mask, noise=noise, settings=settings)
    assert max_difference(masked, without) < 1e-5


def test_progress_calls_do_not_change_the_result(golden_dit, dit_cases, conditions):
    noise = jnp.asarray(dit_cases["noise"])
    settings = SamplerSettings(steps=5, sway=-0.5, guidance_every=2)
    seen = []
    shown = sample(
        golden_dit,
        *conditions,
        noise=noise,
        settings=settings,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 5) for i in range(1, 6)]
    assert np.array_equal(shown, sample(golden_dit, *conditions, noise=noise, settings=settings))


def test_padding_to_a_bucket_changes_nothing(golden_dit, dit_cases, conditions):
    # 30 frames are padded to 32; the plain equations run on exactly 30.
    settings = SamplerSettings(steps=3, apg_eta=0.5)
    noise = jnp.asarray(dit_cases["noise"])
    exact = plain_euler(golden_dit, conditions, noise, settings)
    assert (
        max_difference(sample(golden_dit, *conditions, noise=noise, settings=settings), exact)
        < 1e-3
    )


def test_lengths_are_padded_to_few_buckets_and_never_beyond_the_longest():
    padded = {padded_frames(n, 640) for n in range(1, 641)}
    assert padded == {32, 64, 96, 128, 192, 256, 384, 512, 640}
    assert [padded_frames(n, 80) for n in (1, 64, 65, 80, 81, 97)] == [32, 64, 80, 80, 96, 128]
    assert all(padded_frames(n, most) >= n for n in range(1, 200) for most in (1, 80, 100))


def test_a_row_does_not_depend_on_its_batch(golden_dit, conditions):
    settings, key = SamplerSettings(steps=3), jr.key(5)
    batch = sample(golden_dit, *conditions, num_frames=20, settings=settings, key=key)
    first = [value[:1] for value in conditions]
    alone = sample(golden_dit, *first, num_frames=20, settings=settings, key=key)
    assert max_difference(batch[:1], alone) < 1e-4


def names_of_compiled_programs() -> list[str]:
    """A list to which every program compiled from now on is added."""
    names = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **kwargs: (
            "backend_compile" in event and names.append(str(kwargs.get("fun_name")))
        )
    )
    return names


def test_changed_settings_seeds_and_steps_do_not_recompile(golden_dit, conditions):
    settings = SamplerSettings(steps=3)
    sample(golden_dit, *conditions, num_frames=20, settings=settings, key=jr.key(0))
    compiled = names_of_compiled_programs()
    for change in (
        {"steps": 5},
        {"cfg_scale": 1.0, "speaker_scale": 0.0},
        {"cfg_min_t": 0.0, "cfg_max_t": 0.8},
        {"apg_eta": 0.1},
        {"noise_scale": 0.8, "start_t": 0.95},
        {"rescale_k": 1.2, "rescale_sigma": 2.0},
        {"speaker_kv_scale": 1.4, "speaker_kv_min_t": 0.5, "speaker_kv_layers": 1},
        {"sway": -1.0, "guidance_every": 3},
    ):
        changed = dataclasses.replace(settings, **change)
        sample(golden_dit, *conditions, num_frames=31, settings=changed, key=jr.key(1))
    assert not [name for name in compiled if "euler" in name or "_conditions" in name]


def test_speaker_kv_scale_acts_only_early_and_in_the_first_layers(
    golden_dit, dit_cases, conditions
):
    noise = jnp.asarray(dit_cases["noise"])

    def latents(**changes):
        settings = SamplerSettings(steps=4, **changes)
        return sample(golden_dit, *conditions, noise=noise, settings=settings)

    plain = latents()
    assert np.array_equal(plain, latents(speaker_kv_scale=1.4, speaker_kv_layers=0))
    all_layers, one_layer = (
        latents(speaker_kv_scale=1.4),
        latents(speaker_kv_scale=1.4, speaker_kv_layers=1),
    )
    # Row 1 of the golden cases has no reference.
    assert np.array_equal(plain[1], all_layers[1])
    assert max_difference(plain[0], all_layers[0]) > 1e-4
    assert max_difference(one_layer[0], all_layers[0]) > 1e-4
    late = latents(speaker_kv_scale=1.4, speaker_kv_min_t=0.0)
    assert max_difference(late[0], all_layers[0]) > 1e-4


def test_apg_is_orthogonal_for_eta_0_and_plain_cfg_for_eta_1():
    v, dropped = jr.normal(jr.key(0), (2, 3, 7, 5))
    update = guidance_update(v, dropped, jnp.float32(2), jnp.float32(0))
    assert max_difference(jnp.sum(update * v, axis=(1, 2)), 0) < 1e-4
    plain = guidance_update(v, dropped, jnp.float32(2), jnp.float32(1))
    assert np.array_equal(plain, 2 * (v - dropped))


def test_rescaling_with_k_1_is_the_identity():
    v, x = jr.normal(jr.key(0), (2, 3, 7, 5))
    one, sigma = jnp.float32(1), jnp.float32(3)
    for t in (0.999, 0.5, 1.0):
        assert np.array_equal(rescale_score(v, x, jnp.float32(t), one, sigma), v)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": -3},
        {"cfg_scale": -1.0},
        {"cfg_scale": float("nan")},
        {"start_t": 0.0},
        {"noise_scale": float("inf")},
        {"sway": -1.1},
        {"guidance_every": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_rejected_by_name(change):
    (name,) = change
    with pytest.raises(UsageError, match=name):
        dataclasses.replace(SamplerSettings(), **change).check()


def test_only_the_first_of_equal_blocks_compiles(blockwise_dit, blockwise_cases):
    conditions = [jnp.asarray(blockwise_cases[name]) for name in CONDITIONS]
    compiled = names_of_compiled_programs()
    counts = []
    sample_blockwise(
        blockwise_dit,
        *conditions,
        block_sizes=[4] * 5,
        settings=SamplerSettings(steps=1),
        key=jr.key(0),
        progress=lambda *_: counts.append(len(compiled)),
    )
    assert len(counts) == 5 and counts[0] > 0
    # The first block's latents are written after its last step, so before the second's.
    assert counts[1] == counts[-1]
    assert compiled[counts[-1] :] == ["jit(concatenate)"]  # all blocks, in the end


def test_blocks_need_a_blockwise_model_and_whole_patches(golden_dit, blockwise_dit, conditions):
    with pytest.raises(UsageError, match="latent_encoder"):
        sample_blockwise(golden_dit, *conditions, block_sizes=[8], key=jr.key(0))
    ids, mask = conditions[:2]
    with pytest.raises(UsageError, match="expected shapes"):
        noise = [jnp.zeros((3, 8, 21))]
        sample_blockwise(blockwise_dit, ids, mask, block_sizes=[8], noise=noise)
    with pytest.raises(UsageError, match="6 frames"):
        sample_blockwise(blockwise_dit, ids, mask, block_sizes=[8, 6], key=jr.key(0))


def test_references_can_be_encoded_once(golden_dit, dit_cases, conditions):
    batch, (*_, speaker, speaker_mask) = encode_conditions(golden_dit, *conditions), conditions
    ends = 4 * np.asarray(speaker_mask)[:, ::4].sum(axis=1)  # one of them is no reference at all
    for row, end in enumerate(ends):
        cache = encode_speaker(golden_dit, speaker[row, :end], 64)
        patches = end // 4
        assert np.array_equal(np.asarray(cache.mask), np.arange(16) < patches)
        for once, both in zip(
            jax.tree.leaves(cache.keys_values), jax.tree.leaves(batch.speaker), strict=True
        ):
            np.testing.assert_allclose(once[:, :patches], both[row, :, :patches], atol=1e-4)
    with pytest.raises(UsageError, match="at most 64 frames of 128 channels"):
        encode_speaker(golden_dit, np.zeros((65, 128), np.float32), 64)
