"""Settings that all training runs share."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from echo_eqx.cli import parse
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.json_data import MAX_JSON_BYTES, from_json, parse_json, to_json
from echo_eqx.layers.precision import MatmulPrecision
from echo_eqx.weights.checkpoint.reader import (
    FOLDER,
    MANIFEST,
    TrainingCheckpoint,
    find_checkpoints,
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) after gradient clipping."""

    learning_rate: float = 1e-4
    """Peak learning rate of the schedule."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine: linear warm-up, then cosine to 0. wsd: warm-up, constant, linear decay to 0 over the
    last steps (Hu et al., arXiv:2404.06395), so that a run can be extended."""
    warmup_ratio: float = 0.05
    """Fraction of --num_steps with a rising learning rate."""
    decay_ratio: float = 0.2
    """wsd only: fraction of --num_steps with a falling learning rate."""
    b1: float = 0.9
    """Adam: decay of the first moment."""
    b2: float = 0.99
    """Adam: decay of the second moment."""
    eps: float = 1e-8
    """Adam: added to the square root of the second moment."""
    weight_decay: float = 0.01
    """For matrices only, not biases, norm weights, AdaLN projections and out_proj."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.9999; 0 keeps none."""
    grad_accum_steps: int = 1
    """Gradient-accumulation microbatches per batch: less memory for the same result."""


@dataclass(frozen=True)
class RunConfig:
    model: str = ""
    """Architecture, by the name of its preset."""
    data: str | None = None
    """What to train on."""
    run_dir: Path = Path("runs/echo")
    """Where the run writes its files. Repeat the command to resume the run."""
    num_steps: int = 300_000
    """Total training steps."""
    batch_size: int = 256
    """Samples per batch, over all devices."""
    checkpoint_every: int = 5_000
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of weights, noise and data order."""
    mesh: str = ""
    """Devices by axis, such as data=1,fsdp=8,tensor=1. By default all are on fsdp."""
    init_from: str | None = None
    """Start from these weights, with a new optimizer state."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(
        default_factory=OptimizerConfig
    )
    matmul_precision: MatmulPrecision = "highest"
    """Precision of float32 matrix products and convolutions on GPU and TPU: highest is exact, the
    others are faster. Products in bfloat16, and CPUs, ignore it."""
    keep_last: int = 3
    """How many of the newest checkpoints to keep."""
    keep_every: int = 50_000
    """Also keep checkpoints at multiples of this many steps; 0 keeps only the newest."""
    export: bool = True
    """Next to each checkpoint, write its weights in bfloat16, for infer."""
    log_every: int = 10
    """Steps between fetches of metrics; metrics.jsonl gets a line for every step regardless."""
    eval_data: str | None = None
    """Held-out data, as --data. Noise is the same at every evaluation."""
    eval_every: int = 1_000
    """Steps between evaluations."""
    eval_batches: int = 8
    """Batches per evaluation."""
    sample_every: int = 0
    """Steps between samples written to WAV; 0 writes none."""
    sample_count: int = 4
    """How many samples to write."""
    max_broken: float = 0.01
    """Fraction of unreadable records above which the run stops."""
    max_nonfinite: int = 10
    """The run stops after this many steps in a row with a non-finite loss or gradient."""
    tensorboard: bool = False
    """Also write run_dir/tensorboard (needs the extra: pip install 'echo_eqx[tensorboard]')."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for runs of several processes. Not needed on TPU pods and SLURM."""
    num_processes: int | None = None
    """With --coordinator: the number of processes."""
    process_id: int | None = None
    """With --coordinator: the index of this process, from 0."""
    start_timeout: int = 300
    """Seconds to wait for all processes to connect."""
    config: Path | None = None
    """Settings that other flags override: config.json of a run, a run folder or a checkpoint."""

    def check(self) -> None:
        """**Raises**: `UsageError` for settings that are wrong with any data."""
        for name, value in dataclasses.asdict(self).items():
            if type(value) is int and name != "process_id":
                least = 0 if name in ("keep_every", "sample_every", "seed") else 1
                if not least <= value < 2**31:
                    raise UsageError(f"{name}: expected at least {least}, got {value}")
        optimizer = self.optimizer
        check_range(
            0.0,
            1.0,
            warmup_ratio=optimizer.warmup_ratio,
            decay_ratio=optimizer.decay_ratio,
            b1=optimizer.b1,
            b2=optimizer.b2,
            ema_decay=optimizer.ema_decay,
            max_broken=self.max_broken,
        )
        for name in ("b1", "b2", "ema_decay"):
            if getattr(optimizer, name) == 1:
                raise UsageError(f"{name}: expected less than 1, got 1.0")
        decay_ratio = optimizer.decay_ratio if optimizer.schedule == "wsd" else 0.0
        if optimizer.warmup_ratio + decay_ratio > 1:
            raise UsageError(
                "expected warmup_ratio + decay_ratio of at most 1, got "
                f"{optimizer.warmup_ratio + decay_ratio:g}"
            )
        check_positive(
            learning_rate=optimizer.learning_rate,
            eps=optimizer.eps,
            max_grad_norm=optimizer.max_grad_norm,
        )
        if not 0 <= optimizer.weight_decay < float("inf"):
            raise UsageError(f"weight_decay: expected 0 or more, got {optimizer.weight_decay}")


