"""Settings of a training run: frozen data with the published defaults, a preset for each model."""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from echo_eqx.config import DIT_PRESETS, DiTConfig
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.weights.checkpoint import FOLDER, MANIFEST, TrainingCheckpoint, find_checkpoints


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) behind a clip of the gradient's norm."""

    learning_rate: float = 1e-4
    """Peak of the schedule."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine: linear warm-up, then cosine to 0. wsd: warm-up, a constant rate, and a linear decay
    to 0 over the last steps (Hu et al., arXiv:2404.06395), so that a run can be made longer."""
    warmup: float = 0.05
    """Share of --num_steps with a rising rate."""
    decay: float = 0.2
    """wsd only: share of --num_steps with a falling rate."""
    b1: float = 0.9
    """Adam: memory of the gradient's mean."""
    b2: float = 0.99
    """Adam: memory of the gradient's square."""
    eps: float = 1e-8
    """Adam: added to the root of the square."""
    weight_decay: float = 0.01
    """On matrices only: not on biases, norm weights, AdaLN projections and out_proj."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.9999; 0 keeps none."""
    accumulate: int = 1
    """Parts that a batch is worked off in, one after the other: less memory, the same result."""


@dataclass(frozen=True)
class ObjectiveConfig:
    text_dropout: float = 0.1
    """Share of samples that train without their text, for guidance."""
    speaker_dropout: float = 0.1
    """Share of samples that train without their reference, for guidance."""
    loss_frames: Literal["all", "valid"] = "all"
    """all: the silence behind a recording is learned too, which is how a model learns to end."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the model: auto is bfloat16 on GPU and TPU, float32 on CPU. Parameters,
    moments, norms and the loss are float32 always."""


@dataclass(frozen=True)
class TrainConfig:
    model: str = "1.3B"
    """Architecture, by the name of its preset: 1.3B, 840M, 2.4B, tiny."""
    data: str | None = None
    """Tar shards: a folder, a glob in quotes, one file, or hf://datasets/owner/name[@revision]."""
    run_dir: Path = Path("runs/echo")
    """Everything the run writes. The same command again goes on where it stopped."""
    num_steps: int = 300_000
    """Batches to train on, in all."""
    batch_size: int = 256
    """Samples in a batch, over all devices."""
    checkpoint_every: int = 5_000
    """Steps between checkpoints."""
    seed: int = 0
    """Of weights, noise, and the order of the data."""
    silence: str | None = None
    """Latents of silence, behind recordings that are shorter than the window: a *.npy or
    *.safetensors of (frames, channels), or zeros. By default silence.safetensors or silence.npy
    beside the shards."""
    mesh: str = ""
    """Devices by axis, such as data=1,fsdp=8,tensor=1. By default all are along fsdp."""
    init_from: str | None = None
    """Begin with these weights: anything infer.py takes as --checkpoint. The optimizer is fresh."""
    resume_from: str | None = None
    """Begin with weights, moments and counters of a published full_state.pkl: a file, or Hub id."""
    frames: int | None = None
    """Window of a sample in latent frames, 25 a second; by default the preset's, 768."""
    text_bytes: int | None = None
    """Longest text in bytes; by default the preset's, 768."""
    ref_frames: int | None = None
    """Longest reference in latent frames, a multiple of 4; by default the preset's, 512."""
    latent_dim: int | None = None
    """Channels of a latent frame; by default the preset's, 128."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(
        default_factory=OptimizerConfig
    )
    objective: Annotated[ObjectiveConfig, tyro.conf.arg(name="")] = field(
        default_factory=ObjectiveConfig
    )
    keep_last: int = 3
    """Newest checkpoints that stay."""
    keep_every: int = 50_000
    """Checkpoints at multiples of so many steps stay too; 0 keeps none of them."""
    export: bool = True
    """Beside each checkpoint write its weights in bfloat16, for infer.py and other runtimes."""
    log_every: int = 10
    """Steps between looks at the device; metrics.jsonl gets a line for every step all the same."""
    eval_data: str | None = None
    """Held-out shards, as --data. Noise and times are the same at every evaluation."""
    eval_every: int = 1_000
    """Steps between evaluations."""
    eval_batches: int = 8
    """Batches in an evaluation."""
    sample_every: int = 0
    """Steps between samples spoken to WAV, of texts and references from the held-out shards, or
    the first of the data without any; 0 speaks none. Needs --codec."""
    sample_count: int = 4
    """Texts that are spoken."""
    codec: str | None = None
    """DACVAE weights for the samples: a file, a folder or a Hub id."""
    lanes: int | None = None
    """Parts that the shards are dealt to, read side by side; each belongs to one host. By default
    up to 64, as batch and shards allow."""
    cache_dir: Path = Path("~/.cache/echo_eqx/shards")
    """Where shards from the Hub lie while they are used."""
    cache_gb: float = 200.0
    """Room for them, in 10^9 bytes."""
    max_broken: float = 0.01
    """Share of unreadable records above which the run stops."""
    max_nonfinite: int = 10
    """Steps in a row with a loss or gradient that is not finite, after which the run stops."""
    tensorboard: bool = False
    """Also write run_dir/tensorboard (needs the extra: pip install 'echo_eqx[tensorboard]')."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for several processes anywhere. TPU pods and SLURM need no flags."""
    num_processes: int | None = None
    """With --coordinator: how many processes there are."""
    process_id: int | None = None
    """With --coordinator: which of them this is, from 0."""
    start_timeout: int = 300
    """Seconds to wait for all processes."""
    config: Path | None = None
    """Base that the other flags override: config.json of a run, a run folder or a checkpoint."""

    def dit_config(self) -> DiTConfig:
        """Sizes of the model, with the lengths it is trained at."""
        preset = DIT_PRESETS[self.model]
        lengths = {
            "max_frames": self.frames,
            "max_text_bytes": self.text_bytes,
            "max_speaker_frames": self.ref_frames,
            "latent_dim": self.latent_dim,
        }
        given = {name: value for name, value in lengths.items() if value is not None}
        return dataclasses.replace(preset, **given)

    def check(self) -> None:
        """**Raises**: `UsageError` for what can be refused before anything is looked at."""
        if self.model not in DIT_PRESETS:
            raise UsageError(f"model is {self.model!r}; wanted one of {', '.join(DIT_PRESETS)}")
        if self.data is None:
            raise UsageError(
                "--data is missing; wanted a folder of tar shards, a glob or hf://datasets/..."
            )
        if self.init_from is not None and self.resume_from is not None:
            raise UsageError("wanted --init_from or --resume_from, not both")
        for name, value in dataclasses.asdict(self).items():
            if type(value) is int and name != "process_id":
                least = 0 if name in ("keep_every", "sample_every", "seed") else 1
                if not least <= value < 2**31:
                    raise UsageError(f"{name} is {value}; wanted at least {least}")
        patch = DIT_PRESETS[self.model].patch_size
        if self.ref_frames is not None and self.ref_frames % patch:
            raise UsageError(f"ref_frames is {self.ref_frames}; wanted a multiple of {patch}")
        optimizer, objective = self.optimizer, self.objective
        shares = {
            "warmup": optimizer.warmup,
            "decay": optimizer.decay,
            "b1": optimizer.b1,
            "b2": optimizer.b2,
            "ema": optimizer.ema,
            "text_dropout": objective.text_dropout,
            "speaker_dropout": objective.speaker_dropout,
            "max_broken": self.max_broken,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1 or (name in ("b1", "b2", "ema") and share == 1):
                raise UsageError(f"{name} is {share}; wanted a share from 0 to 1")
        if optimizer.warmup + (optimizer.schedule == "wsd") * optimizer.decay > 1:
            raise UsageError("warmup and decay are together more than the whole run")
        positive = {
            "learning_rate": optimizer.learning_rate,
            "eps": optimizer.eps,
            "clip": optimizer.clip,
            "cache_gb": self.cache_gb,
        }
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value}; wanted a positive number")
        if not 0 <= optimizer.weight_decay < float("inf"):
            raise UsageError(f"weight_decay is {optimizer.weight_decay}; wanted 0 or more")
        if self.sample_every and self.codec is None:
            raise UsageError("--sample_every needs --codec")


