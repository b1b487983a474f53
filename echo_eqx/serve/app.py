"""The endpoints."""

import asyncio
import dataclasses
import hmac
from pathlib import Path
from urllib.parse import urlsplit

import anyio.to_thread
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echo_eqx.errors import EchoError
from echo_eqx.serve.answers import SpeechAnswer
from echo_eqx.serve.errors import ApiError, error_body
from echo_eqx.serve.requests import parse_speech, settings_table
from echo_eqx.serve.service import Service

PAGE = Path(__file__).parent / "page"
_PAGE_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    # Scripts, styles and requests are of this server only; sounds are made in the page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; media-src blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_OPEN = ("/", "/health", "/v1/audio/models", "/v1/audio/voices")
"""Paths that need no key to GET, because clients send none."""
BODY_SECONDS = 60.0


def make_app(service: Service) -> Starlette:
    """The ASGI application."""
    endpoints = _Endpoints(service)
    routes = [
        Route("/", endpoints.page, methods=["GET"]),
        Route("/page/{name}", endpoints.page, methods=["GET"]),
        Route("/health", endpoints.health, methods=["GET"]),
        Route("/metrics", endpoints.metrics, methods=["GET"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
        Route("/v1/settings", endpoints.settings, methods=["GET"]),
        Route("/v1/audio/models", endpoints.audio_models, methods=["GET"]),
        Route("/v1/audio/voices", endpoints.voices, methods=["GET"]),
        Route("/v1/audio/voices", endpoints.add_voice, methods=["POST"]),
        Route("/v1/audio/voices/{name}", endpoints.remove_voice, methods=["DELETE"]),
        Route("/v1/audio/speech", endpoints.speech, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=["*"],
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["*"],
            ),
            Middleware(_Access, service=service),
        ],
        exception_handlers={ApiError: _on_error, HTTPException: _on_http_error},
    )


class _Access:
    """Checks the key, and counts answers."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {route.path for route in scope["app"].routes}
                path = scope["path"] if scope["path"] in known else "other"
                labels = f'{{path="{path}",status="{message["status"]}"}}'
                self._service.metrics.add("requests_total", labels=labels)
            await send(message)

        if self._is_allowed(scope):
            await self._app(scope, receive, counted)
            return
        error = ApiError(
            401,
            "expected the header Authorization: Bearer KEY with the server's key",
            code="invalid_api_key",
        )
        response = JSONResponse(error.body, error.status, headers=error.headers)
        await response(scope, receive, counted)

    def _is_allowed(self, scope: Scope) -> bool:
        key = self._service.api_key
        if key is None or scope["method"] == "OPTIONS":
            return True
        is_read = scope["method"] in ("GET", "HEAD")
        if is_read and (scope["path"] in _OPEN or scope["path"].startswith("/page/")):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        is_bearer = scheme.lower() == b"bearer"
        return is_bearer and hmac.compare_digest(token.strip(), key.encode())


class _Endpoints:
    def __init__(self, service: Service):
        self._service = service

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        path = PAGE / name
        # Names are those of files in the folder; a request's name is never joined to a path.
        files = {file.name for file in PAGE.glob("*.*")}
        if name not in files:
            raise ApiError(404, "not found")
        kind = _PAGE_KINDS.get(path.suffix, "application/octet-stream")
        return FileResponse(path, media_type=kind, headers=_PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        is_alive = self._service.engine.is_alive
        status = {"status": "ok" if is_alive else "stopped"}
        return JSONResponse(status, 200 if is_alive else 503)

    async def metrics(self, request: Request) -> Response:
        engine = self._service.engine
        gauges: dict[str, float] = {"requests_in_progress": engine.num_requests}
        gauges |= {"rows": engine.num_rows, "steps": engine.num_steps}
        text = self._service.metrics.text(gauges)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        data = [_model(name) for name in self._service.models]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._service.models:
            known = ", ".join(self._service.models)
            message = f"model: expected one of {known}, got {ascii(name)[:60]}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(_model(name))

    async def settings(self, request: Request) -> Response:
        service = self._service
        settings = settings_table(service.defaults, service.limits)
        about = {"settings": settings, "limits": dataclasses.asdict(service.limits)}
        return JSONResponse(about | {"allow_uploads": service.allow_uploads})

    async def audio_models(self, request: Request) -> Response:
        return JSONResponse({"models": [{"id": name} for name in self._service.models]})

    async def voices(self, request: Request) -> Response:
        voices = self._service.voices
        names, own = voices.all_names, set(voices.names)
        listed = [
            {"id": name, "name": name} | ({} if name in own else {"alias": True}) for name in names
        ]
        return JSONResponse({"voices": listed})

    async def add_voice(self, request: Request) -> Response:
        service = self._service
        self._check_uploads(request)
        body = await _read_body(request, service.limits.max_body_bytes)

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            form = await Request(request.scope, replay).form(max_files=1, max_fields=10)
        except HTTPException as error:
            raise ApiError(400, f"expected multipart/form-data: {error.detail}") from None
        name, sample = form.get("name"), form.get("audio_sample")
        consent = form.get("consent") or "not stated, sent to POST /v1/audio/voices"
        if not isinstance(name, str) or not isinstance(consent, str):
            raise ApiError(400, "name: expected the name of the voice", param="name")
        if not isinstance(sample, UploadFile):
            message = "audio_sample: expected a recording as a file"
            raise ApiError(400, message, param="audio_sample")
        recording = await sample.read()
        if len(recording) > service.limits.max_speaker_bytes:
            message = f"audio_sample: expected at most {service.limits.max_speaker_bytes} bytes"
            code = "reference_too_large"
            raise ApiError(413, message, param="audio_sample", code=code)
        try:
            file = sample.filename or "audio_sample"
            voice = await service.add_voice(name, file, recording, consent)
        except EchoError as error:
            param = "name" if "exists already" in str(error) or "name" in str(error) else None
            message = str(error).replace("--overwrite", "DELETE first")
            raise ApiError(400, message, param=param or "audio_sample") from None
        about = {"seconds": voice.seconds, "warnings": list(voice.info.warnings)}
        return JSONResponse({"id": name, "object": "audio.voice", "name": name, **about})

    async def remove_voice(self, request: Request) -> Response:
        self._check_uploads(request)
        name = request.path_params["name"]
        await anyio.to_thread.run_sync(self._service.voices.remove, name)
        return JSONResponse({"id": name, "object": "audio.voice.deleted", "deleted": True})

    def _check_uploads(self, request: Request) -> None:
        """**Raises**: `ApiError` unless voices may be added and removed, and not by a page of
        another site that somebody on this machine visits."""
        if not self._service.allow_uploads:
            message = "this server keeps no voices; it must be started with --allow_uploads"
            raise ApiError(403, message, code="uploads_not_allowed")
        origin = request.headers.get("origin")
        is_own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
        if self._service.api_key is None and not is_own:
            raise ApiError(403, "pages of other sites cannot change voices without a key")

    async def speech(self, request: Request) -> "Response | SpeechAnswer":
        service = self._service
        body = await _read_body(request, service.limits.max_body_bytes)
        asked = parse_speech(body, service.defaults, service.models, service.limits)
        service.metrics.add("input_bytes_total", len(asked.text.encode(errors="replace")))
        return SpeechAnswer(service, asked, await service.plan(asked))


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "echo_eqx"}


async def _read_body(request: Request, longest: int) -> bytes:
    """**Raises**: `ApiError` if the body is too long, or does not come."""
    too_large = ApiError(
        413, f"expected a body of at most {longest} bytes, got more", code="body_too_large"
    )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > longest:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > longest:
                raise too_large

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except TimeoutError:
        message = f"expected the whole body within {BODY_SECONDS:.0f} s"
        raise ApiError(408, message, code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away") from None
    return bytes(body)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: f"no such path: {ascii(request.url.path)[:80]}"}.get(error.status_code)
    message = message or f"{request.method}: {error.detail}"
    return JSONResponse(
        error_body(error.status_code, message), error.status_code, headers=error.headers
    )
