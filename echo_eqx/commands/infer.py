"""Speak a text, in the voice of a recording if one is given.

    echo-eqx infer --text "Hello from a tiny model." --output hello.wav
    echo-eqx infer --checkpoint MODEL --text "Hello." --speaker_ref voice.mp3

Without --checkpoint the small voice in the package speaks. MODEL and the codec are a file, a
folder, a Hub id owner/name[@revision][:file], or voice, the one in the package. Text longer than
the canvas is split at ends of sentences, spoken piece by piece in one voice, and joined.
"""

import dataclasses
import hashlib
import json
import logging
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

import echo_eqx
from echo_eqx import voice
from echo_eqx.cli import CompileClock, StepBar, on_terminal, parse
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.config import DIT_PRESETS
from echo_eqx.data.audio import audio_kind, save_audio
from echo_eqx.data.text import check_text
from echo_eqx.data.text_file import JSON_LINES, decode
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.files import expand, write_whole
from echo_eqx.speaker import codec_problem, silence_latent
from echo_eqx.speech import canvas_seconds, check_pair
from echo_eqx.weights.checkpoint.reader import MANIFEST
from echo_eqx.weights.find import SHIPPED, find_weights
from echo_eqx.weights.native import array_dtype

logger = logging.getLogger(__name__)

PUBLISHED_CODEC, PUBLISHED_WIDTH = "facebook/dacvae-watermarked", 128


@dataclass(frozen=True)
class Args:
    checkpoint: str = "voice"
    """EchoDiT weights: our safetensors, a run of train.py, a Flax pickle of the published trainer,
    or PyTorch safetensors. A file, a folder, a Hub id owner/name[@revision][:file], or voice, the
    small one in the package."""
    text: str | None = None
    """What to say, in UTF-8."""
    text_file: Path | None = None
    """Instead of --text: a file with one utterance a line, or JSON lines (*.jsonl) with "text" and,
    if wanted, "output", "speaker_ref" and "seed" a line. The models are loaded once."""
    output: Path = Path("output.wav")
    """Where to write, *.wav or *.flac. Several results are numbered: output_0001.wav ..."""
    speaker_ref: Path | None = None
    """The voice to take: a recording (wav, flac, ogg, opus, mp3) or reference latents (*.npy)."""
    block_frames: int | None = None
    """Block-wise models only: generate the canvas in blocks of so many frames."""
    duration: float | None = None
    """Seconds of the canvas that each piece of text is spoken on. The model fills it with speech
    and then silence; another canvas gives another reading. By default what the model's file
    recommends, or else 15, or as many as it was trained with, if that is less."""
    seed: int = 42
    """Of the noise, and of the watermark's message."""
    sampler: Annotated[echo_eqx.SamplerSettings, tyro.conf.arg(name="")] = field(
        default_factory=echo_eqx.SamplerSettings
    )
    num_candidates: int = 1
    """Readings of each utterance, with seeds that follow on --seed."""
    batch_size: int = 8
    """Pieces of text that are sampled at once."""
    codec: str | None = None
    """DACVAE weights: weights.pth or our safetensors. A file, a folder, a Hub id, or voice. By
    default the one that the checkpoint names, or else facebook/dacvae-watermarked."""
    watermark: bool = True
    """Embed an inaudible message that says the audio was generated. By default it is embedded if
    the codec can."""
    message: str | None = None
    """The watermark's bits, such as 0110...; by default drawn from the seed."""
    trim: bool = True
    """Cut the silence that the model leaves behind the speech."""
    normalize_text: bool = True
    """Clean the text the way the community's models were trained: straight quotes, commas for
    colons, a speaker tag [S1] in front."""
    expand_text: bool = False
    """Write out numbers, dates, money, addresses and abbreviations, as they are read in English. On
    by default for the small voice in the package, which has read nothing else."""
    speaker_seconds: float | None = None
    """Use so many seconds of speech of the reference, up to 120. By default as many as in
    training."""
    speaker_lufs: float | None = None
    """Bring the reference to this integrated loudness, such as -16. By default to what the
    checkpoint names, or else -23."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the model: auto is bfloat16 on GPU and TPU, float32 on CPU."""
    json: bool = False
    """Next to each result write a JSON file with all settings and the identity of the models. A
    file of that name that this command did not write is never overwritten."""


@dataclass(frozen=True)
class Job:
    """One result to make."""

    text: str
    output: Path
    speaker_ref: Path | None
    seed: int


