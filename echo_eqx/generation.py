"""How to speak with a model: sampler settings, and all else that its file recommends."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from echo_eqx.errors import EchoError, UsageError

Guidance = Literal["independent", "joint", "alternating"]

REFERENCE_LUFS = -23.0
"""Loudness a reference is brought to if the model's file names none: that of EBU R 128."""


@dataclass(frozen=True)
class SamplerSettings:
    """Everything about the way from noise to latents except the seed and the canvas."""

    steps: int = 32
    """Euler steps."""
    guidance: Guidance = "independent"
    """`independent`: text and reference each with its own branch and scale. `joint`: one branch
    without both, one scale (cfg_scale). `alternating`: text on even steps, reference on odd."""
    cfg_scale: float = 3.0
    """Scale of the text guidance, or of the joint guidance."""
    speaker_scale: float = 5.0
    """Scale of the reference guidance."""
    cfg_min_t: float = 0.5
    """Guide only at times from here ..."""
    cfg_max_t: float = 1.0
    """... to here."""
    apg_eta: float = 1.0
    """Adaptive projected guidance: share kept of the part that only lengthens the velocity."""
    noise_scale: float = 1.0
    """Factor on the initial noise; 0.8 to 0.9 makes the voice steadier."""
    start_t: float | None = None
    """First time; by default 1, or 0.999 with score rescaling, which needs t < 1."""
    rescale_k: float = 1.0
    """Temporal score rescaling: 1 is off, 1.2 is usual."""
    rescale_sigma: float = 3.0
    """Temporal score rescaling: below which noise level it sets in."""
    speaker_kv_scale: float = 1.0
    """Factor on the reference's keys and values, 1.1 to 1.5 to hold a voice ..."""
    speaker_kv_min_t: float = 0.9
    """... at times from here to 1 ..."""
    speaker_kv_layers: int | None = None
    """... in the first so many layers; all by default."""

    @property
    def first_time(self) -> float:
        """`start_t`, or what stands for None."""
        if self.start_t is not None:
            return self.start_t
        return 1.0 if self.rescale_k == 1 else 0.999

    def check(self) -> None:
        """Raises `UsageError` naming the first setting that is out of its range."""
        ranges: dict[str, tuple[float, float]] = {
            "steps": (1, 10_000),
            "cfg_scale": (0, 100),
            "speaker_scale": (0, 100),
            "cfg_min_t": (0, 1),
            "cfg_max_t": (0, 1),
            "apg_eta": (-10, 10),
            "noise_scale": (0, 10),
            "start_t": (1e-3, 1),
            "rescale_k": (1e-3, 100),
            "rescale_sigma": (0, 100),
            "speaker_kv_scale": (0, 100),
            "speaker_kv_min_t": (0, 1),
            "speaker_kv_layers": (0, 10_000),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} is {value}; wanted {low} to {high}")
        if self.guidance not in ("independent", "joint", "alternating"):
            raise UsageError(
                f"guidance is {self.guidance!r}; wanted independent, joint or alternating"
            )


@dataclass(frozen=True)
class KnownVoice:
    """A voice that a model was trained on."""

    name: str
    mean: tuple[float, ...]
    """Mean of the latents of its speech, a number for each channel."""
    radius: float
    """How far recordings of this voice stray from `mean`, at most, as `nearest_voice` measures."""


@dataclass(frozen=True)
class GenerationConfig:
    """What the file of a model says about how to speak with it.

    `EchoDiT.generation` holds it, `save` writes it, and `synthesize` and `infer.py` use it for
    whatever they are not told.
    """

    sampler: SamplerSettings = SamplerSettings()
    duration: float | None = None
    """Seconds of the canvas; None for 15, or the longest canvas of training if that is shorter."""
    expand_text: bool = False
    """Write out numbers, dates, money and abbreviations in English before speaking."""
    reference_lufs: float = REFERENCE_LUFS
    """Integrated loudness of the references it was trained with."""
    codec: str | None = None
    """The codec of its latents, as `load_codec` takes it."""
    codec_silence: tuple[float, ...] | None = None
    """The latent of silence by that codec, which tells it from others."""
    voices: tuple[KnownVoice, ...] = ()
    """All voices it knows, if they are few; empty if it takes any voice."""
    voice_whitening: tuple[tuple[float, ...], ...] = ()
    """(c, c): makes the means of recordings of one voice vary by 1 in every direction."""


def generation_to_json(config: GenerationConfig) -> dict[str, Any]:
    """`config` as plain JSON values."""
    return dataclasses.asdict(config)


def generation_from_json(data: Any) -> GenerationConfig:
    """Inverse of `generation_to_json`; what is left out has its default.

    **Raises**: `EchoError` naming the first field that is unknown, of the wrong type, or out of
    its range.
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
