"""Estimates of the memory, compute and traffic of a training run.

Memory is the compiler's figure for the real training step, compiled from shapes for virtual
devices. Compute and traffic are computed from the sizes.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.random as jr
from jax.sharding import Mesh

from echo_eqx.config import DiTConfig
from echo_eqx.errors import UsageError
from echo_eqx.layers.parallel import DATA, FSDP, TENSOR
from echo_eqx.sharding.mesh import check_batch, make_mesh, mesh_shape
from echo_eqx.sharding.specs import check_mesh, parameter_spec, replicated_axes
from echo_eqx.train.config import TrainConfig
from echo_eqx.train.flops import CHIPS, recomputed_flops, step_flops
from echo_eqx.train.state import TrainState, abstract_state, sharded_abstract_state
from echo_eqx.train.step import abstract_batch, make_train_step
from echo_eqx.trees import named_leaves, num_parameters

FULL = 0.9
"""Fraction of a device's memory that a step may use, with a margin for the runtime and for
estimation errors."""

MAX_DEVICES = 2048
"""With more simulated devices, JAX assumes that they belong to several processes."""

QUICK = (
    "--xla_backend_optimization_level=0 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
"""The program never runs, so it is compiled without optimization: the same buffers in a third of
the time."""

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    parameters: int
    moments: int
    average: int
    """The EMA of the weights."""
    gradients: int
    batch: int
    temporaries: int
    """Activations, gathered layers and everything else that the compiler allocates."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends per step; it receives the same amount."""

    gathers: int
    """All-gathers of parameters over fsdp."""
    scatters: int
    """Reduce-scatters of gradients over fsdp."""
    gradient_sums: int
    """All-reduces of gradients, over the axes on which parameters are replicated."""
    activation_sums: int
    """All-reduces of activations over tensor."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Plan:
    """The estimates for one run; times in seconds unless the name says otherwise."""

    model: str
    num_parameters: int
    chip: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    grad_accum_steps: int
    max_frames: int
    max_text_bytes: int
    max_speaker_frames: int
    num_steps: int
    efficiency: float
    memory: Memory
    memory_limit: int
    """Memory of one device, in bytes."""
    largest_batch: int
    """The largest batch size that fits 90 % of the memory; 0 if none does."""
    largest_batch_memory: int
    """Bytes per device with the largest batch size."""
    next_batch_memory: int
    """Bytes per device with the next larger batch size."""
    step_flops: int
    recomputed_flops: int
    """Computed again in the backward pass, beyond `step_flops`; it depends on `remat`."""
    traffic: Traffic
    arithmetic_seconds: float
    link_seconds: float
    memory_seconds: float
    step_time_s: float
    mfu: float
    hours: float
    samples: int
    audio_hours: float
    """If every recording has `max_frames`."""
    warnings: list[str]


def use_virtual_devices(count: int) -> None:
    """Give JAX `count` CPU devices. Call it before JAX is initialized.

    **Raises**: `UsageError` if `count` is out of range.
    """
    if not 1 <= count <= MAX_DEVICES:
        raise UsageError(f"devices: expected 1 to {MAX_DEVICES}, got {count}")
    flags = (
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={count}",
        QUICK,
    )
    os.environ["XLA_FLAGS"] = " ".join(flags)
    jax.config.update("jax_platforms", "cpu")


def make_plan(
    config: TrainConfig, devices: int, chip_name: str, efficiency: float, frame_rate: float
) -> Plan:
    """Estimate the run of `config`, in bfloat16, on `devices` chips.

    JAX must have that many devices: see `use_virtual_devices`. `efficiency` is the fraction of the
    chip's peak FLOP/s that compute reaches when nothing else limits it, counting what the backward
    pass recomputes; MFU does not count that. `frame_rate` is that of the latents, in frames per
    second.

    **Raises**: `UsageError` for an unknown chip, or if the mesh does not divide batch or model.
    """
    if chip_name not in CHIPS:
        raise UsageError(f"chip: expected one of {', '.join(CHIPS)}, got {chip_name[:50]!r}")
    chip = CHIPS[chip_name]
    if not 0 < efficiency <= 1:
        raise UsageError(f"efficiency: expected more than 0 and at most 1, got {efficiency}")
    sizes = mesh_shape(config.mesh, devices)
    grad_accum_steps = config.optimizer.grad_accum_steps
    check_batch(config.batch_size, grad_accum_steps, sizes)
    dit = config.dit_config()
    check_mesh(abstract_state(dit, config.optimizer).model, sizes)
    objective = dataclasses.replace(config.objective, dtype="bfloat16")
    config = dataclasses.replace(config, objective=objective)

    mesh = make_mesh(sizes)
    state = sharded_abstract_state(dit, config.optimizer, mesh)
    memory = step_memory(config, mesh, state)
    larger = dataclasses.replace(config, batch_size=2 * config.batch_size)
    # Memory is affine in the rows per device and microbatch: activations grow with them, state and
    # gathered layers do not. Two compilations give the line.
    rows_per_batch = grad_accum_steps * sizes[DATA] * sizes[FSDP]
    rows = config.batch_size // rows_per_batch
    slope = (step_memory(larger, mesh, state).total - memory.total) / rows
    base = memory.total - slope * rows
    most = max(0, math.floor((FULL * chip.memory - base) / slope))

    flops = step_flops(dit, config.batch_size)
    recomputed = config.batch_size * recomputed_flops(dit, config.objective.remat)
    reduce_dtype = config.objective.grad_reduce_dtype
    traffic = step_traffic(
        dit, state.model, sizes, config.batch_size, grad_accum_steps, reduce_dtype
    )
    arithmetic = (flops + recomputed) / devices / chip.flops / efficiency
    links = traffic.total / chip.link_bandwidth
    # The update reads weights, moments, EMA and gradients, and writes all but the gradients.
    kept = memory.parameters + memory.moments + memory.average
    update = (2 * kept + memory.gradients) / chip.memory_bandwidth
    seconds = max(arithmetic, links, update)
    samples = config.num_steps * config.batch_size
    warning = _memory_warning(memory.total, chip.memory, chip_name)
    warnings = [] if warning is None else [warning]
    if devices > chip.linked:
        warnings.append(
            f"fast links connect only {chip.linked} {chip_name}: with {devices}, communication "
            "takes longer than estimated"
        )
    return Plan(
        model=config.model,
        num_parameters=num_parameters(state.model),
        chip=chip_name,
        devices=devices,
        mesh=sizes,
        batch_size=config.batch_size,
        grad_accum_steps=grad_accum_steps,
        max_frames=dit.max_frames,
        max_text_bytes=dit.max_text_bytes,
        max_speaker_frames=dit.max_speaker_frames,
        num_steps=config.num_steps,
        efficiency=efficiency,
        memory=memory,
        memory_limit=chip.memory,
        largest_batch=most * rows_per_batch,
        largest_batch_memory=round(base + most * slope),
        next_batch_memory=round(base + (most + 1) * slope),
        step_flops=flops,
        recomputed_flops=recomputed,
        traffic=traffic,
        arithmetic_seconds=arithmetic,
        link_seconds=links,
        memory_seconds=update,
        step_time_s=seconds,
        mfu=flops / devices / chip.flops / seconds,
        hours=config.num_steps * seconds / 3600,
        samples=samples,
        audio_hours=samples * dit.max_frames / frame_rate / 3600,
        warnings=warnings,
    )


def step_memory_warning(memory_analysis: Any, device: Any) -> str | None:
    """A warning if a compiled step needs more than 90 % of `device`'s memory, else None.

    `memory_analysis` is the result of the compiled step's method of that name. Also None if the
    device does not report its memory, such as the CPU.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if memory_analysis is None or not limit:
        return None
    return _memory_warning(_needed(memory_analysis), limit, device.device_kind)


