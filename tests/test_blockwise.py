"""Training a block-wise model: each row a block of its canvas, behind the latents before it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpy_dit
import pytest
import test_sharding
from conftest import max_difference, random_model
from test_dit import inputs_of
from test_sharding import make_batch, mesh_of

import echo_eqx
from echo_eqx import UsageError
from echo_eqx.config import DIT_PRESETS
from echo_eqx.errors import EchoError
from echo_eqx.flow.objective import sample_bounds, sample_noise
from echo_eqx.model.dit import Block, EchoDiT
from echo_eqx.sharding.mesh import batch_sharding
from echo_eqx.sharding.specs import state_shardings
from echo_eqx.train.config import ObjectiveConfig, TrainConfig
from echo_eqx.train.evaluate import evaluate, make_evaluate
from echo_eqx.train.restore import _from_weights
from echo_eqx.train.state import sharded_abstract_state
from echo_eqx.train.step import loss_and_gradients
from echo_eqx.trees import named_leaves

CONFIG = dataclasses.replace(test_sharding.CONFIG, blockwise=True)
ROWS, FRAMES, CHANNELS = 4, 14, 8
OBJECTIVE = ObjectiveConfig(dtype="float32", prefix_probability=0.7, loss_frames="valid")


@functools.cache
def loss_on(shape, grad_accum_steps):
    """Loss, and gradients by name, on a mesh."""
    mesh = mesh_of(shape)
    model = random_model(EchoDiT, CONFIG)
    model = jax.device_put(model, state_shardings(model, mesh))
    batch = jax.device_put(make_batch(ROWS), batch_sharding(mesh))
    on_mesh = functools.partial(
        loss_and_gradients, mesh=mesh, objective=OBJECTIVE, grad_accum_steps=grad_accum_steps
    )
    loss, gradients = jax.jit(on_mesh)(model, batch, jr.key(1))
    return float(loss), {name: np.asarray(x) for name, x in named_leaves(gradients).items()}


def drawn(key, prefix, cut, dropout):
    """Batch, noise and blocks, in NumPy."""
    index, shape = jnp.arange(ROWS), (FRAMES, CHANNELS)
    noise = sample_noise(key, index, ROWS, shape, text_dropout=dropout, speaker_dropout=dropout)
    bounds = sample_bounds(key, index, FRAMES, 4, prefix_probability=prefix, cut_probability=cut)
    return jax.tree.map(np.asarray, (make_batch(ROWS), noise, bounds))


def reference_loss(weights: numpy_dit.Weights, batch, noise, bounds) -> float:
    """The loss with each block alone behind its prefix, as in sampling."""
    errors, count = 0.0, 0
    for i in range(ROWS):
        start, end, t = int(bounds.start[i]), int(bounds.end[i]), float(noise.t[i])
        x0, n = (each[i].astype(np.float64) for each in (batch.latents, noise.noise))
        block = slice(start, end)
        x = (1 - t) * x0[block] + t * n[block]
        text = batch.text_ids[i][batch.text_mask[i] & noise.keep_text[i]]
        speaker = batch.speaker_latents[i][batch.speaker_mask[i] & noise.keep_speaker[i]]
        speaker = speaker.astype(np.float64)
        v = numpy_dit.velocity(weights, CONFIG, x, t, text, speaker, x0[:start])
        valid = batch.frame_mask[i, block]
        errors += np.sum(np.mean((v - (n - x0)[block]) ** 2, axis=-1) * valid)
        count += valid.sum()
    return errors / count


def float64_weights() -> numpy_dit.Weights:
    model = named_leaves(random_model(EchoDiT, CONFIG))
    return {name: np.asarray(leaf, np.float64) for name, leaf in model.items()}


@pytest.mark.parametrize(
    "shape, grad_accum_steps",
    [((1, 2, 2), 2), pytest.param((1, 1, 1), 1, marks=pytest.mark.slow)],
)
def test_loss_and_every_gradient_equal_a_float64_reference(shape, grad_accum_steps):
    """Gradients are compared along a random direction in each parameter."""
    loss, gradients = loss_on(shape, grad_accum_steps)
    weights, data = float64_weights(), drawn(jr.key(1), 0.7, 0.5, 0.1)
    assert loss == pytest.approx(reference_loss(weights, *data), rel=1e-5)
    rng = np.random.default_rng(2)
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        up, down = (
            reference_loss({**weights, name: weights[name] + h * direction}, *data)
            for h in (1e-5, -1e-5)
        )
        assert np.abs(gradient).max() > 0, f"{name} has no gradient, so nothing was compared"
        error = abs(np.sum(gradient * direction) - (up - down) / 2e-5)
        assert error <= 1e-4 * np.linalg.norm(gradient), name


@pytest.mark.slow
@pytest.mark.parametrize("shape, grad_accum_steps", [((1, 2, 2), 2), ((4, 2, 1), 1)])
def test_sharded_and_accumulated_equals_unsharded(shape, grad_accum_steps):
    (expected_loss, expected), (loss, gradients) = (
        loss_on((1, 1, 1), 1),
        loss_on(shape, grad_accum_steps),
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        assert np.abs(gradients[name] - gradient).max() <= 1e-5 * np.abs(gradient).max(), name


def test_the_trained_velocity_is_the_sampled_one(blockwise_dit, blockwise_cases):
    x, t, *conditions = inputs_of(blockwise_cases)
    x = x[:, :8]
    # What lies outside the block and its prefix does not matter.
    canvas = jnp.full((len(x), 32, x.shape[2]), 7.0)
    noisy = (-canvas).at[:, 8:16].set(x)
    canvas = canvas.at[:, :8].set(blockwise_cases["continuation"])

    @jax.jit
    @jax.vmap
    def velocities(x, t, canvas, noisy, *conditions):
        block = Block(canvas, jnp.int32(8), jnp.int32(16))
        trained = blockwise_dit(noisy, t, *conditions, block=block)
        sampled = blockwise_dit.velocity(
            x,
            t,
            blockwise_dit.encode_conditions(*conditions),
            frame_mask=jnp.ones(8, bool),
            speaker_scale=jnp.ones(3),
            prefix=blockwise_dit.encode_prefix(canvas, jnp.int32(8)),
        )
        return trained[8:16], sampled

    trained, sampled = velocities(x, t, canvas, noisy, *conditions)
    assert max_difference(trained, sampled) < 1e-5
    assert max_difference(trained, blockwise_cases["velocity_block"]) < 1e-4  # PyTorch's


def test_blocks_are_whole_patches_of_any_position_and_independent_of_the_batch():
    options = {"prefix_probability": 0.4, "cut_probability": 0.3}
    whole = sample_bounds(jr.key(0), jnp.arange(4000), 14, 4, **options)
    start, end = np.asarray(whole.start), np.asarray(whole.end)
    assert set(start) == {0, 4, 8, 12} and set(end) == {4, 8, 12, 14} and (start < end).all()
    assert abs((start > 0).mean() - 0.4) < 0.03
    assert abs((end[start == 4] < 14).mean() - 0.3 * 2 / 3) < 0.05
    part = sample_bounds(jr.key(0), jnp.arange(5, 9), 14, 4, **options)
    assert (part.start == start[5:9]).all() and (part.end == end[5:9]).all()


def test_the_loss_on_held_out_data_is_also_that_of_what_follows_a_prefix():
    run = make_evaluate(mesh_of((1, 1, 1)), OBJECTIVE, after_prefix=True)
    loss = evaluate(run, random_model(EchoDiT, CONFIG), [make_batch(ROWS)])["eval_loss"]
    data = drawn(jr.fold_in(jr.key(0), 0), 1.0, 0.0, 0.0)
    assert loss == pytest.approx(reference_loss(float64_weights(), *data), rel=1e-5)


def test_a_run_starts_from_weights_without_a_latent_encoder(tmp_path, monkeypatch, caplog):
    plain = random_model(EchoDiT, dataclasses.replace(CONFIG, blockwise=False))
    echo_eqx.save(plain, tmp_path / "plain.safetensors")
    monkeypatch.setitem(DIT_PRESETS, "small", plain.config)
    config = TrainConfig(model="small", blockwise=True)
    sizes, mesh = config.dit_config(), mesh_of((1, 2, 2))
    abstract = sharded_abstract_state(sizes, config.optimizer, mesh)
    with caplog.at_level("INFO"):
        state = _from_weights(str(tmp_path / "plain.safetensors"), config, abstract)
    assert "plain.safetensors has no latent_encoder: the new one starts as a copy" in caplog.text
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    ours, theirs = named_leaves(state.model), named_leaves(plain)
    for name, leaf in ours.items():
        source = name.replace("latent_encoder", "speaker_encoder").replace("_latent", "_speaker")
        source = source.replace("latent_norm", "speaker_norm")
        np.testing.assert_array_equal(leaf, theirs[source], err_msg=name)
    assert {name for name in ours if name not in theirs} and "latent_norm.weight" in ours

    echo_eqx.save(jax.device_get(state.model), tmp_path / "blocks.safetensors")
    without = dataclasses.replace(config, blockwise=False)
    abstract = sharded_abstract_state(without.dit_config(), config.optimizer, mesh)
    with pytest.raises(EchoError, match=r"expected blockwise False, .* add --blockwise$"):
        _from_weights(str(tmp_path / "blocks.safetensors"), without, abstract)


def test_settings_of_blocks_that_cannot_be_are_refused():
    def refused(match: str, **changes):
        with pytest.raises(UsageError, match=match):
            TrainConfig(model="tiny", data="x", **changes).check()

    refused("add --blockwise", objective=ObjectiveConfig(cut_probability=0.2))
    above = ObjectiveConfig(prefix_probability=1.1)
    refused("prefix_probability: expected 0 to 1", blockwise=True, objective=above)
    refused("max_frames: expected more than 4 ", blockwise=True, max_frames=4)
    TrainConfig(model="2.4B", data="x", objective=ObjectiveConfig(cut_probability=0.2)).check()
