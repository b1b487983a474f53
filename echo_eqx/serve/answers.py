"""Speech as the body of an HTTP answer: audio whole or in pieces, or server-sent events."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.to_thread
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from echo_eqx.serve.errors import ApiError
from echo_eqx.serve.formats import CONTENT_TYPES, Encoder, make_encoder
from echo_eqx.serve.requests import SpeechRequest
from echo_eqx.serve.service import Service
from echo_eqx.serve.speech import Audio, Done, Event, Failed, Progress, Speech, Task

SEND_SECONDS = 60.0
"""A client that reads nothing for so long has gone."""
PING_SECONDS = 10.0
"""Comments keep a stream of events open through proxies."""


class SpeechAnswer:
    """An ASGI application that answers one request. It stops to speak when the client is gone."""

    def __init__(self, service: Service, request: SpeechRequest, task: Task):
        self._service, self._request, self._task = service, request, task
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._arrived, self._status = time.monotonic(), 0
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            if isinstance(event, Audio):
                self._speech.unread += len(event.samples) / self._rate
            if isinstance(event, Progress) and not request.progress:
                return
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._speech = Speech(service.programs, task, emit)
        self._rate = service.programs.codec.config.sample_rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._service.engine.submit(self._speech)
        except ApiError as error:
            await _error(error)(scope, receive, send)
            return
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch, receive, group.cancel_scope)
                await self._answer(scope, receive, send)
                group.cancel_scope.cancel()
        finally:
            if not self._speech.is_over:
                self._service.metrics.add("cancelled_total")
            self._speech.cancel()

    async def _watch(self, receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._request
        try:
            encoder = make_encoder(request.format, self._rate, request.is_streamed)
        except ApiError as error:
            await _error(error)(scope, receive, send)
            return
        try:
            if request.is_sse:
                await self._send_events(encoder, send)
            elif request.is_streamed:
                await self._send_stream(encoder, scope, receive, send)
            else:
                await self._send_whole(encoder, scope, receive, send)
        except _GoneError:
            return  # without an end, which aborts the connection
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(encoder.close)

    async def _send_stream(
        self, encoder: Encoder, scope: Scope, receive: Receive, send: Send
    ) -> None:
        parts = self._encoded(encoder)
        try:
            first = await anext(parts)
        except ApiError as error:
            await _error(error)(scope, receive, send)
            return
        await self._start(send, CONTENT_TYPES[self._request.format])
        try:
            await self._send(send, first)
            async for part in parts:
                await self._send(send, part)
        except ApiError:
            self._service.metrics.add("failed_total")
            return
        await self._send(send, b"", more=False)

    async def _send_whole(
        self, encoder: Encoder, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            body = b"".join([part async for part in self._encoded(encoder)])
        except ApiError as error:
            await _error(error)(scope, receive, send)
            return
        await self._start(send, CONTENT_TYPES[self._request.format], len(body))
        await self._send(send, body, more=False)

    async def _send_events(self, encoder: Encoder, send: Send) -> None:
        await self._start(send, "text/event-stream; charset=utf-8")
        try:
            async for event in self._server_sent(encoder):
                await self._send(send, event)
        except ApiError as error:
            self._service.metrics.add("failed_total")
            await self._send(send, _event({"type": "error", **error.body}))
        await self._send(send, b"data: [DONE]\n\n", more=False)

    async def _server_sent(self, encoder: Encoder) -> AsyncIterator[bytes]:
        while True:
            try:
                event = await asyncio.wait_for(self._next(), PING_SECONDS)
            except TimeoutError:
                yield b": waiting\n\n"
                continue
            if isinstance(event, Progress):
                yield _event({"type": "speech.progress", "step": event.step, "total": event.total})
                continue
            data = await self._encode(encoder, event)
            if data:
                audio = base64.b64encode(data).decode()
                yield _event({"type": "speech.audio.delta", "audio": audio})
            if isinstance(event, Done):
                size = len(self._request.text.encode())
                usage = {"input_tokens": size, "output_tokens": event.frames}
                usage["total_tokens"] = size + event.frames
                yield _event({"type": "speech.audio.done", "usage": usage})
                return

    async def _encoded(self, encoder: Encoder) -> AsyncIterator[bytes]:
        """The bytes of the answer as they get ready."""
        while True:
            event = await self._next()
            if isinstance(event, Audio | Done):
                if data := await self._encode(encoder, event):
                    yield data
            if isinstance(event, Done):
                return

    async def _next(self) -> Event:
        """The next event; failures are raised."""
        event = await self._events.get()
        if isinstance(event, Failed):
            raise ApiError(500 if event.is_internal else 422, event.message, code="speech_failed")
        return event

    async def _encode(self, encoder: Encoder, event: Event) -> bytes:
        if isinstance(event, Done):
            return await anyio.to_thread.run_sync(encoder.finish)
        assert isinstance(event, Audio)
        seconds = len(event.samples) / self._rate
        self._service.metrics.add("audio_seconds_total", seconds)
        data = await anyio.to_thread.run_sync(encoder.encode, event.samples)
        if not self._status:
            self._service.metrics.add_first_byte(time.monotonic() - self._arrived)
        self._speech.unread -= seconds
        return data

    async def _start(self, send: Send, kind: str, length: int | None = None) -> None:
        headers = {"Content-Type": kind, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if length is not None:
            headers["Content-Length"] = str(length)
        if self._request.has_instructions:
            headers["Echo-Unused"] = "instructions"
        if self._task.voice is not None:  # less than was given, if that is longer than is compiled
            seconds = len(self._task.voice.latents) / self._service.programs.codec.config.frame_rate
            headers["Echo-Speaker-Seconds"] = f"{seconds:.2f}"
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self._status = 200
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        message: Message = {"type": "http.response.body", "body": body, "more_body": more}
        try:
            await asyncio.wait_for(send(message), SEND_SECONDS)
        except (TimeoutError, OSError):
            raise _GoneError from None


class _GoneError(Exception):
    """The client does not read the answer."""


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)
