"""A model sharded over devices has the same loss and gradients, and divides its memory."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import flow_loss, random_model

from echo_eqx.config import DIT_PRESETS, DiTConfig, EncoderConfig
from echo_eqx.errors import UsageError
from echo_eqx.flow.objective import Batch, sample_noise
from echo_eqx.model.dit import EchoDiT
from echo_eqx.sharding.mesh import batch_sharding, check_batch, mesh_shape
from echo_eqx.sharding.specs import check_mesh, parameter_spec, state_shardings
from echo_eqx.train.config import ObjectiveConfig, OptimizerConfig
from echo_eqx.train.state import abstract_state, sharded_abstract_state
from echo_eqx.train.step import loss_and_gradients
from echo_eqx.trees import leaf_names

CONFIG = DiTConfig(
    model_dim=32,
    num_layers=2,
    num_heads=4,
    mlp_dim=48,
    text=EncoderConfig(16, 1, 4, 24),
    speaker=EncoderConfig(24, 2, 4, 40),
    latent_dim=8,
    time_embed_dim=12,
    adaln_rank=8,
)
AUTO = (jax.sharding.AxisType.Auto,) * 3


def mesh_of(shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=AUTO, devices=devices)


def make_batch(rows: int = 16) -> Batch:
    rng = np.random.default_rng(0)

    def mask(length, step=1):
        return jnp.asarray(np.arange(length) < step * rng.integers(0, length // step, (rows, 1)))

    return Batch(
        jnp.asarray(rng.standard_normal((rows, 14, 8)), jnp.float32),
        mask(14),
        jnp.asarray(rng.integers(0, 256, (rows, 11)), jnp.int32),
        mask(11),
        jnp.asarray(rng.standard_normal((rows, 12, 8)), jnp.float32),
        mask(12, step=4),
    )


def gradients_on(shape, grad_accum_steps=1, **objective):
    """Mean loss of the valid frames, and its gradients, on a mesh."""
    mesh = mesh_of(shape)
    settings = ObjectiveConfig(**{"dtype": "float32", "loss_frames": "valid", **objective})
    model = random_model(EchoDiT, CONFIG)
    model = jax.device_put(model, state_shardings(model, mesh))
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    run = partial(
        loss_and_gradients, mesh=mesh, objective=settings, grad_accum_steps=grad_accum_steps
    )
    loss, gradients = jax.jit(run)(model, batch, jr.key(1))
    return float(loss), jax.tree.map(np.asarray, gradients)


@pytest.fixture(scope="module")
def unsharded():
    return gradients_on((1, 1, 1))


@pytest.mark.parametrize(
    "shape, grad_accum_steps",
    [
        ((2, 2, 2), 2),
        pytest.param((1, 8, 1), 1, marks=pytest.mark.slow),
        pytest.param((2, 1, 2), 4, marks=pytest.mark.slow),
        pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 1, 4), 1, marks=pytest.mark.slow),
    ],
)
def test_loss_and_every_gradient_equal_the_unsharded(unsharded, shape, grad_accum_steps):
    """Also whatever is recomputed: the unsharded step has --remat dots."""
    loss, gradients = gradients_on(shape, grad_accum_steps, remat="none")
    expected_loss, expected = unsharded
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    names = leaf_names(expected)
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(gradients), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), name
        assert np.abs(a).max() > 0, f"{name} has no gradient, so nothing was compared"


def test_loss_and_gradients_equal_the_plain_objective(unsharded):
    """Which has --remat full."""
    model, batch = random_model(EchoDiT, CONFIG), make_batch()
    key = jr.key(1)
    sample = sample_noise(key, jnp.arange(16), 16, (14, 8), text_dropout=0.1, speaker_dropout=0.1)
    plain = partial(flow_loss, valid_frames_only=True)
    loss, gradients = jax.jit(jax.value_and_grad(plain))(model, batch, sample)
    assert unsharded[0] == pytest.approx(float(loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(unsharded[1]), strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.slow  # two more programs
def test_gradients_summed_in_float32_are_nearer_to_those_of_one_device(unsharded):
    _, exact = unsharded

    def error(dtype: str) -> float:
        _, ours = gradients_on((1, 8, 1), dtype="bfloat16", grad_reduce_dtype=dtype)
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
        return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs)))

    assert error("float32") < error("auto")


@pytest.mark.parametrize("preset", DIT_PRESETS)
def test_exactly_one_rule_matches_each_parameter(preset):
    state = abstract_state(DIT_PRESETS[preset], OptimizerConfig(ema_decay=0.5))
    for name in leaf_names(state.model):
        parameter_spec(name)
    shardings = state_shardings(state, mesh_of((2, 2, 2)))
    assert shardings.adam.mu.blocks.mlp.w1.weight == shardings.model.blocks.mlp.w1.weight
    assert shardings.ema.blocks.mlp.w1.weight == shardings.model.blocks.mlp.w1.weight
    assert "tensor" in shardings.model.blocks.mlp.w1.weight.spec


def test_meshes_that_do_not_fit_are_rejected():
    assert mesh_shape("", 8) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert mesh_shape("data=2, tensor=4", 8) == {"data": 2, "fsdp": 1, "tensor": 4}
    for text in ("fsdp=4", "fsdp=8,fsdp=1", "rows=8", "fsdp=0,data=8", "fsdp=-8", "fsdp", "8"):
        with pytest.raises(UsageError, match=r"^expected (mesh sizes such as|a mesh of 8 devices)"):
            mesh_shape(text, 8)
    with pytest.raises(UsageError, match=r"expected a multiple of data x fsdp = 8 .* got 12"):
        check_batch(12, 1, {"data": 4, "fsdp": 2, "tensor": 1})
    with pytest.raises(UsageError, match="times 4 gradient-accumulation steps"):
        check_batch(16, 4, {"data": 4, "fsdp": 2, "tensor": 1})
    model = jax.eval_shape(lambda key: EchoDiT.init(DIT_PRESETS["1.3B"], key=key), jr.key(0))
    check_mesh(model, {"data": 1, "fsdp": 32, "tensor": 4})
    with pytest.raises(UsageError, match=r"divide the 8 heads of \S+, got tensor=3"):
        check_mesh(model, {"data": 1, "fsdp": 1, "tensor": 3})
    with pytest.raises(UsageError, match=r"expected fsdp to divide .*, got fsdp=7"):
        check_mesh(model, {"data": 1, "fsdp": 7, "tensor": 1})


_FULL_SIZE = """
import re, sys
import jax
import numpy as np
from echo_eqx.sharding.mesh import make_mesh, mesh_shape
from echo_eqx.train.config import ObjectiveConfig, OptimizerConfig
from echo_eqx.train.state import sharded_abstract_state
from echo_eqx.train.step import abstract_batch, make_train_step
from echo_eqx.config import DIT_PRESETS
config, text = DIT_PRESETS["1.3B"], sys.argv[1]
mesh = make_mesh(mesh_shape(text, 32))
state = sharded_abstract_state(config, OptimizerConfig(), mesh)
batch = abstract_batch(mesh, 32, config)
step = make_train_step(mesh, state, ObjectiveConfig(dtype="bfloat16"), OptimizerConfig(), 1000)
lowered = step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0)))