def main() -> None:
    args = parse(Args, __doc__)
    started = time.perf_counter()
    use_compilation_cache()
    clock = CompileClock()
    check_usage(args)
    jobs = jobs_of(args)
    check_writable(jobs, args)

    dtype_name = args.dtype
    if dtype_name == "auto":
        dtype_name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    checkpoint = find_weights(args.checkpoint)
    if on_terminal():
        logger.info(f"loading {checkpoint.name}")
    dit = echo_eqx.load_dit(checkpoint, dtype=array_dtype(dtype_name))
    codec_name, codec_file = find_codec(args, dit)
    codec = echo_eqx.load_codec(codec_file)
    check_pair(dit, codec)
    args = with_defaults_of(dit, codec)
    duration = canvas_seconds(dit, codec, args.duration)
    message = message_bits(args, codec)
    if problem := codec_problem(dit.generation, silence_latent(codec)):
        logger.warning(f"codec {codec_name}: {problem}")

    speakers: dict[Path | None, np.ndarray | None] = {None: None}
    for path in dict.fromkeys(job.speaker_ref for job in jobs):
        if path is not None:
            latents = echo_eqx.speaker_latents(
                dit, codec, path, max_seconds=args.speaker_seconds, lufs=args.speaker_lufs
            )
            speakers[path] = latents
            print(reference_line(path, latents, dit, codec))
    identities = {}
    if args.json:
        identities["checkpoint"] = identity(checkpoint, args.checkpoint, dit)
        identities["codec"] = identity(codec_file, codec_name, codec)
    rate, seconds = codec.config.sample_rate, 0.0
    for start in range(0, len(jobs), args.batch_size):  # what is spoken is also written
        batch = jobs[start : start + args.batch_size]
        bar = StepBar(f"speaking {start + len(batch)}/{len(jobs)}")
        audios = echo_eqx.synthesize_all(
            dit,
            codec,
            [echo_eqx.Utterance(job.text, speakers[job.speaker_ref], job.seed) for job in batch],
            duration=duration,
            settings=args.sampler,
            message=message,
            trim=args.trim,
            normalise=args.normalize_text,
            expand_text=args.expand_text,
            batch_size=args.batch_size,
            block_frames=args.block_frames,
            progress=bar if on_terminal() else None,
        )
        bar.close()
        for job, audio in zip(batch, audios, strict=True):
            save_audio(job.output, audio, rate)
            if args.json:
                settings = effective_settings(args, job, dtype_name, message) | identities
                settings |= {"duration": duration, "sample_rate": rate}
                settings["seconds"] = len(audio) / rate
                settings |= reference_settings(job, args, speakers[job.speaker_ref], dit, codec)
                write_json(job.output.with_suffix(".json"), settings)
            print(f"{job.output}: {len(audio) / rate:.2f} s")
            seconds += len(audio) / rate
    if message is not None:
        print(f"watermark message: {''.join(map(str, message))}")
    wall = time.perf_counter() - started
    running = wall - clock.seconds
    print(
        f"{seconds:.2f} s of audio in {wall:.2f} s: compiling {clock.seconds:.2f} s, running "
        f"{running:.2f} s, real-time factor {running / seconds:.2f}"
    )
    if args.checkpoint in SHIPPED and args.speaker_ref is None:
        print(f"next: choose a voice with --speaker_ref {voice.REFERENCES / 'ben.flac'}")


def find_codec(args: Args, dit: echo_eqx.EchoDiT) -> tuple[str, Path]:
    """The codec to decode with, as it was named, and its file.

    **Raises**: `EchoError` if the checkpoint names none that can be had.
    """
    if args.codec is not None:
        return args.codec, find_weights(args.codec, "codec")
    width, named = dit.config.latent_dim, dit.generation.codec
    if named is None and width != PUBLISHED_WIDTH:
        known = ", such as voice" if width == DIT_PRESETS["voice"].latent_dim else ""
        raise EchoError(
            f"checkpoint {args.checkpoint} names no codec, and its latents have {width} channels; "
            f"give --codec with the codec it was trained on{known}"
        )
    codec = named or PUBLISHED_CODEC
    try:
        return codec, find_weights(codec, "codec")
    except EchoError as error:
        whose = "the checkpoint names" if named else "the published models use"
        raise EchoError(f"the codec that {whose}: {error}; or give --codec FILE") from None


def with_defaults_of(dit: echo_eqx.EchoDiT, codec: echo_eqx.DACVAE) -> Args:
    """The flags once more: where one was not given, the models say what it is."""
    can_mark = codec.watermark is not None
    recommended = dit.generation
    base = Args(
        sampler=recommended.sampler, watermark=can_mark, expand_text=recommended.expand_text
    )
    return parse(Args, __doc__, default=base)


