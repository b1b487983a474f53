"""Settings for training EchoDiT: the published defaults, and a preset for each model."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from echo_eqx import voice
from echo_eqx.config import DIT_PRESETS, DiTConfig
from echo_eqx.errors import UsageError
from echo_eqx.generation import REFERENCE_LUFS, SamplerSettings
from echo_eqx.model.blocks import Remat
from echo_eqx.train.settings import OptimizerConfig, RunConfig, check_positive, check_range

__all__ = ["TRAIN_PRESETS", "ObjectiveConfig", "OptimizerConfig", "TrainConfig"]


@dataclass(frozen=True)
class ObjectiveConfig:
    text_dropout: float = 0.1
    """Fraction of samples trained without text, for guidance."""
    speaker_dropout: float = 0.1
    """Fraction of samples trained without a reference, for guidance."""
    timestep_logit_mean: float = 0.0
    """Mean of the logit-normal distribution of timesteps. Above 0 there is more noise, so the model
    has to rely on the text: a small model learns to read sooner at 1."""
    loss_frames: Literal["all", "valid"] = "all"
    """all: the loss includes the silence after a recording, so that the model learns when to stop;
    valid: only the frames of the recording."""
    prefix_probability: float = 0.5
    """Block-wise models: fraction of samples that continue the beginning of their recording, of
    random length. The loss is over what follows it."""
    cut_probability: float = 0.5
    """Block-wise models: fraction of samples whose canvas ends at a random frame, so that a short
    block is not taken for the end of the speech."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the model: auto is bfloat16 on GPU and TPU, float32 on CPU. Parameters,
    moments, norms and the loss are float32 always."""
    remat: Remat = "dots"
    """What the backward pass recomputes to save memory: full (one activation per layer is kept:
    least memory, a third more arithmetic), dots (the outputs of linear layers and attention are
    kept, elementwise operations are recomputed) or none (everything is kept)."""
    attention: Literal["auto", "pallas"] = "auto"
    """auto: cuDNN's fused kernel on GPU in bfloat16, plain products elsewhere. pallas: on TPU in
    bfloat16, with heads of 128 channels, a fused kernel, so that logits need no memory. It was
    compiled for TPUs and tested on CPU, but has not run on a TPU: first compare some losses."""
    grad_reduce_dtype: Literal["auto", "float32"] = "auto"
    """In which the gradients are summed over the devices of the mesh axis fsdp: auto is --dtype;
    float32 sends twice as much and rounds once, at the end."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    model: str = "1.3B"
    """Architecture, by the name of its preset: 1.3B, 840M, 2.4B, tiny, voice."""
    data: str | None = None
    """Tar shards: a folder, a glob in quotes, one file, or hf://datasets/owner/name[@revision]."""
    silence: str | None = None
    """Latents of silence that pad short recordings: a *.npy or *.safetensors of (frames, channels),
    or zeros. By default silence.safetensors or silence.npy next to the shards."""
    init_from: str | None = None
    """Start from these weights, as infer takes them as --checkpoint, with a new optimizer state."""
    resume_from: str | None = None
    """Start from weights, moments and counters of a published full_state.pkl: a file or Hub id."""
    max_frames: int | None = None
    """Longest recording in latent frames; by default the preset's, 768."""
    max_text_bytes: int | None = None
    """Longest text in bytes; by default the preset's, 768."""
    max_speaker_frames: int | None = None
    """Longest reference in latent frames, a multiple of 4; by default the preset's, 512."""
    skip_longer: bool = False
    """Leave out recordings longer than --max_frames and texts longer than --max_text_bytes. By
    default they are truncated; a truncated recording keeps its whole text. Both are counted."""
    latent_dim: int | None = None
    """Channels of a latent frame; by default the preset's, 128."""
    blockwise: bool = False
    """Train a latent encoder too, with which infer --block_frames continues latents already
    generated. The preset 2.4B always has one."""
    objective: Annotated[ObjectiveConfig, tyro.conf.arg(name="")] = field(
        default_factory=ObjectiveConfig
    )
    eval_data: str | None = None
    """Held-out shards, as --data. Noise and timesteps are the same at every evaluation."""
    sample_every: int = 0
    """Steps between samples generated as WAV, for texts and references of --eval_data, or else of
    --data; 0 generates none. Needs --codec."""
    sample_count: int = 4
    """How many samples to generate."""
    codec: str | None = None
    """Codec weights that the shards were encoded with: a file, a folder, a Hub id, or voice. Used
    to decode samples, and by infer with this run's weights."""
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    """Sampler settings for samples, and the defaults of infer with this run's weights."""
    expand_text: bool = False
    """Whether infer, with this run's weights, spells out English numbers, dates, money and
    abbreviations by default."""
    speaker_lufs: float = REFERENCE_LUFS
    """Loudness of the references in the data (prepare --lufs), to which infer normalizes others."""
    num_streams: int | None = None
    """Sample streams that the shards are assigned to and that are read in parallel, each by one
    host. By default as many as batch size and number of shards allow, up to 64."""
    cache_dir: Path = Path("~/.cache/echo_eqx/shards")
    """Cache for shards from the Hub."""
    cache_gb: float = 200.0
    """Size limit of the cache, in 10^9 bytes."""

    def dit_config(self) -> DiTConfig:
        """Sizes of the model, with the maximum lengths of this run."""
        names = ("max_frames", "max_text_bytes", "max_speaker_frames", "latent_dim")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        preset = DIT_PRESETS[self.model]
        return dataclasses.replace(preset, blockwise=self.blockwise or preset.blockwise, **given)

    def check(self) -> None:
        """**Raises**: `UsageError` for settings that are wrong with any data."""
        if self.model not in DIT_PRESETS:
            raise UsageError(f"model: expected one of {', '.join(DIT_PRESETS)}, got {self.model!r}")
        if self.data is None:
            raise UsageError(
                "--data is missing; expected a folder of tar shards, a glob or hf://datasets/..."
            )
        if self.init_from is not None and self.resume_from is not None:
            raise UsageError("expected --init_from or --resume_from, got both")
        super().check()
        patch = DIT_PRESETS[self.model].patch_size
        if self.max_speaker_frames is not None and self.max_speaker_frames % patch:
            raise UsageError(
                f"max_speaker_frames: expected a multiple of {patch}, got {self.max_speaker_frames}"
            )
        objective = self.objective
        dropout = {name: getattr(objective, name) for name in ("text_dropout", "speaker_dropout")}
        check_range(0.0, 1.0, **dropout)
        self._check_blocks()
        check_range(-10.0, 10.0, timestep_logit_mean=objective.timestep_logit_mean)
        check_range(-70.0, 0.0, speaker_lufs=self.speaker_lufs)
        check_positive(cache_gb=self.cache_gb)
        self.sampler.check()
        if self.sample_every and self.codec is None:
            raise UsageError("--sample_every needs --codec")

    def _check_blocks(self) -> None:
        objective, sizes = self.objective, self.dit_config()
        for name in ("prefix_probability", "cut_probability"):
            value = getattr(objective, name)
            check_range(0.0, 1.0, **{name: value})
            if not sizes.blockwise and value != getattr(ObjectiveConfig(), name):
                raise UsageError(f"--{name} {value} needs a block-wise model; add --blockwise")
        if sizes.blockwise and sizes.max_frames <= sizes.patch_size:
            raise UsageError(
                f"max_frames: expected more than {sizes.patch_size} for a block-wise model, got "
                f"{sizes.max_frames}"
            )


# The tiny model is for a laptop, so its batches are small too.
TRAIN_PRESETS: dict[str, TrainConfig] = {
    **{name: TrainConfig(model=name) for name in DIT_PRESETS},
    "tiny": TrainConfig(
        model="tiny",
        num_steps=2_000,
        batch_size=16,
        checkpoint_every=200,
        max_frames=256,
        max_text_bytes=256,
        max_speaker_frames=128,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        keep_every=0,
        eval_every=200,
        eval_batches=4,
    ),
    # The small voice in the package, on its own shards.
    "voice": TrainConfig(
        model="voice",
        data=str(voice.SHARDS),
        run_dir=Path("runs/voice"),
        num_steps=400,
        batch_size=16,
        checkpoint_every=100,
        optimizer=OptimizerConfig(learning_rate=1.5e-3, ema_decay=0.99),
        objective=ObjectiveConfig(timestep_logit_mean=1.0),
        keep_every=0,
        eval_every=100,
        sample_every=100,
        codec="voice",
        sampler=voice.SETTINGS,
        expand_text=True,
        speaker_lufs=voice.REFERENCE_LUFS,
    ),
}
