"""The mesh of devices, by its three axes: `data`, `fsdp`, `tensor`."""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echo_eqx.errors import UsageError
from echo_eqx.layers.parallel import DATA, FSDP, TENSOR

AXES = (DATA, FSDP, TENSOR)
BATCH_SPEC = PartitionSpec((DATA, FSDP))
"""A batch is split over `data` and `fsdp`, and replicated over `tensor`."""


def mesh_shape(text: str, num_devices: int) -> dict[str, int]:
    """Parse axis sizes such as `data=1,fsdp=8,tensor=1`; an axis left out is 1.

    Empty text puts all devices on `fsdp`.

    **Raises**: `UsageError` for an unknown axis, or sizes that do not multiply to `num_devices`.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    if not text.strip():
        return {**sizes, FSDP: num_devices}
    seen = set()
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        good = name in AXES and name not in seen and value.isascii() and value.isdigit()
        if not good or not 0 < int(value[:9]) < 2**20:
            raise UsageError(f"expected mesh sizes such as data=1,fsdp=8,tensor=1, got {text!r}")
        seen.add(name)
        sizes[name] = int(value)
    if math.prod(sizes.values()) != num_devices:
        product = " x ".join(str(size) for size in sizes.values())
        raise UsageError(
            f"expected a mesh of {num_devices} devices, got {text}: "
            f"{product} = {math.prod(sizes.values())}"
        )
    return sizes


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """A mesh over all devices of all processes."""
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=auto)


def check_batch(batch_size: int, grad_accum_steps: int, sizes: dict[str, int]) -> None:
    """Check that the batch divides evenly over the devices and gradient-accumulation steps.

    **Raises**: `UsageError` if it does not.
    """
    devices = sizes[DATA] * sizes[FSDP]
    if grad_accum_steps < 1 or batch_size < 1 or batch_size % (devices * grad_accum_steps):
        raise UsageError(
            f"batch_size: expected a multiple of data x fsdp = {devices} devices times "
            f"{grad_accum_steps} gradient-accumulation steps, got {batch_size}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
