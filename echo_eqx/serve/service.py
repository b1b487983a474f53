"""What the endpoints share: the engine, the voices, the limits, and requests made into tasks."""

import asyncio
from dataclasses import dataclass

import anyio.to_thread
import numpy as np

from echo_eqx.data.audio import decode_audio
from echo_eqx.errors import EchoError
from echo_eqx.generation import SamplerSettings
from echo_eqx.serve.engine import Engine
from echo_eqx.serve.errors import ApiError
from echo_eqx.serve.metrics import Metrics
from echo_eqx.serve.programs import Programs
from echo_eqx.serve.requests import Limits, SpeechRequest
from echo_eqx.serve.speech import Task
from echo_eqx.serve.voices import Voices
from echo_eqx.speech.chunks import split_into_chunks, target_seconds
from echo_eqx.speech.speaker import speaker_latents

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
    api_key: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model, *OPENAI_MODELS)

    async def plan(self, request: SpeechRequest) -> Task:
        """What to speak for a request.

        **Raises**: `ApiError` if it cannot be spoken.
        """
        texts, frames = await anyio.to_thread.run_sync(self._split, request)
        voice = None
        if request.reference is not None:
            voice = await self._encode(request.reference)
        elif request.voice is not None:
            name = self.voices.resolve(request.voice)
            voice = await asyncio.wrap_future(self.engine.call(lambda: self.voices.latents(name)))
        return Task(
            texts=texts,
            voice=voice,
            seed=request.seed,
            settings=request.settings,
            frames=frames,
            trim=request.trim,
            message=self.message(request.seed),
        )

    def message(self, seed: int) -> list[int] | None:
        """Bits of the watermark, as `infer` draws them; None without one."""
        watermark = self.programs.codec.watermark
        if not self.watermark or watermark is None:
            return None
        return np.random.default_rng(seed).integers(0, 2, watermark.num_bits).tolist()

    def _split(self, request: SpeechRequest) -> tuple[list[str], int]:
        """Chunks of the text, and frames to generate for each.

        A faster speech is asked for by fewer frames for the same text, a slower one by less text
        for the same frames.
        """
        dit, codec, speed = self.programs.dit, self.programs.codec, request.speed
        try:
            wanted = self.duration if request.duration is None else request.duration
            seconds = target_seconds(dit, codec, wanted)
            expand = self.expand_text if request.expand_text is None else request.expand_text
            texts = split_into_chunks(
                request.text, dit, seconds * min(1.0, speed), request.normalize_text, expand
            )
        except EchoError as error:
            param = "duration" if str(error).startswith("duration") else "input"
            raise ApiError(400, str(error), param=param) from None
        frames = max(1, round(seconds / max(1.0, speed) * codec.config.frame_rate))
        return texts, min(frames, self.programs.max_frames)

    async def _encode(self, recording: bytes) -> np.ndarray:
        """Latents of a reference that came with a request."""
        dit, codec = self.programs.dit, self.programs.codec
        rate = codec.config.sample_rate
        longest = self.programs.max_speaker_frames / codec.config.frame_rate
        try:
            audio = await anyio.to_thread.run_sync(
                lambda: decode_audio(recording, "speaker_ref", rate, 0.0, longest + 30)
            )
            return await asyncio.wrap_future(
                self.engine.call(lambda: speaker_latents(dit, codec, audio, max_seconds=longest))
            )
        except EchoError as error:
            message = str(error).replace("the reference", "speaker_ref")
            raise ApiError(400, message, param="speaker_ref", code="invalid_reference") from None
