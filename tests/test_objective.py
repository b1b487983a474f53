"""The loss, its timesteps, and the optimizer equal those of the published trainer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from conftest import GOLDEN, flow_loss, max_difference

from echo_eqx.flow.objective import Batch, NoiseSample, sample_noise, sample_timesteps
from echo_eqx.train.config import OptimizerConfig
from echo_eqx.train.optimizer import (
    adamw_update,
    learning_rate,
    update_ema,
    weight_decay_mask,
)
from echo_eqx.train.state import init_train_state
from echo_eqx.trees import named_leaves

CONDITIONS = ("text_ids", "text_mask", "speaker_latents", "speaker_mask")
grad = jax.jit(jax.value_and_grad(flow_loss))


def batch_of(cases, x0, frame_mask=None, step=...) -> Batch:
    mask = np.ones(x0.shape[:2], bool) if frame_mask is None else frame_mask
    text_ids, text_mask, latents, speaker_mask = (cases[name][step] for name in CONDITIONS)
    return Batch(
        jnp.asarray(x0),
        jnp.asarray(mask),
        jnp.asarray(text_ids),
        jnp.asarray(text_mask),
        jnp.asarray(latents, jnp.float32),
        jnp.asarray(speaker_mask),
    )


def noise_sample(t, noise) -> NoiseSample:
    kept = jnp.ones(len(t), bool)
    return NoiseSample(jnp.asarray(t, jnp.float32), jnp.asarray(noise, jnp.float32), kept, kept)


def test_losses_equal_golden(golden_dit, dit_cases):
    batch = batch_of(dit_cases, dit_cases["x0"], dit_cases["frame_mask"])
    sample = noise_sample(dit_cases["t"], dit_cases["loss_noise"])
    for name, valid in (("loss_all_frames", False), ("loss_valid_frames", True)):
        loss = jax.jit(lambda d, b, r, v=valid: flow_loss(d, b, r, valid_frames_only=v))
        assert max_difference(loss(golden_dit, batch, sample), dit_cases[name]) < 1e-4, name


def test_timesteps_equal_golden(dit_cases):
    offset, shift = jnp.float32(dit_cases["strat_offset"]), jnp.int32(dit_cases["strat_shift"])
    times = sample_timesteps(offset, shift, jnp.arange(16), 16)
    assert max_difference(times, dit_cases["strat_t"]) < 1e-5


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_every_step_has_one_timestep_per_stratum(mean):
    options = {"text_dropout": 0.1, "speaker_dropout": 0.1, "timestep_logit_mean": mean}
    sample = sample_noise(jr.key(3), jnp.arange(64), 64, (1, 1), **options)
    normal = jax.scipy.stats.norm.cdf(jax.scipy.special.logit(sample.t) - mean)
    assert sorted(np.floor(np.asarray(normal) * 64).astype(int)) == list(range(64))


def test_part_of_a_batch_gets_the_same_noise_as_in_the_whole():
    options = {"text_dropout": 0.5, "speaker_dropout": 0.5}
    whole = sample_noise(jr.key(0), jnp.arange(8), 8, (3, 2), **options)
    part = sample_noise(jr.key(0), jnp.arange(4, 8), 8, (3, 2), **options)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_array_equal(a[4:], b)


def test_dropout_is_independent_and_has_the_requested_rate():
    sample = sample_noise(
        jr.key(1), jnp.arange(20_000), 20_000, (1, 1), text_dropout=0.1, speaker_dropout=0.3
    )
    text, speaker = np.asarray(sample.keep_text), np.asarray(sample.keep_speaker)
    assert abs((~text).mean() - 0.1) < 0.01
    assert abs((~speaker).mean() - 0.3) < 0.015
    assert abs((~text & ~speaker).mean() - 0.03) < 0.006


@functools.cache
def train_step(config: OptimizerConfig):
    @jax.jit
    def step(state, batch, sample):
        loss, gradients = jax.value_and_grad(flow_loss)(state.model, batch, sample)
        lr = learning_rate(config, 40, state.step)
        model, adam = adamw_update(config, lr, state.model, gradients, state.adam)
        state = dataclasses.replace(state, step=state.step + 1, model=model, adam=adam)
        return state, loss, optax.tree.norm(gradients)

    return step


@pytest.mark.parametrize(
    "run", [*(pytest.param(run, marks=pytest.mark.slow) for run in ("", "_strong")), "_clip"]
)
def test_twenty_steps_follow_the_published_trainer(golden_dit, run):
    cases = dict(np.load(GOLDEN / "trainer" / "cases.npz"))
    config = OptimizerConfig()
    if run:
        config = dataclasses.replace(config, learning_rate=3e-3, weight_decay=0.3)

    state = init_train_state(golden_dit, config)
    losses, norms = [], []
    for i in range(20):
        x0 = cases["x0"][i].astype(np.float32)
        if run == "_clip":
            x0 = x0 * cases["latent_scale_clip"][i]
        batch = batch_of(cases, x0, step=i)
        state, loss, norm = train_step(config)(
            state, batch, noise_sample(cases["t"][i], cases["noise"][i])
        )
        losses.append(float(loss))
        norms.append(float(norm))
    np.testing.assert_allclose(losses, cases[f"losses{run}"], rtol=1e-5)
    np.testing.assert_allclose(norms, cases[f"grad_norms{run}"], rtol=1e-4)
    ends = {"final_out_proj_kernel": state.model.out_proj.weight}
    ends["final_wq_kernel"] = state.model.blocks.attention.wq.weight[0]
    for name, ours in ends.items():
        assert max_difference(ours, cases[name + run]) < 5e-5, name


def test_weight_decay_mask(golden_dit):
    mask = named_leaves(weight_decay_mask(golden_dit))
    decayed = {name for name in mask if mask[name]}
    assert "blocks.attention.gate.weight" in decayed
    assert "text_encoder.text_embedding.weight" in decayed
    assert "time_conditioner.dense2.weight" in decayed
    assert not any("norm" in name or "bias" in name or "adaln" in name for name in decayed)
    assert "out_proj.weight" not in decayed


def test_learning_rate_schedules():
    def rates(config):
        return [float(learning_rate(config, 100, jnp.int32(step))) for step in range(101)]

    cosine = rates(OptimizerConfig(learning_rate=1.0))
    assert cosine[0] == 0 and cosine[5] == 1 and cosine[100] == pytest.approx(0, abs=1e-6)
    assert cosine[52] == pytest.approx(0.5, abs=0.02)
    stable = rates(OptimizerConfig(learning_rate=1.0, schedule="wsd", decay_ratio=0.2))
    assert stable[0] == 0 and stable[5:81] == [1.0] * 76
    assert stable[90] == pytest.approx(0.5) and stable[100] == 0


def test_ema_follows_closely_at_first():
    old, new = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    early = update_ema(old, new, 0.999, jnp.int32(0))["a"]
    late = update_ema(old, new, 0.999, jnp.int32(100_000))["a"]
    np.testing.assert_allclose(early, 0.9, rtol=1e-6)
    np.testing.assert_allclose(late, 0.001, rtol=1e-3)
