"""What to generate: one text, or the lines of a file, each with its output, voice and seed."""

import dataclasses
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_eqx.data.audio import audio_kind
from echo_eqx.data.text import check_text
from echo_eqx.data.text_file import JSON_LINES, decode
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.files import expand
from echo_eqx.speech.arguments import MAX_SEED
from echo_eqx.speech.metadata import is_replaceable
from echo_eqx.speech.voices import voice_file

_FIELDS = {"text": str, "output": str, "speaker_ref": str, "voice": str, "seed": int}


@dataclass(frozen=True)
class Request:
    """One audio file to generate."""

    text: str
    output: Path
    speaker_ref: Path | None = None
    """A recording, latents or the file of a voice."""
    seed: int = 42
    continue_from: Path | None = None
    """A recording that the result continues."""

    @property
    def metadata(self) -> Path:
        """The JSON file that describes the settings."""
        return self.output.with_suffix(".json")


def make_requests(
    base: Request,
    text_file: Path | None,
    num_candidates: int,
    metadata: bool,
    voices: Path | None = None,
) -> list[Request]:
    """`base`, or a request for each line of `text_file`, times `num_candidates` seeds.

    The names of voices in lines are those of `list_voices(voices)`.

    **Raises**: `EchoError` naming the text, voice, seed or output that cannot be used, or if two
    outputs are the same; with `metadata`, if they differ only in their suffix.
    """
    if text_file is None:
        check_text(base.text)
        lines = [base]
    else:
        lines = _read_lines(text_file, base, voices)
    requests = [
        dataclasses.replace(
            line,
            seed=line.seed + i,
            output=_numbered(line.output, f"c{i + 1}") if num_candidates > 1 else line.output,
        )
        for line in lines
        for i in range(num_candidates)
    ]
    for request in requests:
        audio_kind(request.output)
        if not 0 <= request.seed <= MAX_SEED:
            raise UsageError(f"seed: expected 0 to {MAX_SEED}, got {request.seed}")
    paths = {request.metadata if metadata else request.output for request in requests}
    if len(paths) < len(requests):
        raise UsageError("expected a different output for each utterance, got the same file twice")
    return requests


def check_outputs(requests: list[Request], metadata: bool) -> None:
    """**Raises**: `EchoError` if an output cannot be written, or would replace a recording that is
    read or a JSON file that does not describe a result."""
    recordings = {
        (kind, path)
        for request in requests
        for kind, path in (
            ("reference", request.speaker_ref),
            ("recording", request.continue_from),
        )
        if path is not None
    }
    for request in requests:
        output = request.output
        try:
            if output.is_dir():
                raise EchoError(f"output {output}: expected a file, got a folder")
            for kind, path in recordings:
                if path.exists() and output.exists() and path.samefile(output):
                    raise EchoError(
                        f"output {output} would replace the {kind} {path}; give another --output"
                    )
            if metadata and not is_replaceable(request.metadata):
                raise EchoError(
                    f"{request.metadata} was not written by this command, so --json does not "
                    "replace it; give another --output or move the file"
                )
            with tempfile.NamedTemporaryFile(prefix=f".{output.name}.", dir=output.parent):
                pass
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise EchoError(f"cannot write output {str(output)!r}: {reason}") from None


def _read_lines(path: Path, base: Request, voices: Path | None) -> list[Request]:
    try:
        content = decode(path.read_bytes(), errors="strict")
    except FileNotFoundError:
        raise EchoError(f"{path} does not exist; expected a text file") from None
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        raise EchoError(
            f"{path}: not valid {encoding} at byte {error.start}; save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        raise EchoError(f"cannot read {path}: {error}") from None
    numbered_lines = enumerate(re.split(r"\r\n|\n|\r", content), 1)
    lines = [(number, line) for number, line in numbered_lines if line.strip()]
    if not lines:
        raise EchoError(f"{path}: expected one utterance per line, got an empty file")
    # If the first line is a JSON object, the suffix does not matter: nobody wants braces spoken.
    is_json = path.suffix.lower() in JSON_LINES or isinstance(_parse(lines[0][1]), dict)
    requests = []
    for index, (number, line) in enumerate(lines, 1):
        where, label = f"{path} line {number}", f"{index:04d}"
        if is_json:
            request = _from_json(line, where, base, label, voices)
        else:
            output = _numbered(base.output, label)
            request = dataclasses.replace(base, text=line, output=output)
        try:
            check_text(request.text)
        except EchoError as error:
            raise EchoError(f"{where}: {error}") from None
        requests.append(request)
    return requests


def _parse(line: str) -> Any:
    """The JSON value of a line, or the error that parsing raised."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def _from_json(line: str, where: str, base: Request, label: str, voices: Path | None) -> Request:
    fields = _parse(line)
    if isinstance(fields, Exception):
        raise EchoError(f"{where}: not valid JSON: {str(fields)[:200]}")
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise EchoError(f'{where}: expected a JSON object with a string "text"')
    for name, value in fields.items():
        if type(value) is not _FIELDS.get(name):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in _FIELDS.items())
            is_plain = isinstance(value, str | int | float | None)
            shown = repr(value)[:100] if is_plain else f"a {type(value).__name__}"
            raise EchoError(f"{where}: expected {known}, got {name[:50]} = {shown}")
    if not 0 <= fields.get("seed", 0) <= MAX_SEED:
        raise EchoError(f"{where}: seed: expected 0 to {MAX_SEED}, got {str(fields['seed'])[:50]}")
    if "output" in fields:
        output = base.output.parent / expand(Path(fields["output"]))
    else:
        output = _numbered(base.output, label)
    speaker = fields.get("speaker_ref")
    if speaker is not None and "voice" in fields:
        raise EchoError(f"{where}: expected either voice or speaker_ref, got both")
    try:
        if "voice" in fields:
            speaker = voice_file(fields["voice"], voices)
    except EchoError as error:
        raise EchoError(f"{where}: {error}") from None
    return Request(
        text=fields["text"],
        output=output,
        speaker_ref=base.speaker_ref if speaker is None else expand(Path(speaker)),
        seed=fields.get("seed", base.seed),
        continue_from=base.continue_from,
    )


def _numbered(path: Path, label: str) -> Path:
    audio_kind(path)  # which also finds a path without a name
    return path.with_stem(f"{path.stem}_{label}")
