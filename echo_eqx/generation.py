"""Sampler settings, and what a checkpoint recommends for generation with it."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.json_data import from_json

Guidance = Literal["independent", "joint", "alternating"]
Length = Literal["full", "auto"]

REFERENCE_LUFS = -23.0
"""Integrated loudness of references (EBU R 128), unless the checkpoint gives another."""


@dataclass(frozen=True)
class Range:
    """Allowed values of a numeric field, both ends included; used as its annotation."""

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
    guidance_every: Annotated[int, Range(1, 10_000)] = 1
    """Compute the guidance at every n-th step only and reuse it at the steps in between, which then
    cost as little as steps without guidance."""
    apg_eta: Annotated[float, Range(-10, 10)] = 1.0
    """Adaptive projected guidance: weight of the guidance parallel to the velocity; 1 is off."""
    noise_scale: Annotated[float, Range(0, 10)] = 1.0
    """Scale of the initial noise; 0.8 to 0.9 gives a steadier voice."""
    start_t: Annotated[float | None, Range(1e-3, 1)] = None
    """First timestep. None for 1, or 0.999 with score rescaling, which needs t < 1."""
    sway: Annotated[float, Range(-1, 1.75)] = 0.0
    """Sway sampling: 0 spaces the timesteps evenly, -1 puts more of them near noise, where the
    outline of the speech is decided, and positive values more near the end."""
    rescale_k: Annotated[float, Range(1e-3, 100)] = 1.0
    """Temporal score rescaling: 1 is off, 1.2 is usual."""
    rescale_sigma: Annotated[float, Range(0, 100)] = 3.0
    """Temporal score rescaling: sigma, where larger values start at higher noise."""
    speaker_kv_scale: Annotated[float, Range(0, 100)] = 1.0
    """Scale of the reference's keys and values; 1.1 to 1.5 keeps closer to the voice."""
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

    Models carry it as `EchoDiT.generation` and `save` writes it; `synthesize` and the command
    `infer` take their defaults from it.
    """

    sampler: SamplerSettings = SamplerSettings()
    duration: float | None = None
    """Seconds to generate; None for 15, or the longest in training if that is shorter."""
    length: Length = "full"
    """`full`: generate `duration` for any text. `auto`: less for texts that need less."""
    frames_per_byte: float | None = None
    """Latent frames per byte of text that few recordings of the training data exceed, for `auto`.
    The bytes are those that the model reads, with the zero in front and the speaker tag."""
    expand_text: bool = False
    """Write out numbers, dates, money and abbreviations in English."""
    reference_lufs: float | None = REFERENCE_LUFS
    """Integrated loudness of the references in training, in LUFS; None if they were not changed."""
    padding: Literal["silence", "zeros"] = "silence"
    """What follows the speech in training: the codec's latents of silence, or zeros. It shows where
    generated speech ends."""
    codec: str | None = None
    """The codec of the latents, as for `load_codec`."""
    codec_silence: tuple[float, ...] | None = None
    """That codec's latent of silence; a codec with another one is not the same codec."""
    voices: tuple[KnownVoice, ...] = ()
    """The voices of the training data, if they are few; empty if the model takes any voice."""
    voice_whitening: tuple[tuple[float, ...], ...] = ()
    """(c, c) matrix that whitens the mean latents of recordings of one voice."""

    def check(self) -> None:
        """**Raises**: `EchoError` naming the first setting that is out of its range."""
        self.sampler.check()
        duration, lufs, codec = self.duration, self.reference_lufs, self.codec
        _expect(duration is None or 0 < duration < 1e6, "duration", "0 to 10^6 seconds", duration)
        _expect(self.length in get_args(Length), "length", "full or auto", self.length)
        pace = self.frames_per_byte
        _expect(pace is None or 1e-3 <= pace <= 1e3, "frames_per_byte", "0.001 to 1000", pace)
        _expect(lufs is None or -70 <= lufs <= 0, "reference_lufs", "-70 to 0", lufs)
        _expect(self.padding in ("silence", "zeros"), "padding", "silence or zeros", self.padding)
        named = codec is None or (0 < len(codec) < 4096 and codec.isprintable())
        _expect(named, "codec", "the name of a codec", codec)
        _expect(self.codec_silence != (), "codec_silence", "a number per channel", ())
        _expect(len(self.voices) <= 1000, "voices", "at most 1000", len(self.voices))
        for voice in self.voices:
            is_name = voice.name.isprintable() and len(voice.name) < 200
            _expect(is_name, "voices", "short printable names", voice.name)
            _expect(voice.radius > 0, f"radius of voice {voice.name}", "above 0", voice.radius)
        rows = self.voice_whitening
        lengths = {len(row) for row in (*rows, *(voice.mean for voice in self.voices))}
        expected = f"means and rows of {len(rows)} numbers"
        _expect(lengths in (set(), {len(rows)}), "voice_whitening", expected, sorted(lengths))
        both = bool(self.voices) == bool(rows)
        _expect(both, "voices, voice_whitening", "both or neither", "one of them")


ECHO_TTS_CHANNELS = 80
"""Latent channels of Echo-TTS base, by which its weights and fine-tuned ones are known."""
ECHO_TTS = GenerationConfig(
    sampler=SamplerSettings(
        steps=40, cfg_scale=3.0, speaker_scale=8.0, noise_scale=0.8, start_t=0.999
    ),
    duration=640 * 2048 / 44_100,
    reference_lufs=None,
    padding="zeros",
)
"""Echo-TTS base as its authors run it (github.com/jordandare/echo-tts, `inference.py`). It always
generates its 640 frames: a shorter target makes it speak only the beginning of a text."""


def generation_from_json(data: Any) -> GenerationConfig:
    """Inverse of `to_json`; fields left out have their defaults.

    **Raises**: `EchoError` naming the first field that is unknown, has the wrong type, or is out of
    range.
    """
    try:
        generation = from_json(GenerationConfig, data)
        generation.check()
    except EchoError as error:
        raise EchoError(f"generation settings: {error}") from None
    return generation


def _expect(good: bool, name: str, expected: str, got: Any) -> None:
    if not good:
        raise EchoError(f"{name}: expected {expected}, got {ascii(got)[:50]}")