def on_each(tree):
    shapes = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree)]
    return sum(int(np.prod(shape)) * size for shape, size in shapes)

text = lowered.as_text()
gathers = re.findall(r"stablehlo.all_gather.*-> tensor<[\\dx]*(\\w+)>", text)
scatters = text.count("stablehlo.reduce_scatter")
memory = lowered.compile().memory_analysis().argument_size_in_bytes - on_each(batch)
print(memory, *sorted(set(gathers)), len(gathers) > 30, scatters > 30)
"""


PARAMETERS = 1_303_763_072


def test_full_size_is_divided_by_the_devices():
    state = sharded_abstract_state(DIT_PRESETS["1.3B"], OptimizerConfig(), mesh_of((1, 4, 2)))
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state)]
    share = 3 * PARAMETERS / 8
    assert share <= sum(int(np.prod(shape)) for shape in shards) < 1.1 * share


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["fsdp=32", "fsdp=8,tensor=4", "fsdp=16,tensor=2"])
def test_full_size_memory_per_device_according_to_the_compiler(mesh):
    done = subprocess.run(
        [sys.executable, "-c", _FULL_SIZE, mesh],
        capture_output=True,
        text=True,
        env={
            "XLA_FLAGS": "--xla_force_host_platform_device_count=32",
            "JAX_PLATFORMS": "cpu",
            "PATH": "",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    size, *found = done.stdout.split()
    share = PARAMETERS * 12 / 32
    print(f"{mesh}: {int(size) / share:.4f} of an equal share")
    assert share <= int(size) < 1.1 * share
    assert found == ["bf16", "True", "True"]  # all gathers are, and gradients are scattered
