"""Sizes of both models as frozen data, the presets, and their JSON form.

Axis names, the same in every signature of the project:
`b` batch, `t` latent frame (25 a second), `s` text byte, `r` reference frame, `p` reference patch,
`h` head, `k` head width, `a` rotary pair, `d` model width, `e` encoder width, `n` layer,
`c` channel.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echo_eqx.errors import EchoError


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the text or the reference encoder."""

    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int


MAX_LENGTH = 2**16
"""Longest text or canvas of a model: attention over more fits no memory."""
MAX_SAMPLE_RATE = 768_000


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of an EchoDiT. Variants of the published models differ in nothing else."""

    model_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    text: EncoderConfig
    speaker: EncoderConfig
    latent_dim: int = 128
    patch_size: int = 4
    """Reference latents that are joined into one token."""
    vocab_size: int = 256
    time_embed_dim: int = 256
    adaln_rank: int = 256
    norm_eps: float = 1e-5
    speaker_proj_scale: float = 1.0
    """Factor behind the reference encoder's `in_proj`; Echo-TTS base was trained with 1/6."""
    blockwise: bool = False
    """Has a `latent_encoder`, so that it can go on from latents already generated."""
    max_frames: int = 768
    """Longest canvas seen in training, in latent frames."""
    max_text_bytes: int = 768
    max_speaker_frames: int = 512

    def __post_init__(self):
        widths = {
            "model": (self.model_dim, self.num_heads),
            "text": (self.text.dim, self.text.num_heads),
            "speaker": (self.speaker.dim, self.speaker.num_heads),
        }
        for name, (dim, heads) in widths.items():
            if heads < 1 or dim % heads or (dim // heads) % 2:
                raise EchoError(
                    f"{name} width {dim} does not split into {heads} heads of even width"
                )
        if self.num_heads % 2:
            raise EchoError(f"num_heads is {self.num_heads}; half of the heads turn, so it is even")
        for name in ("max_frames", "max_text_bytes", "max_speaker_frames"):
            if not 0 < getattr(self, name) <= MAX_LENGTH:
                raise EchoError(f"{name}: expected 1 to {MAX_LENGTH}, got {getattr(self, name)}")
        if self.time_embed_dim % 2:
            raise EchoError(f"time_embed_dim is {self.time_embed_dim}; it must be even")


@dataclass(frozen=True)
class WatermarkConfig:
    """Sizes of the codec's watermark path."""

    dim: int = 32
    """Narrowest width; it doubles with every stride."""
    strides: tuple[int, ...] = (8, 5, 4, 2)
    bottleneck_dim: int = 128
    num_bits: int = 16
    num_lstm_layers: int = 2

    @property
    def lstm_dim(self) -> int:
        return self.dim * 2 ** len(self.strides)


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of a DACVAE. Defaults are the published 48 kHz codec."""

    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (2, 8, 10, 12)
    hidden_dim: int = 1024
    """Width around the bottleneck (`latent_dim` in the published file)."""
    latent_dim: int = 128
    """Channels of a latent (`codebook_dim` in the published file)."""
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (12, 10, 8, 2)
    sample_rate: int = 48_000
    watermark: WatermarkConfig | None = WatermarkConfig()

    def __post_init__(self):
        if self.sample_rate > MAX_SAMPLE_RATE:
            raise EchoError(
                f"sample_rate: expected at most {MAX_SAMPLE_RATE}, got {self.sample_rate}"
            )
        hop = math.prod(self.encoder_rates)
        if hop != math.prod(self.decoder_rates):
            raise EchoError(
                f"encoder_rates {self.encoder_rates} and decoder_rates {self.decoder_rates} "
                "multiply to different hops"
            )
        if self.decoder_dim % 2 ** len(self.decoder_rates):
            raise EchoError(
                f"decoder_dim {self.decoder_dim} cannot be halved {len(self.decoder_rates)} times"
            )
        if self.watermark is not None and hop % math.prod(self.watermark.strides):
            raise EchoError(
                f"hop {hop} is not a multiple of the watermark's "
                f"{math.prod(self.watermark.strides)} samples"
            )

    @property
    def hop(self) -> int:
        """Samples in a latent frame."""
        return math.prod(self.encoder_rates)

    @property
    def frame_rate(self) -> float:
        """Latent frames a second."""
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
    """Names of the models for latents of so many channels."""
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


def to_json(config: DiTConfig | CodecConfig) -> dict[str, Any]:
    """Config as plain JSON values."""
    return dataclasses.asdict(config)


def dit_config_from_json(data: Any) -> DiTConfig:
    """Inverse of `to_json`; unknown, missing or wrongly typed fields raise `EchoError`."""
    _expect_object(data, "the config")
    text = _build(EncoderConfig, data.get("text", {}), "text.")
    speaker = _build(EncoderConfig, data.get("speaker", {}), "speaker.")
    return _build(DiTConfig, {**data, "text": text, "speaker": speaker}, "")


def codec_config_from_json(data: Any) -> CodecConfig:
    """Inverse of `to_json`; unknown, missing or wrongly typed fields raise `EchoError`."""
    _expect_object(data, "the config")
    watermark = data.get("watermark")
    if watermark is not None:
        watermark = _build(WatermarkConfig, watermark, "watermark.")
    return _build(CodecConfig, {**data, "watermark": watermark}, "")


def _build(cls: type, data: Any, where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    _expect_object(data, f"config field {where[:-1]}")
    if unknown := sorted(set(data) - set(fields)):
        raise EchoError(f"config has unknown field {where}{unknown[0][:50]}")
    values = {}
    for name, field in fields.items():
        if name not in data:
            if field.default is dataclasses.MISSING:
                raise EchoError(f"config lacks field {where}{name}")
            continue
        value = data[name]
        if field.type == tuple[int, ...]:
            value = tuple(value) if isinstance(value, list | tuple) else value
            good = isinstance(value, tuple) and 0 < len(value) <= 16 and all(map(_is_size, value))
        elif field.type is int:
            good = _is_size(value)
        elif field.type is float:
            # Compared, since an integer of many digits cannot be turned into a float.
            good = isinstance(value, int | float) and -1e9 < value < 1e9
        elif field.type is bool:
            good = isinstance(value, bool)
        else:
            good = True
        if not good:
            # Only plain values are printed: others may come from a file that means harm.
            plain = isinstance(value, bool | float | str)
            plain = plain or (isinstance(value, int) and abs(value) < 2**64)
            shown = repr(value)[:50] if plain else f"a {type(value).__name__}"
            raise EchoError(f"config field {where}{name} is {shown}; wanted {field.type}")
        values[name] = value
    return cls(**values)


def _expect_object(data: Any, name: str) -> None:
    if not isinstance(data, Mapping):
        raise EchoError(f"{name} is a {type(data).__name__}; wanted an object")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**24
