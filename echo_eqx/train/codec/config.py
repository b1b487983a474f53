"""Settings of a training run of a codec."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from echo_eqx.config import CODEC_PRESETS, CodecConfig
from echo_eqx.errors import UsageError
from echo_eqx.train.settings import OptimizerConfig, RunConfig, check_positive


@dataclass(frozen=True)
class CodecLossConfig:
    """Weights of the terms of the loss."""

    mel: float = 1.0
    """Distance of log mel spectra, summed over five resolutions."""
    magnitude: float = 0.3
    """Distance of log spectra, likewise."""
    periodicity: float = 0.0
    """Distance of normalised autocorrelations, over the lags of a voice's pitch: for a decoder that
    makes harmonics at the rates of its own stages in place of the voice's. 5 is much."""
    waveform: float = 10.0
    """Mean absolute difference of the samples."""
    divergence: float = 0.01
    """Nats that a channel of a frame carries (KL from the standard normal): keeps latents small and
    smooth, which is what a model of them needs."""
    adversarial: bool = False
    """Train discriminators along, which make the sound sharper: better after a run without, whose
    weights --init_from takes."""
    critic: float = 1.0
    """adversarial only: what the discriminators take for a recording."""
    features: float = 2.0
    """adversarial only: difference of what the discriminators see on their way."""


@dataclass(frozen=True)
class CodecTrainConfig(RunConfig):
    model: str = "24khz"
    """Sizes, by the name of a preset: 24khz, 48khz, tiny. The watermark of a codec is not trained:
    without --init_from it has none."""
    data: str | None = None
    """Recordings, as prepare.py takes them: a folder, a manifest, tars, Parquet. Transcripts are
    needed by that format alone."""
    run_dir: Path = Path("runs/codec")
    """Everything the run writes. The same command again goes on where it stopped."""
    num_steps: int = 400_000
    batch_size: int = 8
    """Crops in a batch, over all devices."""
    checkpoint_every: int = 500
    keep_every: int = 0
    """Checkpoints at multiples of so many steps stay too; 0 keeps none of them."""
    init_from: str | None = None
    """Begin with these weights, and have their sizes: anything infer.py takes as --codec."""
    crop_seconds: float = 0.4
    """Length of a crop, about: it has whole latent frames."""
    sample_rate: int | None = None
    """Of the audio, in hertz; by default the preset's."""
    encoder_dim: int | None = None
    """Channels at the full rate; they double with every change of rate. By default the preset's."""
    encoder_rates: tuple[int, ...] | None = None
    """Factors between the rate of samples and that of latents; the decoder has them backwards."""
    latent_dim: int | None = None
    """Channels of a latent; by default the preset's."""
    decoder_dim: int | None = None
    """Channels at the rate of latents; they halve with every change of rate."""
    freeze_encoder: bool = False
    """Train the decoder alone, so that latents made before stay what they are."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=7e-4,
            warmup_ratio=0.05,
            b1=0.9,
            b2=0.99,
            weight_decay=0.0,
            max_grad_norm=0.5,
        )
    )
    loss: CodecLossConfig = field(default_factory=CodecLossConfig)

    def codec_config(self) -> CodecConfig:
        """Sizes of a codec that is trained from nothing."""
        given = {
            name: getattr(self, name)
            for name in ("sample_rate", "encoder_dim", "encoder_rates", "latent_dim", "decoder_dim")
            if getattr(self, name) is not None
        }
        if self.encoder_rates is not None:
            given["decoder_rates"] = tuple(reversed(self.encoder_rates))
        return dataclasses.replace(CODEC_PRESETS[self.model], watermark=None, **given)

    def crop_frames(self, config: CodecConfig) -> int:
        return max(1, round(self.crop_seconds * config.frame_rate))

    def check(self) -> None:
        if self.model not in CODEC_PRESETS:
            raise UsageError(f"model is {self.model!r}; wanted one of {', '.join(CODEC_PRESETS)}")
        if self.data is None:
            raise UsageError("--data is missing; wanted recordings: a folder, a manifest or tars")
        super().check()
        check_positive(crop_seconds=self.crop_seconds)
        rates = self.encoder_rates
        if rates is not None and not (rates and all(0 < rate < 1000 for rate in rates)):
            raise UsageError(f"encoder_rates is {rates}; wanted factors such as 4 5 6 8")
        for name, value in dataclasses.asdict(self.loss).items():
            if not 0 <= value < float("inf"):
                raise UsageError(f"loss.{name} is {value}; wanted 0 or more")
        if self.optimizer.grad_accum_steps != 1:
            raise UsageError("--grad_accum_steps is for EchoDiT only; use a smaller --batch_size")
        if self.freeze_encoder and self.init_from is None:
            raise UsageError("--freeze_encoder needs --init_from: an encoder that was trained")
        if self.freeze_encoder and self.optimizer.weight_decay:
            raise UsageError("--freeze_encoder needs --weight_decay 0, which moves every matrix")


CODEC_TRAIN_PRESETS: dict[str, CodecTrainConfig] = {
    name: CodecTrainConfig(model=name) for name in CODEC_PRESETS
}