def reference_line(
    path: Path, latents: np.ndarray, dit: echo_eqx.EchoDiT, codec: echo_eqx.DACVAE
) -> str:
    """What is known of a reference, for the person at the command."""
    used = f"reference {path}: {len(latents) / codec.config.frame_rate:.2f} s of speech"
    nearest = echo_eqx.nearest_voice(dit, latents)
    if nearest is None:
        return used
    name, distance = nearest
    if distance <= 1:
        return f"{used}, which sounds like {name} (distance {distance:.2f})"
    names = ", ".join(voice.name for voice in dit.generation.voices)
    return (
        f"{used}, like none of the voices this model knows ({names}); expect speech like the "
        f"nearest, {name} (distance {distance:.2f}; a known voice stays below 1)"
    )


def reference_settings(
    job: Job,
    args: Args,
    latents: np.ndarray | None,
    dit: echo_eqx.EchoDiT,
    codec: echo_eqx.DACVAE,
) -> dict[str, Any]:
    """What was made of the reference."""
    if latents is None or job.speaker_ref is None:
        return {"speaker_seconds": None, "speaker_lufs": None, "nearest_voice": None}
    level = dit.generation.reference_lufs if args.speaker_lufs is None else args.speaker_lufs
    nearest = echo_eqx.nearest_voice(dit, latents)
    return {
        "speaker_seconds": len(latents) / codec.config.frame_rate,
        "speaker_lufs": None if job.speaker_ref.suffix == ".npy" else level,
        "nearest_voice": nearest and {"name": nearest[0], "distance": nearest[1]},
    }


def check_usage(args: Args) -> None:
    """What can be refused before anything is loaded."""
    if (args.text is None) == (args.text_file is None):
        raise UsageError("wanted either --text or --text_file")
    args.sampler.check()
    positive = {"num_candidates": args.num_candidates, "batch_size": args.batch_size}
    for name, value in positive.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; wanted at least 1")
    if args.message is not None and not args.watermark:
        raise UsageError("--message needs --watermark")


def jobs_of(args: Args) -> list[Job]:
    """The results to make, in order."""
    base = Job(args.text or "", args.output, args.speaker_ref, args.seed)
    if args.text_file is None:
        check_text(base.text)
        lines = [base]
    else:
        lines = read_text_file(args.text_file, base)
    for line in lines:
        audio_kind(line.output)
    jobs = [
        dataclasses.replace(
            line,
            seed=line.seed + candidate,
            output=numbered(line.output, f"c{candidate + 1}" if args.num_candidates > 1 else ""),
        )
        for line in lines
        for candidate in range(args.num_candidates)
    ]
    for job in jobs:
        if not 0 <= job.seed < 2**32:
            raise UsageError(f"seed is {job.seed}; wanted 0 to 2^32 - 1")
    if len({job.output.with_suffix("") if args.json else job.output for job in jobs}) < len(jobs):
        raise UsageError("two utterances would be written to the same file")
    return jobs


def read_text_file(path: Path, base: Job) -> list[Job]:
    try:
        content = decode(path.read_bytes(), errors="strict")
    except FileNotFoundError:
        raise EchoError(f"{path} does not exist; wanted a text file") from None
    except UnicodeDecodeError as error:
        kind = error.encoding.upper()
        raise EchoError(f"{path} is no {kind} at byte {error.start}; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} cannot be read: {error}") from None
    lines = [
        (n, line) for n, line in enumerate(re.split(r"\r\n|\n|\r", content), 1) if line.strip()
    ]
    if not lines:
        raise EchoError(f"{path} is empty; wanted one utterance a line")
    is_json = path.suffix.lower() in JSON_LINES or _is_object(lines[0][1])
    jobs = []
    for index, (n, line) in enumerate(lines, 1):
        output = numbered(base.output, f"{index:04d}")
        if is_json:
            job = job_from_json(line, f"{path} line {n}", base, output)
        else:
            job = dataclasses.replace(base, text=line, output=output)
        try:
            check_text(job.text)
        except EchoError as error:
            raise EchoError(f"{path} line {n}: {error}") from None
        jobs.append(job)
    return jobs


