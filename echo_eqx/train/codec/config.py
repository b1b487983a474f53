"""Settings for training a codec."""

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
    """Weights of the loss terms."""

    mel: float = 1.0
    """L1 distance of log mel spectra, summed over five resolutions."""
    stft: float = 0.3
    """L1 distance of log magnitude spectra, summed over the same resolutions."""
    periodicity: float = 0.0
    """Distance of normalized autocorrelations at the lags of vocal pitch. Use it if the decoder
    produces harmonics of its own upsampling rates instead of the voice's; 5 is a large weight."""
    waveform: float = 10.0
    """L1 distance of the samples."""
    kl: float = 0.01
    """KL divergence from the standard normal, in nats per channel and frame: keeps latents small
    and smooth, so that a model can learn them."""
    adversarial: float = 0.0
    """Above 0, also train discriminators, for a sharper sound: 1 as published. Best done in a
    second run that starts from the weights of one without (--init_from)."""
    feature_matching: float = 2.0
    """Only with discriminators: L1 distance of their hidden features."""


@dataclass(frozen=True)
class CodecTrainConfig(RunConfig):
    model: str = "24khz"
    """Preset of the sizes: 24khz, 48khz, tiny. The watermark is not trained: without --init_from
    there is none."""
    data: str | None = None
    """Recordings, as for prepare: a folder, a manifest, tars, Parquet. They need no
    transcripts."""
    run_dir: Path = Path("runs/codec")
    """Where the run writes its files. Repeat the command to resume the run."""
    num_steps: int = 400_000
    batch_size: int = 8
    """Crops per batch, over all devices."""
    checkpoint_every: int = 500
    keep_every: int = 0
    """Also keep checkpoints at multiples of this many steps; 0 keeps only the newest."""
    init_from: str | None = None
    """Start from these weights, with their sizes: anything that infer takes as --codec."""
    crop_seconds: float = 0.4
    """Length of a crop, rounded to whole latent frames."""
    sample_rate: int | None = None
    """Sample rate of the audio in Hz; by default the preset's."""
    encoder_dim: int | None = None
    """Channels at the sample rate; each downsampling doubles them. By default the preset's."""
    encoder_rates: tuple[int, ...] | None = None
    """Downsampling factors from samples to latents; the decoder upsamples by them in reverse."""
    latent_dim: int | None = None
    """Channels of a latent frame; by default the preset's."""
    decoder_dim: int | None = None
    """Channels at the rate of latents; each upsampling halves them. By default the preset's."""
    augment: bool = False
    """Vary each crop: up to a quarter faster or slower, with the pitch, and up to 30 dB quieter;
    some with another tone, echoes of a room, or noise. Use it if the recordings are alike, such as
    synthetic speech, and others should be coded well too."""
    freeze_encoder: bool = False
    """Train the decoder only, so that existing latents stay valid."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=7e-4, weight_decay=0.0, max_grad_norm=0.5
        )
    )
    loss: CodecLossConfig = field(default_factory=CodecLossConfig)

    def codec_config(self) -> CodecConfig:
        """Sizes of a codec that is trained from scratch."""
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
            raise UsageError(
                f"model: expected one of {', '.join(CODEC_PRESETS)}, got {self.model!r}"
            )
        if self.data is None:
            raise UsageError("--data is missing; expected recordings: a folder, a manifest or tars")
        super().check()
        check_positive(crop_seconds=self.crop_seconds)
        rates = self.encoder_rates
        if rates is not None and not (rates and all(0 < rate < 1000 for rate in rates)):
            raise UsageError(f"encoder_rates: expected factors such as 4 5 6 8, got {rates}")
        for name, value in dataclasses.asdict(self.loss).items():
            if not 0 <= value < float("inf"):
                raise UsageError(f"loss.{name}: expected 0 or more, got {value}")
        if self.optimizer.grad_accum_steps != 1:
            raise UsageError("--grad_accum_steps is for EchoDiT only; use a smaller --batch_size")
        if self.freeze_encoder and self.init_from is None:
            raise UsageError("--freeze_encoder needs the trained encoder of --init_from")
        if self.freeze_encoder and self.optimizer.weight_decay:
            raise UsageError(
                "--freeze_encoder needs --weight_decay 0; otherwise the encoder's weights decay"
            )


CODEC_TRAIN_PRESETS: dict[str, CodecTrainConfig] = {
    name: CodecTrainConfig(model=name) for name in CODEC_PRESETS
}
