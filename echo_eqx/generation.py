"""Sampler settings, and what a checkpoint recommends for generation with it."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from echo_eqx.errors import EchoError, UsageError

Guidance = Literal["independent", "joint", "alternating"]

REFERENCE_LUFS = -23.0
"""Integrated loudness of references unless the checkpoint names another: that of EBU R 128."""


@dataclass(frozen=True)
class Range:
    """The values allowed for a number, both ends included; an annotation of fields."""

    low: int | float
    high: int | float


@dataclass(frozen=True)
class SamplerSettings:
    """All settings of the sampler except the seed and the length."""

    steps: Annotated[int, Range(1, 10_000)] = 32
    """Euler steps."""
    guidance: Guidance = "independent"
    """`independent`: separate branches and scales for text and reference. `joint`: one branch that
    drops both, with cfg_scale. `alternating`: text on even steps, reference on odd ones."""
    cfg_scale: Annotated[float, Range(0, 100)] = 3.0
    """Classifier-free guidance scale of the text, or of both with joint guidance."""
    speaker_scale: Annotated[float, Range(0, 100)] = 5.0
    """Classifier-free guidance scale of the reference."""
    cfg_min_t: Annotated[float, Range(0, 1)] = 0.5
    """Lowest timestep with guidance."""
    cfg_max_t: Annotated[float, Range(0, 1)] = 1.0
    """Highest timestep with guidance."""
    apg_eta: Annotated[float, Range(-10, 10)] = 1.0
    """Adaptive projected guidance: weight of the guidance parallel to the velocity; 1 is off."""
    noise_scale: Annotated[float, Range(0, 10)] = 1.0
    """Scale of the initial noise; 0.8 to 0.9 gives a steadier voice."""
    start_t: Annotated[float | None, Range(1e-3, 1)] = None
    """First timestep. None for 1, or 0.999 with score rescaling, which needs t < 1."""
    rescale_k: Annotated[float, Range(1e-3, 100)] = 1.0
    """Temporal score rescaling: 1 is off, 1.2 is usual."""
    rescale_sigma: Annotated[float, Range(0, 100)] = 3.0
    """Temporal score rescaling: sigma, where larger values start at higher noise."""
    speaker_kv_scale: Annotated[float, Range(0, 100)] = 1.0
    """Scale of the reference's keys and values; 1.1 to 1.5 holds a voice better."""
    speaker_kv_min_t: Annotated[float, Range(0, 1)] = 0.9
    """Lowest timestep with speaker_kv_scale."""
    speaker_kv_layers: Annotated[int | None, Range(0, 10_000)] = None
    """Number of layers, from the first, with speaker_kv_scale. None for all."""

    @property
    def first_time(self) -> float:
        """`start_t` with None replaced."""
        if self.start_t is not None:
            return self.start_t
        return 1.0 if self.rescale_k == 1 else 0.999

    def check(self) -> None:
        """**Raises**: `UsageError` naming the first setting that is out of range."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for allowed in getattr(hint, "__metadata__", ()):
                if isinstance(allowed, Range) and value is not None:
                    if not allowed.low <= value <= allowed.high:
                        raise UsageError(
                            f"{name}: expected {allowed.low} to {allowed.high}, got {value}"
                        )
        if self.guidance not in get_args(Guidance):
            raise UsageError(
                f"guidance: expected {', '.join(get_args(Guidance))}, got {self.guidance!r}"
            )


@dataclass(frozen=True)
class KnownVoice:
    """A voice in the training data of a model."""

    name: str
    mean: tuple[float, ...]
    """Mean of the latents of its speech, one number per channel."""
    radius: float
    """Largest distance of its own recordings from `mean`, as measured by `nearest_voice`."""


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint recommends for generation.

    It is `EchoDiT.generation`, `save` writes it, and `synthesize` and the command `infer` take
    their defaults from it.
    """

    sampler: SamplerSettings = SamplerSettings()
    duration: float | None = None
    """Seconds to generate; None for 15, or the longest in training if that is shorter."""
    expand_text: bool = False
    """Write out numbers, dates, money and abbreviations in English."""
    reference_lufs: float = REFERENCE_LUFS
    """Integrated loudness of the references in training."""
    codec: str | None = None
    """The codec of the latents, as for `load_codec`."""
    codec_silence: tuple[float, ...] | None = None
    """The latent of silence by that codec, by which another codec is recognized."""
    voices: tuple[KnownVoice, ...] = ()
    """The voices of the training data, if they are few; empty if the model takes any voice."""
    voice_whitening: tuple[tuple[float, ...], ...] = ()
    """(c, c) matrix that whitens the mean latents of recordings of one voice."""


