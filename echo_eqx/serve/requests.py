"""The body of `POST /v1/audio/speech`, checked field by field."""

import base64
import binascii
import dataclasses
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from echo_eqx.errors import EchoError
from echo_eqx.generation import Length, Range, SamplerSettings
from echo_eqx.json_data import parse_json
from echo_eqx.serve.errors import ApiError
from echo_eqx.serve.formats import CONTENT_TYPES, WHOLE
from echo_eqx.speech.arguments import MAX_SEED

MIN_SPEED, MAX_SPEED = 0.25, 4.0
MAX_INSTRUCTIONS = 4096


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. Each has its own answer."""

    max_body_bytes: int = 2**24
    max_characters: int = 20_000
    max_speaker_bytes: int = 10 * 2**20
    """Of a reference, decoded from base64 or uploaded."""
    max_steps: int = 200


@dataclass(frozen=True)
class SpeechRequest:
    text: str
    voice: str | None
    """Name of a voice; None without one."""
    reference: bytes | None
    """A recording of the voice."""
    format: str
    speed: float
    has_instructions: bool
    is_sse: bool
    stream: bool | None
    """Whether to send audio as it is ready; None for the way of the format."""
    progress: bool
    seed: int
    settings: SamplerSettings
    duration: float | None
    length: Length | None
    trim: bool
    normalize_text: bool
    expand_text: bool | None

    @property
    def is_streamed(self) -> bool:
        """Whether audio is sent as it is ready."""
        if self.stream is None:
            return self.is_sse or self.format not in WHOLE
        return self.stream


def parse_speech(
    body: bytes, defaults: SamplerSettings, models: Collection[str], limits: Limits
) -> SpeechRequest:
    """**Raises**: `ApiError` naming the first field that cannot be used."""
    try:
        data = parse_json(body)
    except ValueError as error:
        raise ApiError(400, f"expected JSON: {error}"[:300], code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"expected a JSON object, got {_shown(data)}", code="invalid_json")
    fields = _Fields(data)
    text = fields.string("input", limits.max_characters)
    if text is None:
        raise ApiError(
            400,
            "input: expected the text to speak, got none",
            param="input",
            code="missing_required_parameter",
        )
    model = fields.string("model", 1000)
    if model is not None and model not in models:
        raise ApiError(
            404,
            f"model: expected one of {', '.join(models)}, got {model[:100]!r}",
            param="model",
            code="model_not_found",
        )
    instructions = fields.string("instructions", MAX_INSTRUCTIONS)
    seed = fields.number("seed", 0, MAX_SEED, whole=True)
    return SpeechRequest(
        text=text,
        voice=_voice(fields),
        reference=_reference(fields, limits),
        format=fields.choice("response_format", tuple(CONTENT_TYPES)) or "mp3",
        speed=float(fields.number("speed", MIN_SPEED, MAX_SPEED) or 1.0),
        has_instructions=bool(instructions),
        is_sse=fields.choice("stream_format", ("audio", "sse")) == "sse",
        stream=fields.boolean("stream"),
        progress=bool(fields.boolean("progress")),
        seed=42 if seed is None else int(seed),
        settings=_settings(fields, defaults, limits),
        duration=fields.number("duration", 0.1, 1000),
        length=fields.choice("length", typing.get_args(Length)),  # type: ignore[arg-type]
        trim=fields.boolean("trim") is not False,
        normalize_text=fields.boolean("normalize_text") is not False,
        expand_text=fields.boolean("expand_text"),
    )


def settings_table(defaults: SamplerSettings, limits: Limits) -> list[dict[str, Any]]:
    """The fields of a request that set the sampler: name, kind, range, default and help."""
    docs = _field_docs()
    table = []
    for name, (kind, low, high) in _kinds(limits).items():
        entry: dict[str, Any] = {"name": name, "default": getattr(defaults, name)}
        entry["type"] = "choice" if isinstance(kind, tuple) else kind.__name__
        if isinstance(kind, tuple):
            entry["choices"] = list(kind)
        else:
            entry |= {"min": low, "max": high}
        table.append(entry | {"help": docs[name]})
    return table


class _Fields:
    """Fields of a JSON object, None where it has none or null."""

    def __init__(self, data: dict[str, Any]):
        self.data = data

    def string(self, name: str, longest: int) -> str | None:
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise _wrong(name, "a string", value)
        if len(value) > longest:
            raise ApiError(
                400,
                f"{name}: expected at most {longest} characters, got {len(value)}",
                param=name,
                code="string_above_max_length",
            )
        return value

    def number(self, name: str, low: float, high: float, whole: bool = False) -> float | int | None:
        value = self.data.get(name)
        if value is None:
            return None
        if whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        is_number = isinstance(value, int if whole else int | float)
        if isinstance(value, bool) or not is_number:
            raise _wrong(name, "a whole number" if whole else "a number", value)
        if not low <= value <= high:
            raise _wrong(name, f"{low} to {high}", value)
        return value

    def boolean(self, name: str) -> bool | None:
        value = self.data.get(name)
        if value is not None and not isinstance(value, bool):
            raise _wrong(name, "true or false", value)
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        value = self.data.get(name)
        if value is not None and (not isinstance(value, str) or value not in choices):
            raise _wrong(name, f"one of {', '.join(choices)}", value)
        return value


def _voice(fields: _Fields) -> str | None:
    voice = fields.data.get("voice")
    if isinstance(voice, dict):
        fields, name = _Fields({"voice.id": voice.get("id")}), "voice.id"
        if voice.get("id") is None:
            raise _wrong("voice", 'a name or {"id": name}', voice)
    else:
        name = "voice"
    return fields.string(name, 200) or None


def _reference(fields: _Fields, limits: Limits) -> bytes | None:
    """The recording in `speaker_ref`: base64, also as a data URL."""
    longest = limits.max_speaker_bytes
    text = fields.data.get("speaker_ref")
    if text is None:
        return None
    if not isinstance(text, str):
        raise _wrong("speaker_ref", "a recording in base64", text)
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > longest // 3 * 4 + 4:
        raise ApiError(
            413,
            f"speaker_ref: expected a recording of at most {longest} bytes, got about "
            f"{len(text) // 4 * 3}",
            param="speaker_ref",
            code="reference_too_large",
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _wrong("speaker_ref", "a recording in base64", text) from None


def _settings(fields: _Fields, defaults: SamplerSettings, limits: Limits) -> SamplerSettings:
    values = {}
    for name, (kind, low, high) in _kinds(limits).items():
        if isinstance(kind, tuple):
            value = fields.choice(name, kind)
        else:
            value = fields.number(name, low, high, whole=kind is int)
        if value is not None:
            values[name] = float(value) if kind is float else value
    settings = dataclasses.replace(defaults, **values)
    try:
        settings.check()
    except EchoError as error:
        raise ApiError(400, str(error), param=str(error).partition(":")[0]) from None
    return settings


def _kinds(limits: Limits) -> dict[str, tuple[Any, float, float]]:
    """Of each setting, its type or choices, and its range."""
    kinds = {}
    for name, hint in typing.get_type_hints(SamplerSettings, include_extras=True).items():
        allowed = next((a for a in getattr(hint, "__metadata__", ()) if isinstance(a, Range)), None)
        plain = typing.get_args(hint)[0] if allowed else hint
        if isinstance(plain, types.UnionType):  # X | None
            plain = next(kind for kind in typing.get_args(plain) if kind is not types.NoneType)
        if typing.get_origin(plain) is Literal:
            plain = typing.get_args(plain)
        low, high = (allowed.low, allowed.high) if allowed else (0, 0)
        kinds[name] = (plain, low, min(high, limits.max_steps) if name == "steps" else high)
    return kinds


def _field_docs() -> dict[str, str]:
    """The docstring below each field of `SamplerSettings`, from its source."""
    import ast
    import inspect
    import textwrap

    (body,) = ast.parse(textwrap.dedent(inspect.getsource(SamplerSettings))).body
    assert isinstance(body, ast.ClassDef)
    docs, name = {}, ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            docs[name], name = " ".join(str(node.value.value).split()), ""
    return docs


def _wrong(name: str, expected: str, value: Any) -> ApiError:
    return ApiError(400, f"{name}: expected {expected}, got {_shown(value)}", param=name)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return "a huge number"
    return ascii(value)[:60]
