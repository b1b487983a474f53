"""Configs of the models, and the presets.

Axis names, the same in every signature of the project:
`b` batch, `t` latent frame, `s` text byte, `r` reference frame, `p` reference patch,
`h` head, `k` head width, `a` rotary pair, `d` model width, `e` encoder width, `n` layer,
`c` channel.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from echo_eqx.errors import EchoError


class _Sizes:
    """Checks that every integer of a config is a plausible size; configs also come from files."""

    def __post_init__(self):
        for name, value in vars(self).items():
            sizes = value if isinstance(value, tuple) else (value,) if type(value) is int else (1,)
            if not (0 < len(sizes) <= 16 and all(0 < size < 2**24 for size in sizes)):
                raise EchoError(f"{name}: expected sizes from 1 to 2^24, got {str(value)[:100]}")


@dataclass(frozen=True)
class EncoderConfig(_Sizes):
    """Sizes of the text or the reference encoder."""

    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int


MAX_LENGTH = 2**16
"""Longest text or target of any model; attention over more would not fit in memory."""
MAX_SAMPLE_RATE = 768_000


@dataclass(frozen=True)
class DiTConfig(_Sizes):
    """Sizes of an EchoDiT; the published models differ in nothing else.

    **Raises**: `EchoError` naming a size that is out of range, or a width that the heads do not
    divide.
    """

    model_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    text: EncoderConfig
    speaker: EncoderConfig
    """Sizes of the reference encoder, and of the latent encoder of block-wise models."""
    latent_dim: int = 128
    """Channels of a latent frame."""
    patch_size: int = 4
    """Reference latents per token."""
    vocab_size: int = 256
    time_embed_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    adaln_rank: int = 256
    norm_eps: float = 1e-5
    speaker_proj_scale: float = 1.0
    """Scale of the output of the reference encoder's `in_proj`; 1/6 in Echo-TTS base."""
    blockwise: bool = False
    """Whether it has a `latent_encoder`, to continue from latents already generated."""
    max_frames: int = 768
    """Longest target seen in training, in latent frames."""
    max_text_bytes: int = 768
    """Longest text seen in training, in bytes with the leading 0."""
    max_speaker_frames: int = 512
    """Longest reference seen in training, in latent frames."""

    def __post_init__(self):
        super().__post_init__()
        widths = {
            "model": (self.model_dim, self.num_heads),
            "text": (self.text.dim, self.text.num_heads),
            "speaker": (self.speaker.dim, self.speaker.num_heads),
        }
        for name, (dim, heads) in widths.items():
            if heads < 1 or dim % heads or (dim // heads) % 2:
                raise EchoError(
                    f"{name}: expected a width divisible into heads of even width, got width "
                    f"{dim} and {heads} heads"
                )
        if self.num_heads % 2:
            raise EchoError(
                f"num_heads: expected an even number (RoPE is applied to half of the heads), got "
                f"{self.num_heads}"
            )
        for name in ("max_frames", "max_text_bytes", "max_speaker_frames"):
            if not 0 < getattr(self, name) <= MAX_LENGTH:
                raise EchoError(f"{name}: expected 1 to {MAX_LENGTH}, got {getattr(self, name)}")
        if self.time_embed_dim % 2:
            raise EchoError(f"time_embed_dim: expected an even number, got {self.time_embed_dim}")


def check_rates(
    sample_rate: int, encoder_rates: tuple[int, ...], decoder_rates: tuple[int, ...], width: int
) -> None:
    """**Raises**: `EchoError` unless a codec can have these rates and this width of its decoder."""
    if sample_rate > MAX_SAMPLE_RATE:
        raise EchoError(f"sample_rate: expected at most {MAX_SAMPLE_RATE}, got {sample_rate}")
    if math.prod(encoder_rates) != math.prod(decoder_rates):
        raise EchoError(
            "expected encoder_rates and decoder_rates with the same product, got "
            f"{encoder_rates} and {decoder_rates}"
        )
    if width % 2 ** len(decoder_rates):
        raise EchoError(
            f"decoder_dim: expected a multiple of {2 ** len(decoder_rates)}, got {width}"
        )


@dataclass(frozen=True)
class WatermarkConfig(_Sizes):
    """Sizes of the codec's watermark path."""

    dim: int = 32
    """Smallest width; it doubles with every stride."""
    strides: tuple[int, ...] = (8, 5, 4, 2)
    bottleneck_dim: int = 128
    num_bits: int = 16
    num_lstm_layers: int = 2

    @property
    def lstm_dim(self) -> int:
        return self.dim * 2 ** len(self.strides)


@dataclass(frozen=True)
class CodecConfig(_Sizes):
    """Sizes of a DACVAE. Defaults are the published 48 kHz codec.

    **Raises**: `EchoError` naming a size that is out of range, or sizes that do not fit together.
    """

    encoder_dim: int = 64
    """Channels at the sample rate; each downsampling doubles them."""
    encoder_rates: tuple[int, ...] = (2, 8, 10, 12)
    """Downsampling factors, from samples to latents."""
    hidden_dim: int = 1024
    """Width around the bottleneck (`latent_dim` in the published file)."""
    latent_dim: int = 128
    """Channels of a latent (`codebook_dim` in the published file)."""
    decoder_dim: int = 1536
    """Channels at the rate of latents; each upsampling halves them."""
    decoder_rates: tuple[int, ...] = (12, 10, 8, 2)
    """Upsampling factors, from latents to samples."""
    sample_rate: int = 48_000
    """In Hz."""
    watermark: WatermarkConfig | None = WatermarkConfig()
    """None for a codec that cannot embed watermarks."""

    def __post_init__(self):
        super().__post_init__()
        check_rates(self.sample_rate, self.encoder_rates, self.decoder_rates, self.decoder_dim)
        hop = math.prod(self.encoder_rates)
        if self.watermark is not None and hop % math.prod(self.watermark.strides):
            raise EchoError(
                f"expected a hop divisible by the watermark's {math.prod(self.watermark.strides)} "
                f"samples, got {hop}"
            )

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.encoder_rates)

    @property
    def frame_rate(self) -> float:
        """Latent frames per second."""
        return self.sample_rate / self.hop


