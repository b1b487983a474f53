"""The lowered training step computes nothing unnecessary."""

import dataclasses
import functools
import math
import re

import jax
import jax.random as jr
import pytest
import test_sharding
from test_sharding import mesh_of

from echo_eqx.config import DIT_PRESETS, EncoderConfig
from echo_eqx.errors import UsageError
from echo_eqx.train.config import ObjectiveConfig, OptimizerConfig
from echo_eqx.train.flops import recomputed_flops, step_flops
from echo_eqx.train.state import sharded_abstract_state
from echo_eqx.train.step import abstract_batch, make_train_step
from echo_eqx.train.train_dit import _check_attention

# Lengths are primes of which no width is a multiple, so that a shape identifies its array.
FRAMES, TEXT, PATCHES = 13, 11, 7
CONFIG = dataclasses.replace(
    test_sharding.CONFIG,
    max_frames=FRAMES,
    max_text_bytes=TEXT,
    max_speaker_frames=4 * PATCHES,
)
MESHES = [(1, 1, 1), (1, 2, 2)]


@functools.cache
def lowered(shape: tuple[int, ...], config=CONFIG, platform="cpu", **objective) -> str:
    """StableHLO of a step in bfloat16."""
    mesh, optimizer = mesh_of(shape), OptimizerConfig()
    state = sharded_abstract_state(config, optimizer, mesh)
    settings = ObjectiveConfig(**{"dtype": "bfloat16", "grad_reduce_dtype": "auto", **objective})
    step = make_train_step(mesh, state, settings, optimizer, num_steps=10)
    batch = abstract_batch(mesh, 4, config)
    traced = step.trace(state, batch, jax.eval_shape(lambda: jr.key(0)))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture(params=MESHES, ids=str)
def program(request) -> str:
    return lowered(request.param, grad_reduce_dtype="auto")


def operands(program: str, operation: str) -> list[list[tuple[tuple[int, ...], str]]]:
    """Shape and dtype of the operands of every `operation`."""
    found = []
    for types in re.findall(rf"stablehlo\.{operation}.*?: \((.*?)\) ->", program, re.DOTALL):
        tensors = re.findall(r"tensor<((?:\d+x)*)(\w+)>", types)
        found.append([(tuple(map(int, s.split("x")[:-1])), dtype) for s, dtype in tensors])
    return found


def test_matmuls_over_tokens_are_in_bfloat16(program):
    products = operands(program, "dot_general")
    over_tokens = [p for p in products if any({FRAMES, TEXT, PATCHES} & {*s} for s, _ in p)]
    assert len(over_tokens) > 50
    assert {dtype for product in over_tokens for _, dtype in product} == {"bf16"}


def test_parameters_are_gathered_in_bfloat16(program):
    gathered = operands(program, "all_gather")
    assert gathered and {dtype for op in gathered for _, dtype in op} == {"bf16"}


@pytest.mark.parametrize("dtype, expected", [("auto", "bf16"), ("float32", "f32")])
def test_gradients_are_reduced_in_the_requested_dtype(dtype, expected):
    program = lowered((1, 2, 2), grad_reduce_dtype=dtype)
    operation = r"stablehlo\.reduce_scatter.*?\}\) : \(tensor<[\dx]*(\w+)>"
    reduced = re.findall(operation, program, re.DOTALL)
    assert len(reduced) > 20 and set(reduced) == {expected}
    assert {dtype for op in operands(program, "all_gather") for _, dtype in op} == {"bf16"}


def test_the_step_has_no_scatters(program):
    assert not operands(program, "scatter")


def product_flops(jaxpr, times: int = 1) -> int:
    """FLOPs of the matrix products in a program, in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += times * 2 * math.prod(left.shape[i] for i in contracted) * out.size
        again = times * equation.params.get("length", 1)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                total += product_flops(getattr(inner, "jaxpr", inner), again)
    return total


def is_jaxpr(x) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


@pytest.mark.parametrize(("remat", "blockwise"), [("none", True), ("dots", True), ("full", False)])
def test_flops_of_the_step_are_those_counted(remat, blockwise):
    config = dataclasses.replace(
        DIT_PRESETS["tiny"],
        max_frames=96,
        max_text_bytes=80,
        max_speaker_frames=64,
        blockwise=blockwise,
    )
    mesh, optimizer = mesh_of((1, 1, 1)), OptimizerConfig()
    state = sharded_abstract_state(config, optimizer, mesh)
    step = make_train_step(
        mesh, state, ObjectiveConfig(remat=remat, dtype="bfloat16"), optimizer, 9
    )
    batch = abstract_batch(mesh, 2, config)
    traced = step.trace(state, batch, jax.eval_shape(lambda: jr.key(0)))
    # Inputs need no gradients, and the text's one-hot product is not counted: 0.2 % in all.
    expected = step_flops(config, 2) + 2 * recomputed_flops(config, remat)
    assert product_flops(traced.jaxpr.jaxpr) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(("remat", "runs"), [("dots", 2), ("full", 3)])
def test_with_the_tpu_kernel_no_logits_are_kept_and_dots_saves_its_output(remat, runs):
    config = dataclasses.replace(
        CONFIG,
        model_dim=256,
        num_heads=2,
        text=EncoderConfig(256, 1, 2, 24),
        speaker=EncoderConfig(256, 1, 2, 24),
    )
    plain = lowered((1, 2, 2), grad_reduce_dtype="auto")
    fused = lowered((1, 2, 2), config=config, platform="tpu", remat=remat, attention="pallas")
    logits = f"x{FRAMES}x{FRAMES + TEXT + PATCHES}xf32>"
    assert logits in plain and logits not in fused
    stacks = 3
    assert fused.count("tpu_custom_call") == runs * stacks


def test_the_tpu_kernel_is_refused_elsewhere():
    with pytest.raises(UsageError, match="expected auto on cpu in bfloat16, got pallas"):
        _check_attention(ObjectiveConfig(attention="pallas", dtype="bfloat16"))