Config = TypeVar("Config", bound=RunConfig)


def check_range(least: float, most: float, **values: float) -> None:
    for name, value in values.items():
        if not least <= value <= most:
            raise UsageError(f"{name}: expected {least:g} to {most:g}, got {value}")


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise UsageError(f"{name}: expected a positive number, got {value}")


# Settings that training does not depend on, or that are compared separately: the data by digest,
# the model by its sizes.
_FREE = {
    *("data", "model", "run_dir", "config", "mesh", "coordinator", "num_processes", "process_id"),
    *("start_timeout", "cache_dir", "cache_gb", "checkpoint_every", "keep_last", "keep_every"),
    *("export", "log_every", "eval_every", "sample_every", "sample_count", "codec", "tensorboard"),
    *("max_broken", "max_nonfinite", "seed", "latent_dim", "blockwise"),
    *("max_frames", "max_text_bytes", "max_speaker_frames"),
}


def changes(before: Any, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Flags that training depends on and whose values differ, with the values before and now.

    `before` are the settings of an earlier launch, as written by `to_json`; a field that is missing
    had its default.
    """
    there = _flat(to_json(type(config)())) | _flat(before)
    here = _flat(to_json(config))
    found = {name: (there.get(name), here[name]) for name in here if name not in _FREE}
    return {
        name: values
        for name, values in found.items()
        if values[0] != values[1]
        and not (name in ("init_from", "resume_from") and values[1] is None)
    }


def _flat(settings: Any) -> dict[str, Any]:
    """Values by the names of their flags."""
    values = {}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, dict):
            prefix = "" if name in ("optimizer", "objective") else f"{name}."
            values |= {f"{prefix}{inner}": given for inner, given in _flat(value).items()}
        else:
            values[name] = value
    return values


def settings_from_json(presets: dict[str, Config], default: str, data: Any, where: str) -> Config:
    """Inverse of `to_json`. Fields left out are taken from the preset of `model`, or from the
    preset `default` if that is left out too.

    **Raises**: `EchoError` naming `where` and a field that is unknown or of the wrong type.
    """
    try:
        model = data.get("model", default) if isinstance(data, dict) else default
        if not isinstance(model, str) or model not in presets:
            raise EchoError(f"model: expected one of {', '.join(presets)}, got {str(model)[:50]!r}")
        return from_json(type(presets[model]), data, base=presets[model])
    except EchoError as error:
        raise EchoError(f"{where} does not hold the settings of a run: {error}") from None


def saved_settings(source: Path) -> tuple[Any, str]:
    """Settings as JSON values, from a file, run folder or checkpoint, and where they were found."""
    if (source / MANIFEST).is_file():
        return TrainingCheckpoint(source).manifest.get("settings"), str(source)
    for _, path in find_checkpoints(source / FOLDER):
        with contextlib.suppress(EchoError):  # damaged; the previous one has the same settings
            return TrainingCheckpoint(path).manifest.get("settings"), str(path)
    file = source / "config.json" if source.is_dir() else source
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is not a regular file")
        with file.open("rb") as opened:
            return parse_json(opened.read(MAX_JSON_BYTES + 1)), str(file)
    except (OSError, ValueError) as error:
        raise EchoError(f"{file} cannot be read as settings: {error}") from None


def parse_settings(
    presets: dict[str, Config],
    description: str | None,
    *,
    default: Callable[[Config], str],
    arguments: Sequence[str] | None = None,
) -> Config:
    """Parse the flags of a command, over the settings in --config or the preset of --model.

    Without either flag, they override the preset `default(flags)`.
    """
    kind = type(next(iter(presets.values())))

    def base(flags: Config) -> Config:
        if flags.config is not None:
            return settings_from_json(presets, default(flags), *saved_settings(flags.config))
        return presets.get(flags.model or default(flags), presets[default(flags)])

    return parse(kind, description, default=kind(model=""), base=base, arguments=arguments)
