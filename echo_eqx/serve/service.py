"""What the endpoints share: the engine, the voices, the limits, and requests made into tasks."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio.to_thread
import numpy as np

from echo_eqx.data.audio import decode_audio
from echo_eqx.data.reference import MAX_SEARCH_SECONDS, read_reference
from echo_eqx.errors import EchoError
from echo_eqx.generation import Length, SamplerSettings
from echo_eqx.serve.engine import Engine
from echo_eqx.serve.errors import ApiError
from echo_eqx.serve.metrics import Metrics
from echo_eqx.serve.programs import Programs, Reference
from echo_eqx.serve.requests import Limits, SpeechRequest
from echo_eqx.serve.speech import Task
from echo_eqx.serve.voices import Voices
from echo_eqx.speech.chunks import (
    frames_for_text,
    split_first,
    split_into_chunks,
    target_seconds,
)
from echo_eqx.speech.make_voice import make_voice
from echo_eqx.speech.speaker import encode_speech, trim_to_patches
from echo_eqx.speech.voices import Voice, check_name, save_voice

T = TypeVar("T")
OPENAI_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
"""Names that clients have built in. They stand for the model there is."""


@dataclass(frozen=True)
class Service:
    programs: Programs
    engine: Engine
    voices: Voices
    metrics: Metrics
    limits: Limits
    defaults: SamplerSettings
    model: str
    """The name of the model."""
    duration: float | None = None
    """Seconds to generate for each chunk of text, unless a request says otherwise."""
    watermark: bool = False
    expand_text: bool = False
    length: Length = "full"
    first_seconds: float | None = None
    """Seconds that the first chunk of a streamed answer takes to speak at most, as for `stream`."""
    api_key: str | None = None
    allow_uploads: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model, *OPENAI_MODELS)

    async def plan(self, request: SpeechRequest) -> Task:
        """What to speak for a request.

        **Raises**: `ApiError` if it cannot be spoken.
        """
        texts, lengths, most = await anyio.to_thread.run_sync(self._split, request)
        voice = None
        try:
            if request.reference is not None:
                voice = await self._encode(request.reference)
            elif request.voice is not None:
                path = self.voices.resolve(request.voice)
                voice = await self._on_device(lambda: self.voices.reference(path))
        except EchoError as error:
            param = "speaker_ref" if request.reference is not None else "voice"
            raise ApiError(400, str(error), param=param, code="invalid_reference") from None
        return Task(
            texts=texts,
            lengths=lengths,
            voice=voice,
            seed=request.seed,
            settings=request.settings,
            most=most,
            trim=request.trim,
            message=self.message(request.seed),
        )

    def message(self, seed: int) -> list[int] | None:
        """Bits of the watermark, as `infer` draws them; None without one."""
        watermark = self.programs.codec.watermark
        if not self.watermark or watermark is None:
            return None
        return np.random.default_rng(seed).integers(0, 2, watermark.num_bits).tolist()

    def _split(self, request: SpeechRequest) -> tuple[list[str], list[int], int]:
        """Chunks of the text, frames to generate for each, and the most for any.

        A faster speech is asked for by fewer frames for the same text, a slower one by less text
        for the same frames.
        """
        dit, codec, speed = self.programs.dit, self.programs.codec, request.speed
        try:
            wanted = self.duration if request.duration is None else request.duration
            seconds = target_seconds(dit, codec, wanted)
            expand = self.expand_text if request.expand_text is None else request.expand_text
            slower = min(1.0, speed)
            texts = split_into_chunks(
                request.text, dit, seconds * slower, request.normalize_text, expand
            )
        except EchoError as error:
            param = "duration" if str(error).startswith("duration") else "input"
            raise ApiError(400, str(error), param=param) from None
        num_short = len(texts) if (request.length or self.length) == "auto" else 0
        if self.first_seconds is not None and request.is_streamed:
            texts[:1] = split_first(texts[0], dit, self.first_seconds * slower)
            num_short = max(num_short and len(texts), 1)
        full = round(seconds * codec.config.frame_rate)
        lengths = [full] * len(texts)
        lengths[:num_short] = [
            frames_for_text(text, dit, codec, full) for text in texts[:num_short]
        ]
        lengths = [max(1, min(full, round(frames / speed))) for frames in lengths]
        return texts, lengths, max(1, round(full / max(1.0, speed)))

    async def _encode(self, recording: bytes) -> Reference:
        """The voice of a recording that came with a request.

        **Raises**: `EchoError` if it cannot be used.
        """
        dit, codec = self.programs.dit, self.programs.codec
        rate, name = codec.config.sample_rate, "speaker_ref"
        seconds = self.programs.max_speaker_frames / codec.config.frame_rate
        await anyio.to_thread.run_sync(_check_length, recording, name)
        reference = await anyio.to_thread.run_sync(
            lambda: read_reference(recording, name, rate, seconds)
        )

        def encode() -> Reference:
            lufs = dit.generation.reference_lufs
            latents = encode_speech(codec, reference.speech, lufs)
            return self.programs.reference(trim_to_patches(latents, dit))

        return await self._on_device(encode)

    async def add_voice(self, name: str, file: str, recording: bytes, consent: str) -> Voice:
        """Make a voice of a recording, and keep it in the folder.

        **Raises**: `EchoError` if the name or the recording cannot be used.
        """
        dit, codec = self.programs.dit, self.programs.codec

        def make() -> Voice:
            _check_length(recording, "audio_sample")
            lufs = dit.generation.reference_lufs
            voice = make_voice(name, [(file, recording)], codec, consent=consent, lufs=lufs)
            save_voice(voice, self.voices.folder)
            return voice

        check_name(name)
        voice = await anyio.to_thread.run_sync(make)
        path = self.voices.resolve(name)
        await self._on_device(lambda: self.voices.reference(path))
        return voice

    async def _on_device(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self.engine.call(function))


def _check_length(recording: bytes, name: str) -> None:
    """**Raises**: `ApiError` for a recording that is too long."""
    longest = MAX_SEARCH_SECONDS
    try:
        decode_audio(recording, name, 8000, longest, longest + 1)
    except EchoError:  # it has no audio there, or another error that is told when it is read
        return
    raise ApiError(
        400,
        f"{name}: expected a recording of at most {longest:.0f} s, got a longer one",
        param=name,
        code="reference_too_long",
    )
