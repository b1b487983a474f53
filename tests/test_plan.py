"""The plan of a run: its numbers add up and match the compiled program; errors are one line."""

import dataclasses
import json
import math
import subprocess
from types import SimpleNamespace
from typing import Any

import jax
import jax.random as jr
import pytest
from processes import QUICK_COMPILE, SCRIPTS, run

from echo_eqx.commands import plan
from echo_eqx.config import DIT_PRESETS
from echo_eqx.errors import UsageError
from echo_eqx.sharding.mesh import make_mesh, mesh_shape
from echo_eqx.sharding.specs import parameter_spec
from echo_eqx.train.config import TRAIN_PRESETS, TrainConfig
from echo_eqx.train.flops import CHIPS, recomputed_flops, step_flops
from echo_eqx.train.plan import Memory, Plan, Traffic, make_plan, step_memory_warning, step_traffic
from echo_eqx.train.state import abstract_state, sharded_abstract_state
from echo_eqx.train.step import abstract_batch, make_train_step
from echo_eqx.trees import named_leaves

MESH = "data=2,fsdp=2,tensor=2"
SHORT = {"batch_size": 16, "max_frames": 24, "max_text_bytes": 20, "max_speaker_frames": 16}


def run_plan(*flags: str) -> subprocess.CompletedProcess[str]:
    # The command adds the number of devices itself.
    return run(SCRIPTS / "plan.py", *flags, XLA_FLAGS=QUICK_COMPILE)


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """A plan that needs too much memory, on more chips than fast links connect."""
    flags = ("--model", "tiny", "--devices", "10", "--chip", "A100", "--batch_size", "60000")
    return run_plan(*flags, "--mesh", "data=5,fsdp=2", "--ema_decay", "0.99", "--json")


@pytest.fixture
def printed(done) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_is_computed_from_shards(printed):
    memory = printed["memory"]
    model = abstract_state(DIT_PRESETS["tiny"], TRAIN_PRESETS["tiny"].optimizer).model
    shards = sum(
        leaf.size // (2 if "fsdp" in parameter_spec(name) else 1)
        for name, leaf in named_leaves(model).items()
    )
    assert memory["parameters"] == memory["gradients"] == memory["average"] == 4 * shards
    assert memory["moments"] == 8 * shards
    # Latents float32, ids int32, masks one byte; 6000 samples on each device.
    assert memory["batch"] == 6000 * ((256 + 128) * (4 * 128 + 1) + 256 * (4 + 1))
    assert memory["temporaries"] > 0
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")


def test_times_add_up(printed):
    chip = CHIPS["A100"]
    config = TRAIN_PRESETS["tiny"].dit_config()
    flops, recomputed = step_flops(config, 60_000), 60_000 * recomputed_flops(config, "dots")
    assert (printed["step_flops"], printed["recomputed_flops"]) == (flops, recomputed)
    total = flops + recomputed
    assert printed["arithmetic_seconds"] == pytest.approx(total / 10 / chip.flops / 0.4)
    traffic = printed["traffic"]
    assert traffic["total"] == sum(v for k, v in traffic.items() if k != "total")
    assert printed["link_seconds"] == pytest.approx(traffic["total"] / chip.link_bandwidth)
    times = [printed[f"{name}_seconds"] for name in ("arithmetic", "link", "memory")]
    assert printed["step_time_s"] == max(times)
    assert printed["mfu"] == pytest.approx(flops / 10 / chip.flops / max(times))
    assert printed["hours"] == pytest.approx(2000 * max(times) / 3600)
    assert printed["samples"] == 2000 * 60_000
    assert printed["audio_hours"] == pytest.approx(2000 * 60_000 * 256 / 25 / 3600)


def test_the_largest_batch_fits_and_the_next_does_not(printed):
    limit = 0.9 * printed["memory_limit"]
    assert printed["largest_batch_memory"] <= limit < printed["next_batch_memory"]
    assert printed["largest_batch"] % 10 == 0 and 16 < printed["largest_batch"] < 60_000
    # Memory is on the line through the plan's own batch.
    more = printed["next_batch_memory"] - printed["largest_batch_memory"]
    steps = (60_000 - printed["largest_batch"]) // 10
    expected = printed["largest_batch_memory"] + steps * more
    assert printed["memory"]["total"] == pytest.approx(expected, rel=1e-6)


def test_a_plan_that_does_not_fit_gives_a_warning(done, printed):
    memory, links = done.stderr.splitlines()
    assert memory.startswith("warning: the step needs ") and "80.0 GiB on each A100" in memory
    assert links.startswith("warning: fast links connect only 8 A100: with 10, communication")
    assert [f"warning: {said}" for said in printed["warnings"]] == [memory, links]


def test_the_table_agrees_with_the_json(printed):
    memory, traffic = printed["memory"], printed["traffic"]
    del memory["total"], traffic["total"]
    facts = {**printed, "memory": Memory(**memory), "traffic": Traffic(**traffic)}
    table = "\n".join(plan.as_text(Plan(**facts)))
    assert "temporaries as the CPU compiler counts them" in table
    assert f"{printed['largest_batch']}  at most 90% of memory" in table
    assert f"{printed['step_time_s']:.3f} s  the largest of the three" in table
    for name in ("step_flops", "recomputed_flops"):
        assert f"{printed[name] / 1e12:,.1f} TFLOP" in table
    assert "120,000,000" in table and "data 5, fsdp 2, tensor 1" in table