# A laptop's model trains on a laptop's batches.
TRAIN_PRESETS: dict[str, TrainConfig] = {
    **{name: TrainConfig(model=name) for name in DIT_PRESETS},
    "tiny": TrainConfig(
        model="tiny",
        num_steps=2_000,
        batch_size=16,
        checkpoint_every=200,
        frames=256,
        text_bytes=256,
        ref_frames=128,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        keep_every=0,
        eval_every=200,
        eval_batches=4,
    ),
}


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Settings as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def config_from_json(data: Any, where: str) -> TrainConfig:
    """Inverse of `to_json`; fields left out have the defaults of the model's preset.

    **Raises**: `EchoError` naming `where` and a field that is unknown or of the wrong type.
    """
    try:
        model = data.get("model", "1.3B")
        if model not in TRAIN_PRESETS:
            raise ValueError(f"model is {str(model)[:50]!r}; wanted {', '.join(DIT_PRESETS)}")
        return _filled(TRAIN_PRESETS[model], data)
    except (AttributeError, TypeError, ValueError) as error:
        raise EchoError(f"{where} holds no settings of a run: {error}") from None


def base_config(source: Path) -> TrainConfig:
    """Settings in a JSON file, in a run folder, or in a checkpoint of one."""
    checkpoint = source if (source / MANIFEST).is_file() else None
    if checkpoint is None and (found := find_checkpoints(source / FOLDER)):
        checkpoint = found[0][1]
    if checkpoint is not None:
        settings = TrainingCheckpoint(checkpoint).manifest.get("settings")
        return config_from_json(settings, str(checkpoint))
    file = source / "config.json" if source.is_dir() else source
    try:
        return config_from_json(json.loads(file.read_bytes()), str(file))
    except (OSError, ValueError) as error:
        raise EchoError(f"{file} cannot be read as settings: {error}") from None


def _filled(default: Any, data: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(type(default))
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ValueError(f"unknown field {unknown[0][:50]}")
    values = {name: _value(name, hints[name], getattr(default, name), data[name]) for name in data}
    return dataclasses.replace(default, **values)


def _value(name: str, hint: Any, default: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(default):
        return _filled(default, value)
    options = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    for option in options:
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if isinstance(option, type) and type(value) is option:
            return value
    raise ValueError(f"field {name} is {str(value)[:50]!r}; wanted {hint}")