def generation_to_json(config: GenerationConfig) -> dict[str, Any]:
    """`config` as JSON values."""
    return dataclasses.asdict(config)


def generation_from_json(data: Any) -> GenerationConfig:
    """Inverse of `generation_to_json`; missing fields have their defaults.

    **Raises**: `EchoError` naming the first field that is unknown, has the wrong type, or is out of
    range.
    """
    values = _fields(data, GenerationConfig, "generation")
    if "sampler" in values:
        values["sampler"] = _sampler(values["sampler"])
    if values.get("duration") is not None:
        duration = values["duration"]
        _expect(_is_number(duration) and 0 < duration < 1e6, "duration", "a number of seconds")
        values["duration"] = float(duration)
    if "reference_lufs" in values:
        lufs = values["reference_lufs"]
        _expect(_is_number(lufs) and -70 <= lufs <= 0, "reference_lufs", "a number from -70 to 0")
        values["reference_lufs"] = float(lufs)
    if "expand_text" in values:
        _expect(isinstance(values["expand_text"], bool), "expand_text", "true or false")
    codec, silence = values.get("codec"), values.get("codec_silence")
    good = codec is None or (isinstance(codec, str) and 0 < len(codec) < 4096)
    _expect(good and (codec is None or codec.isprintable()), "codec", "the name of a codec")
    if silence is not None:
        values["codec_silence"] = _numbers(silence, "codec_silence")
    voices = values.get("voices", ())
    _expect(isinstance(voices, list | tuple) and len(voices) <= 1000, "voices", "a list")
    values["voices"] = tuple(_voice(voice) for voice in voices)
    rows = values.get("voice_whitening", ())
    _expect(isinstance(rows, list | tuple), "voice_whitening", "a matrix")
    values["voice_whitening"] = tuple(_numbers(row, "voice_whitening") for row in rows)
    lengths = {len(row) for row in values["voice_whitening"]}
    lengths |= {len(voice.mean) for voice in values["voices"]} | ({len(rows)} if rows else set())
    _expect(len(lengths) <= 1, "voices and voice_whitening", "as many numbers in all")
    _expect(bool(values["voices"]) == bool(rows), "voices", "voice_whitening with them")
    return GenerationConfig(**values)


def _sampler(data: Any) -> SamplerSettings:
    values = _fields(data, SamplerSettings, "sampler")
    for name, value in values.items():
        default = getattr(SamplerSettings(), name)
        if isinstance(default, str):
            _expect(isinstance(value, str) and value in get_args(Guidance), name, "a known kind")
        elif value is None:
            _expect(default is None, name, "a number")
        elif name in ("steps", "speaker_kv_layers"):
            _expect(_is_number(value) and isinstance(value, int), name, "a whole number")
        else:
            _expect(_is_number(value), name, "a number")
            values[name] = float(value)
    sampler = SamplerSettings(**values)
    try:
        sampler.check()
    except UsageError as error:
        raise EchoError(f"generation settings: {error}") from None
    return sampler


def _voice(data: Any) -> KnownVoice:
    values = _fields(data, KnownVoice, "voices")
    _expect(set(values) == {"name", "mean", "radius"}, "voices", "name, mean and radius of each")
    name, radius = values["name"], values["radius"]
    _expect(isinstance(name, str) and name.isprintable() and len(name) < 200, "name", "a name")
    _expect(_is_number(radius) and radius > 0, "radius", "a positive number")
    return KnownVoice(name, _numbers(values["mean"], "mean"), float(radius))


def _fields(data: Any, kind: type, where: str) -> dict[str, Any]:
    _expect(isinstance(data, Mapping), where, "an object")
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - known)
    _expect(not unknown, f"{where}.{str(unknown[:1])[:50]}", f"one of {', '.join(sorted(known))}")
    return dict(data)


def _numbers(data: Any, name: str) -> tuple[float, ...]:
    good = isinstance(data, list | tuple) and 0 < len(data) <= 2**16 and all(map(_is_number, data))
    _expect(good, name, "a list of numbers")
    return tuple(map(float, data))


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 2**53 and math.isfinite(value)


def _expect(good: bool, name: str, expected: str) -> None:
    if not good:
        raise EchoError(f"generation settings: {name}: expected {expected}")