@dataclass(frozen=True)
class FishConfig(_Sizes):
    """Sizes of Fish S1-DAC, followed by the principal components that Echo-TTS base generates.

    Defaults are the published ones (github.com/fishaudio/fish-speech, `fish_speech/models/dac`;
    github.com/jordandare/echo-tts, `autoencoder.py`).
    """

    type: Literal["fish_s1_dac"] = "fish_s1_dac"
    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    encoder_layers: int = 4
    """Layers of the transformer behind the encoder's last downsampling."""
    encoder_mlp_dim: int = 3072
    head_dim: int = 64
    """Width of an attention head, in all transformers."""
    hidden_dim: int = 1024
    """Width of quantized frames, and of the transformers before and after the quantizers."""
    quantizer_rates: tuple[int, ...] = (2, 2)
    """Further downsampling before the quantizers, which is undone after them."""
    quantizer_layers: int = 8
    """Layers of each of the transformers before and after the quantizers."""
    quantizer_mlp_dim: int = 3072
    semantic_codebook_size: int = 4096
    num_codebooks: int = 9
    """Residual codebooks, after the semantic one."""
    codebook_size: int = 1024
    codebook_dim: int = 8
    latent_dim: int = 80
    """Channels of a latent: principal components of the quantized frames."""
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    sample_rate: int = 44_100

    def __post_init__(self):
        super().__post_init__()
        check_rates(self.sample_rate, self.encoder_rates, self.decoder_rates, self.decoder_dim)
        for width in (self.encoder_dim * 2 ** len(self.encoder_rates), self.hidden_dim):
            if self.head_dim % 2 or width % self.head_dim:
                raise EchoError(
                    f"head_dim: expected an even width that divides {width}, got {self.head_dim}"
                )

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.encoder_rates) * math.prod(self.quantizer_rates)

    @property
    def frame_rate(self) -> float:
        """Latent frames per second."""
        return self.sample_rate / self.hop


DIT_PRESETS: dict[str, DiTConfig] = {
    "1.3B": DiTConfig(
        model_dim=1536,
        num_layers=24,
        num_heads=12,
        mlp_dim=4224,
        text=EncoderConfig(1024, 10, 8, 2816),
        speaker=EncoderConfig(1024, 10, 8, 2816),
    ),
    "840M": DiTConfig(
        model_dim=1280,
        num_layers=24,
        num_heads=10,
        mlp_dim=3520,
        text=EncoderConfig(768, 8, 6, 2048),
        speaker=EncoderConfig(768, 8, 6, 2048),
    ),
    # Echo-TTS base, for the latents of another codec.
    "2.4B": DiTConfig(
        model_dim=2048,
        num_layers=24,
        num_heads=16,
        mlp_dim=5888,
        text=EncoderConfig(1280, 14, 10, 3328),
        speaker=EncoderConfig(1280, 14, 10, 3328),
        latent_dim=80,
        time_embed_dim=512,
        speaker_proj_scale=1 / 6,
        blockwise=True,
        max_frames=640,
        max_speaker_frames=6400,
    ),
    "tiny": DiTConfig(
        model_dim=192,
        num_layers=6,
        num_heads=4,
        mlp_dim=512,
        text=EncoderConfig(160, 3, 4, 448),
        speaker=EncoderConfig(96, 2, 4, 256),
        time_embed_dim=64,
        adaln_rank=32,
    ),
}
# A small voice over the latents of the codec "24khz".
DIT_PRESETS["voice"] = dataclasses.replace(
    DIT_PRESETS["tiny"], latent_dim=32, max_frames=80, max_text_bytes=64, max_speaker_frames=48
)


def presets_of_width(latent_dim: int | None) -> list[str]:
    """Names of the presets for latents with this many channels."""
    return [name for name, config in DIT_PRESETS.items() if config.latent_dim == latent_dim]


CODEC_PRESETS: dict[str, CodecConfig] = {
    "48khz": CodecConfig(),
    "tiny": CodecConfig(
        encoder_dim=8,
        hidden_dim=64,
        decoder_dim=96,
        watermark=WatermarkConfig(dim=4, bottleneck_dim=16),
    ),
    # Small enough to train on a laptop, and without a watermark.
    "24khz": CodecConfig(
        encoder_dim=16,
        encoder_rates=(4, 5, 6, 8),
        hidden_dim=256,
        latent_dim=32,
        decoder_dim=256,
        decoder_rates=(8, 6, 5, 4),
        sample_rate=24_000,
        watermark=None,
    ),
}


CONFIGS: dict[str, type[DiTConfig] | type[CodecConfig]] = {"dit": DiTConfig, "codec": CodecConfig}
"""Config classes by the kind of model, as named in a weights file."""
