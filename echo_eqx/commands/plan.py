"""Estimate what a training run needs, before renting it: memory, time, traffic, batch size.

    echo-eqx plan --model 1.3B --devices 32 --chip v4 --batch_size 256
    echo-eqx plan --devices 8 --chip H100 --mesh data=2,fsdp=4 --grad_accum_steps 4 --json

The real training step is compiled for that many virtual devices; no weights are allocated.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import Any, Literal

from echo_eqx.cli import parse
from echo_eqx.config import CODEC_PRESETS
from echo_eqx.errors import UsageError
from echo_eqx.model.blocks import Remat
from echo_eqx.train.config import TRAIN_PRESETS, TrainConfig
from echo_eqx.train.plan import FULL, GIB, Plan, make_plan, use_virtual_devices

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Args:
    model: str = "1.3B"
    """Preset of the model: 1.3B, 840M, 2.4B, tiny."""
    devices: int = 32
    """Chips, over all hosts."""
    chip: str = "v4"
    """One of v4, v5e, v5p, v6e (TPU), A100 (of 80 GB), H100, H200."""
    batch_size: int | None = None
    """Samples per batch, over all devices; by default the preset's."""
    mesh: str = ""
    """Devices by axis, such as data=1,fsdp=8,tensor=1. By default all are on fsdp."""
    max_frames: int | None = None
    """Longest recording in latent frames; by default the preset's."""
    max_text_bytes: int | None = None
    """Longest text in bytes; by default the preset's."""
    max_speaker_frames: int | None = None
    """Longest reference in latent frames, a multiple of 4; by default the preset's."""
    blockwise: bool = False
    """The model has a latent encoder, as in train."""
    num_steps: int | None = None
    """Total training steps; by default the preset's."""
    grad_accum_steps: int = 1
    """Gradient-accumulation microbatches per batch."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights; 0 keeps none."""
    remat: Remat = "dots"
    """What the backward pass recomputes to save memory, as in train."""
    grad_reduce_dtype: Literal["auto", "float32"] = "auto"
    """In which gradients are summed over devices, as in train."""
    codec: str = "48khz"
    """Preset of the codec that made the latents: 48khz, 24khz, tiny. Its frame rate gives the hours
    of audio."""
    efficiency: float = 0.4
    """Fraction of the chips' peak FLOP/s that compute reaches when nothing else limits it, counting
    what --remat recomputes."""
    json: bool = False
    """Print the plan as one JSON object, in bytes and seconds."""


def main() -> None:
    args = parse(Args, __doc__)
    config = train_config(args)
    config.check()
    if args.codec not in CODEC_PRESETS:
        raise UsageError(f"codec: expected one of {', '.join(CODEC_PRESETS)}, got {args.codec!r}")
    frame_rate = CODEC_PRESETS[args.codec].frame_rate
    use_virtual_devices(args.devices)
    plan = make_plan(config, args.devices, args.chip, args.efficiency, frame_rate)
    print(json.dumps(as_json(plan), indent=2) if args.json else "\n".join(as_text(plan)))
    for warning in plan.warnings:
        logger.warning(warning)


def train_config(args: Args) -> TrainConfig:
    """Settings of the run: the preset with the given flags."""
    preset = TRAIN_PRESETS.get(args.model, TrainConfig(model=args.model))
    names = ("batch_size", "max_frames", "max_text_bytes", "max_speaker_frames", "num_steps")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    optimizer = dataclasses.replace(
        preset.optimizer, grad_accum_steps=args.grad_accum_steps, ema_decay=args.ema_decay
    )
    objective = dataclasses.replace(
        preset.objective, remat=args.remat, grad_reduce_dtype=args.grad_reduce_dtype
    )
    settings = {"mesh": args.mesh, "optimizer": optimizer, "objective": objective, **given}
    settings["blockwise"] = args.blockwise
    return dataclasses.replace(preset, data="", **settings)  # a plan reads no data


def as_json(plan: Plan) -> dict[str, Any]:
    data = dataclasses.asdict(plan)
    data["memory"]["total"] = plan.memory.total
    data["traffic"]["total"] = plan.traffic.total
    return data


def as_text(plan: Plan) -> list[str]:
    memory, traffic = plan.memory, plan.traffic
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    per_device = plan.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    parts = f", in {plan.grad_accum_steps} microbatches" if plan.grad_accum_steps > 1 else ""
    lines = [
        f"{plan.model}, {plan.num_parameters / 1e6:.0f} M parameters, on {plan.devices} x "
        f"{plan.chip}: {mesh}",
        f"batch {plan.batch_size}, {per_device} per device{parts}; {plan.max_frames} frames, "
        f"{plan.max_text_bytes} bytes of text, {plan.max_speaker_frames} reference frames",
        "",
        "memory on each device",
        row("parameters, float32", in_bytes(memory.parameters)),
        row("moments, float32", in_bytes(memory.moments)),
    ]
    if memory.average:
        lines.append(row("EMA, float32", in_bytes(memory.average)))
    lines += [
        row("gradients, float32", in_bytes(memory.gradients)),
        row("batch", in_bytes(memory.batch)),
        row(
            "activations and temporaries",
            in_bytes(memory.temporaries),
            "temporaries as the CPU compiler counts them",
        ),
        row(
            "total",
            in_bytes(memory.total),
            f"{memory.total / plan.memory_limit:.0%} of {in_bytes(plan.memory_limit)}",
        ),
        row("largest batch", str(plan.largest_batch), f"at most {FULL:.0%} of memory"),
        "",
        "per step",
        row("arithmetic", f"{plan.step_flops / 1e12:,.1f} TFLOP"),
        row("  recomputed", f"{plan.recomputed_flops / 1e12:,.1f} TFLOP", "depends on --remat"),
        row("  at the efficiency", seconds(plan.arithmetic_seconds), f"{plan.efficiency:.0%}"),
        row("traffic of each device", in_bytes(traffic.total), "sent, and as much received"),
        row("  parameters, all-gather", in_bytes(traffic.gathers)),
        row("  gradients, reduce-scatter", in_bytes(traffic.scatters)),
        row("  gradients, all-reduce", in_bytes(traffic.gradient_sums)),
        row("  activations, all-reduce", in_bytes(traffic.activation_sums)),
        row("  over its links", seconds(plan.link_seconds)),
        row("memory traffic of update", seconds(plan.memory_seconds)),
        row("step time", seconds(plan.step_time_s), "the largest of the three"),
        row("MFU", f"{plan.mfu:.1%}"),
        "",
        f"total run, {plan.num_steps} steps",
        row("time", f"{plan.hours:.1f} h"),
        row("samples", f"{plan.samples:,}"),
        row("audio", f"{plan.audio_hours:,.0f} h", "if every recording has the maximum length"),
    ]
    return lines


def row(name: str, value: str, remark: str = "") -> str:
    return f"  {name:<28}{value:>16}  {remark}".rstrip()


def in_bytes(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.2f} MiB"


def seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 0.1 else f"{1e3 * value:.2f} ms"