# --- Memory -------------------------------------------------------------------------------------


def lower_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The training step of `config`, lowered from shapes only."""
    sizes = config.dit_config()
    state = sharded_abstract_state(sizes, config.optimizer, mesh)
    batch = abstract_batch(mesh, config.batch_size, sizes)
    step = make_train_step(mesh, state, config.objective, config.optimizer, config.num_steps)
    return step.lower(state, batch, jax.eval_shape(lambda: jr.key(0)))


def step_memory(config: TrainConfig, mesh: Mesh, state: TrainState) -> Memory:
    """Bytes on each device for the step of `config`, compiled for `mesh`; `state` is abstract."""
    compiled = lower_step(config, mesh).compile()
    batch = abstract_batch(mesh, config.batch_size, config.dit_config())
    parameters = _shard_bytes(state.model)
    moments = _shard_bytes((state.adam.mu, state.adam.nu))
    average = _shard_bytes(state.ema)
    # Gradients are float32 and sharded like the parameters.
    gradients = parameters
    rows = _shard_bytes(batch)
    needed = _needed(compiled.memory_analysis())
    rest = needed - parameters - moments - average - gradients - rows
    return Memory(parameters, moments, average, gradients, rows, rest)


def _needed(analysis: Any) -> int:
    """Bytes that a compiled step needs; outputs that reuse inputs (`alias`) are counted once."""
    arguments, results = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    return arguments + analysis.temp_size_in_bytes + results - analysis.alias_size_in_bytes


def _shard_bytes(tree: Any) -> int:
    """Bytes of one device's shards of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _memory_warning(needed: int, limit: int, name: str) -> str | None:
    if needed <= FULL * limit:
        return None
    return (
        f"the step needs {needed / GIB:.1f} GiB of the {limit / GIB:.1f} GiB on each {name}, "
        f"{needed / limit:.0%}: expected at most {FULL:.0%}; use --remat full, a smaller "
        "--batch_size, more --grad_accum_steps or more devices"
    )