def test_bad_input_gives_one_line_errors():
    cases = {
        "chip: expected one of v4, v5e,": ("--chip", "v3"),
        "devices: expected 1 to 2048, got 0": ("--devices", "0"),
        "expected a mesh of 32 devices": ("--mesh", "fsdp=8"),
        "batch_size: expected a multiple of data x fsdp = 32": ("--batch_size", "250"),
        "model: expected one of": ("--model", "3B"),
    }
    for said, flags in cases.items():
        done = run_plan(*flags)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and said in done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    config = TRAIN_PRESETS["tiny"]
    for efficiency in (0.0, 1.5, math.nan):
        with pytest.raises(UsageError, match=f"efficiency: expected .*, got {efficiency}"):
            make_plan(config, 8, "v4", efficiency, 25.0)
    with pytest.raises(UsageError, match="expected tensor to divide"):
        make_plan(dataclasses.replace(config, mesh="tensor=8"), 8, "v4", 0.4, 25.0)


# --- Against the program itself -----------------------------------------------------------------


def short_step(
    mesh_text: str, grad_accum_steps: int, reduce_dtype: Any = "auto", **sizes
) -> tuple[TrainConfig, Any]:
    """The settings of a small step, and the step traced for eight devices."""
    config = dataclasses.replace(TRAIN_PRESETS["tiny"], **{**SHORT, **sizes})
    optimizer = dataclasses.replace(config.optimizer, grad_accum_steps=grad_accum_steps)
    objective = dataclasses.replace(
        config.objective, dtype="bfloat16", grad_reduce_dtype=reduce_dtype
    )
    config = dataclasses.replace(config, optimizer=optimizer, objective=objective)
    mesh = make_mesh(mesh_shape(mesh_text, 8))
    dit = config.dit_config()
    state = sharded_abstract_state(dit, optimizer, mesh)
    step = make_train_step(mesh, state, objective, optimizer, 100)
    batch = abstract_batch(mesh, config.batch_size, dit)
    return config, step.trace(state, batch, jax.eval_shape(lambda: jr.key(0)))


def collectives(jaxpr: Any, times: int = 1):
    """Name, axes, input bytes and count of every collective."""
    for equation in jaxpr.eqns:
        parameters = equation.params
        name = equation.primitive.name
        if name in ("all_gather", "reduce_scatter", "psum_invariant"):
            axes = parameters["axes" if name == "psum_invariant" else "axis_name"]
            for value in equation.invars:
                if value.aval.shape:
                    size = value.aval.size * value.aval.dtype.itemsize
                    yield name, axes, size, times
        else:
            again = times * parameters["length"] if name == "scan" else times
            for inner in parameters.values():
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from collectives(inner, again)


@pytest.mark.parametrize(
    ("mesh", "grad_accum_steps", "reduce_dtype", "blockwise"),
    [(MESH, 2, "auto", True), ("data=1,fsdp=8,tensor=1", 1, "float32", False)],
)
def test_traffic_matches_the_steps_collectives(mesh, grad_accum_steps, reduce_dtype, blockwise):
    config, traced = short_step(mesh, grad_accum_steps, reduce_dtype, blockwise=blockwise)
    sizes = mesh_shape(mesh, 8)
    sent = dict.fromkeys(("gathers", "scatters", "gradient_sums", "activation_sums"), 0.0)
    for name, axes, size, times in collectives(traced.jaxpr.jaxpr):
        n = math.prod(sizes[axis] for axis in axes)
        if name == "all_gather":
            sent["gathers"] += times * size * (n - 1)
        elif name == "reduce_scatter":
            sent["scatters"] += times * size * (n - 1) / n
        else:
            kind = "activation_sums" if axes == ("tensor",) else "gradient_sums"
            sent[kind] += times * 2 * size * (n - 1) / n
    dit = config.dit_config()
    model = abstract_state(dit, config.optimizer).model
    counted = step_traffic(dit, model, sizes, config.batch_size, grad_accum_steps, reduce_dtype)
    assert counted == Traffic(**{name: round(size) for name, size in sent.items()})


def test_a_plan_uses_the_requested_remat():
    for remat in ("full", "none"):
        assert plan.train_config(plan.Args(remat=remat)).objective.remat == remat
    wide = plan.Args(grad_reduce_dtype="float32")
    assert plan.train_config(wide).objective.grad_reduce_dtype == "float32"


# --- The trainer's check ------------------------------------------------------------------------


def test_the_trainer_warns_if_a_step_barely_fits():
    analysis = SimpleNamespace(
        argument_size_in_bytes=50 * 2**30,
        output_size_in_bytes=41 * 2**30,
        alias_size_in_bytes=40 * 2**30,
        temp_size_in_bytes=22 * 2**30,
    )

    def device(stats: Any) -> Any:
        return SimpleNamespace(memory_stats=lambda: stats, device_kind="NVIDIA H100")

    warning = step_memory_warning(analysis, device({"bytes_limit": 80 * 2**30}))
    assert warning is not None
    assert "the step needs 73.0 GiB of the 80.0 GiB on each NVIDIA H100, 91%" in warning
    assert step_memory_warning(analysis, device({"bytes_limit": 82 * 2**30})) is None
    assert (
        step_memory_warning(analysis, device({})) is None
        and step_memory_warning(analysis, device(None)) is None
    )
    assert step_memory_warning(None, device({"bytes_limit": 1})) is None
    assert step_memory_warning(analysis, jax.devices()[0]) is None