def _is_object(line: str) -> bool:
    """Whether a line is JSON whatever the file is called: nobody wants braces read out."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def job_from_json(line: str, where: str, base: Job, output: Path) -> Job:
    kinds = {"text": str, "output": str, "speaker_ref": str, "seed": int}
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EchoError(f"{where} is no JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise EchoError(f'{where} has no "text"; wanted an object with "text"')
    for name, value in fields.items():
        if name not in kinds or type(value) is not kinds[name]:
            is_plain = isinstance(value, str | int | float | None)
            given = repr(value)[:100] if is_plain else f"a {type(value).__name__}"
            raise EchoError(f"{where}: {name[:50]} is {given}; wanted {', '.join(kinds)}")
    seed = fields.get("seed", base.seed)
    if not 0 <= seed < 2**32:
        raise EchoError(f"{where}: seed is {str(seed)[:50]}; wanted 0 to 2^32 - 1")
    speaker = fields.get("speaker_ref")
    if "output" in fields:
        output = base.output.parent / expand(Path(fields["output"]))
    return Job(
        text=fields["text"],
        output=output,
        speaker_ref=base.speaker_ref if speaker is None else expand(Path(speaker)),
        seed=seed,
    )


def numbered(path: Path, label: str) -> Path:
    return path.with_stem(f"{path.stem}_{label}") if label else path


def check_writable(jobs: list[Job], args: Args) -> None:
    """Refuse, before anything is loaded, what cannot be written or is not ours to replace."""
    for output in (job.output for job in jobs):
        try:
            if output.is_dir():
                raise EchoError(f"output {output} is a folder; expected a file")
            for given in {job.speaker_ref for job in jobs}:
                if given is not None and given.exists() and output.exists():
                    if given.samefile(output):
                        raise EchoError(
                            f"output {output} would replace the reference {given}; give another "
                            "--output"
                        )
            described = output.with_suffix(".json")
            if args.json and not is_replaceable(described):
                raise EchoError(
                    f"{described} was not written by this command, so --json does not replace it; "
                    "give another --output or move the file"
                )
            with tempfile.NamedTemporaryFile(prefix=f".{output.name}.", dir=output.parent):
                pass
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise EchoError(f"output {str(output)!r} cannot be written: {reason}") from None


def is_replaceable(path: Path) -> bool:
    """Whether nothing is at `path`, or a description of a result that --json wrote."""
    if not path.is_file():
        return not (path.exists() or path.is_symlink())
    if path.stat().st_size > 1_000_000:
        return False
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    version = found.get("version") if isinstance(found, dict) else None
    expected = {"text", "output", "checkpoint", "codec"}
    return isinstance(version, dict) and "echo_eqx" in version and expected <= found.keys()


def message_bits(args: Args, codec: echo_eqx.DACVAE) -> list[int] | None:
    if not args.watermark and args.message is None:
        return None
    if codec.watermark is None:
        flag = "--watermark" if args.message is None else "--message"
        raise UsageError(
            f"{flag}: expected a codec with a watermark path, got one without; leave {flag} out"
        )
    num_bits = codec.watermark.num_bits
    if args.message is None:
        return np.random.default_rng(args.seed).integers(0, 2, num_bits).tolist()
    if len(args.message) != num_bits or set(args.message) - {"0", "1"}:
        raise UsageError(f"message is {args.message!r}; wanted {num_bits} characters 0 or 1")
    return [int(bit) for bit in args.message]


def effective_settings(
    args: Args, job: Job, dtype: str, message: list[int] | None
) -> dict[str, Any]:
    settings = dataclasses.asdict(args)
    settings |= settings.pop("sampler")
    for name in ("text_file", "checkpoint", "codec", "json", "num_candidates"):
        settings.pop(name)
    settings |= {"text": job.text, "output": str(job.output), "seed": job.seed, "dtype": dtype}
    settings["start_t"] = args.sampler.first_time
    settings["speaker_ref"] = None if job.speaker_ref is None else str(job.speaker_ref)
    settings["watermark"] = message is not None
    settings["message"] = None if message is None else "".join(map(str, message))
    settings["version"] = {"echo_eqx": echo_eqx.__version__, "jax": jax.__version__}
    settings["device"] = jax.devices()[0].device_kind
    return settings


def identity(path: Path, source: str, model: echo_eqx.EchoDiT | echo_eqx.DACVAE) -> dict[str, Any]:
    # The manifest of a training checkpoint lists the checksums of all its parts.
    with (path / MANIFEST if path.is_dir() else path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "source": source,
        "file": str(path.resolve()),
        "sha256": digest,
        "parameters": echo_eqx.num_parameters(model),
        "config": dataclasses.asdict(model.config),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    try:
        write_whole(path, lambda temporary: temporary.write_text(text, "utf-8"))
    except OSError as error:
        raise EchoError(f"{path} cannot be written: {error}") from None