# --- Traffic ------------------------------------------------------------------------------------


def step_traffic(
    config: DiTConfig,
    model: Any,
    sizes: Mapping[str, int],
    batch_size: int,
    grad_accum_steps: int,
    grad_reduce_dtype: str = "auto",
) -> Traffic:
    """Bytes each device sends in a step over a mesh of `sizes`; `model` may be abstract.

    Assumes ring algorithms, which send the least: an all-gather or reduce-scatter of B bytes over n
    devices sends B (n - 1) / n from each, an all-reduce twice that (Patarasuk & Yuan, 2009,
    doi:10.1016/j.jpdc.2008.09.002). Scalars are left out. `--remat none` sends a little less.
    """
    gathers = scatters = gradient_sums = 0.0
    for name, leaf in named_leaves(model).items():
        spec = parameter_spec(name)
        size = leaf.size / (sizes[TENSOR] if TENSOR in spec else 1)
        if FSDP in spec:
            # Matrices are sent in bfloat16. Stacked layers are gathered in the forward pass and
            # again in the backward pass; AdaLN and other parameters only once.
            passes = 2 if "blocks." in name and "_adaln." not in name else 1
            gathers += grad_accum_steps * passes * _ring(2 * size, sizes[FSDP])
            # Their gradients are reduce-scattered once per microbatch.
            width = 4 if grad_reduce_dtype == "float32" else 2
            scatters += grad_accum_steps * _ring(width * size, sizes[FSDP])
        # Gradients are all-reduced once, in float32, over the axes on which the parameter is
        # replicated.
        axes = replicated_axes(spec)
        here = 4 * size / (1 if FSDP in axes else sizes[FSDP])
        gradient_sums += 2 * _ring(here, math.prod(sizes[axis] for axis in axes))

    rows = batch_size // (sizes[DATA] * sizes[FSDP])
    t, s = config.max_frames, config.max_text_bytes
    # Patches of the reference, and of the latents before a block.
    p = config.max_speaker_frames // config.patch_size
    p += t // config.patch_size if config.blockwise else 0
    d, text, speaker = config.model_dim, config.text, config.speaker
    # An encoder layer sums the outputs of attention and MLP in the forward pass, the attention
    # output again when recomputed, and the gradients at the inputs of its six column-parallel
    # products (q, k, v, gate, w1, w3).
    numbers = 9 * (text.num_layers * s * text.dim + speaker.num_layers * p * speaker.dim)
    # A DiT layer also recomputes the output of its MLP, for the gradient of the gate, and has two
    # products each that read text and reference.
    numbers += config.num_layers * (10 * t * d + 2 * s * text.dim + 2 * p * speaker.dim)
    # AdaLN sums six float32 vectors per layer in the forward pass, and the gradients of the six
    # vectors that all layers share; the rest is bfloat16.
    size = rows * (2 * numbers + 4 * 6 * (config.num_layers + 1) * d)
    activation_sums = 2 * _ring(size, sizes[TENSOR])
    return Traffic(*(round(x) for x in (gathers, scatters, gradient_sums, activation_sums)))


def _ring(size: int | float, devices: int) -> float:
    return size * (devices - 1) / devices
