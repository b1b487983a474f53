"""Serve speech over HTTP, to every client of OpenAI's speech endpoint, and a page to speak from.

    echo-eqx serve
    echo-eqx serve --checkpoint MODEL --voices voices/ --host 0.0.0.0 --api_key SECRET

Without flags the small voice in the package speaks at http://127.0.0.1:8000. All programs are
compiled, or read from the cache, before the server says that it is ready; no request compiles
anything. SIGTERM and Ctrl-C finish what is being spoken, then end it.
"""

import dataclasses
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

import echo_eqx
from echo_eqx import EchoDiT, SamplerSettings
from echo_eqx.cli import CompileClock, parse
from echo_eqx.codec.codec import Codec
from echo_eqx.commands.infer import RECOMMENDED, SAMPLER_FLAGS
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.errors import EchoError, UsageError, optional
from echo_eqx.generation import Length
from echo_eqx.layers.precision import MatmulPrecision, set_matmul_precision
from echo_eqx.speech.chunks import target_seconds
from echo_eqx.speech.codec import check_latent_dim, codec_mismatch, find_codec
from echo_eqx.speech.stream import FIRST_SECONDS
from echo_eqx.speech.voices import SUFFIX, list_voices, load_voice
from echo_eqx.weights.load import load_model
from echo_eqx.weights.native import array_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Args:
    checkpoint: str = "voice"
    """EchoDiT weights, as for infer: a file, a folder, a Hub id owner/name[@revision][:file], or
    voice, the small voice in the package."""
    codec: str | None = None
    """Codec weights, as for infer."""
    voices: Path | None = None
    """Folder of the voices; default: that of echo-eqx voice. Those in the package are served
    too."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 can be reached from other machines and needs --api_key."""
    port: int = 8000
    """Port of the server; 0 picks a free one."""
    api_key: str | None = None
    """Secret that clients must send as Authorization: Bearer TEXT. By default the environment
    variable ECHO_API_KEY, which other users of this machine cannot see in the list of processes."""
    allow_uploads: bool = False
    """Let clients add voices to the folder (POST /v1/audio/voices), and remove those."""
    batch_size: int | None = None
    """Chunks of text that are sampled at a time. By default 1 on CPU, where more are not faster
    together, and 4 elsewhere."""
    max_requests: int | None = None
    """Requests that wait or are spoken at a time, by default 16 for each row of --batch_size; more
    are answered 503 with Retry-After."""
    max_characters: int = 20_000
    """Longest text of a request, in characters."""
    max_body_mb: float = 16.0
    """Largest body of a request, in MiB."""
    max_steps: int = 200
    """Most sampling steps that a request may ask for."""
    duration: float | None = None
    """Seconds generated for each chunk of text, as for infer; requests may ask for others."""
    length: Annotated[Length, RECOMMENDED] = "full"
    """Generate the full duration for every chunk of text (full), or less for shorter texts (auto),
    as for infer. Requests may ask for either; with auto more lengths are compiled, so that short
    texts cost less."""
    first_seconds: float | None = FIRST_SECONDS
    """Of a streamed answer, about how long the first chunk of text may take to speak. It is
    generated in as many frames as it needs, so that the first sound comes early. None: chunks as in
    answers that are sent whole."""
    speaker_seconds: float | None = None
    """Seconds of a reference's speech to use, up to 120. By default the longest in training."""
    sampler: Annotated[SamplerSettings, tyro.conf.arg(name="", constructor=SAMPLER_FLAGS)] = field(
        default_factory=SamplerSettings
    )
    watermark: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: if the codec can)")] = (
        True
    )
    """Embed an inaudible message that marks the audio as generated."""
    expand_text: Annotated[bool, RECOMMENDED] = False
    """Write out numbers, dates, money, addresses and abbreviations as they are read in English;
    requests may say otherwise."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the model: auto is bfloat16 on GPU and TPU, float32 on CPU."""
    codec_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of the codec. float16 is faster on GPU; its error is over 40 dB below the signal."""
    matmul_precision: MatmulPrecision = "highest"
    """Precision of float32 matrix products and convolutions on GPU and TPU: highest is exact, the
    others are faster. CPUs ignore it."""


def main() -> None:
    args = parse(Args, __doc__)
    for module in ("starlette", "uvicorn"):
        optional(module, "serve")
    from echo_eqx.serve.engine import Engine
    from echo_eqx.serve.memory import use_one_arena
    from echo_eqx.serve.metrics import Metrics
    from echo_eqx.serve.programs import Programs
    from echo_eqx.serve.requests import Limits
    from echo_eqx.serve.server import bind, serve
    from echo_eqx.serve.service import Service
    from echo_eqx.serve.voices import Voices

    check_usage(args)
    use_one_arena()
    api_key = args.api_key or os.environ.get("ECHO_API_KEY") or None
    listener = bind(args.host, args.port, api_key)
    use_compilation_cache()
    set_matmul_precision(args.matmul_precision)
    metrics, clock = Metrics(), CompileClock()
    dtype = args.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    logger.info(f"loading {args.checkpoint}")
    dit, _ = load_model(args.checkpoint, "dit", dtype=array_dtype(dtype))
    codec_name, codec_file = find_codec(dit, args.codec, args.checkpoint)
    codec = echo_eqx.load_codec(
        codec_file, dtype=array_dtype(args.codec_dtype), pca=args.checkpoint
    )
    check_latent_dim(dit, codec)
    args = with_recommended(dit, codec)
    target_seconds(dit, codec, args.duration)
    rate = codec.config.frame_rate
    frames = [dit.config.max_speaker_frames]
    if args.speaker_seconds is None:
        files = [path for path in list_voices(args.voices).values() if path.suffix == SUFFIX]
        frames += [len(load_voice(path).latents) for path in files]
    else:
        frames = [int(args.speaker_seconds * rate + 1e-6)]
    first_frames = None
    if args.first_seconds is not None:
        first_frames = max(1, min(round(args.first_seconds * rate), dit.config.max_frames))
    programs = Programs(
        dit,
        codec,
        batch_size=args.batch_size or (1 if jax.default_backend() == "cpu" else 4),
        max_frames=dit.config.max_frames,
        max_speaker_frames=max(frames),
        max_steps=args.max_steps,
        all_lengths=args.length == "auto",
        first_frames=first_frames,
    )
    if programs.silence is not None:
        if warning := codec_mismatch(dit.generation, programs.silence):
            logger.warning(f"codec {codec_name}: {warning}")
    engine = Engine(programs, args.max_requests or 16 * programs.batch_size)
    service = Service(
        programs=programs,
        engine=engine,
        voices=Voices(programs, args.voices),
        metrics=metrics,
        limits=Limits(
            max_body_bytes=int(args.max_body_mb * 2**20),
            max_characters=args.max_characters,
            max_steps=args.max_steps,
        ),
        defaults=SamplerSettings(**dataclasses.asdict(args.sampler)),
        model=Path(args.checkpoint).name or "echo",
        duration=args.duration,
        length=args.length,
        first_seconds=args.first_seconds,
        watermark=args.watermark and codec.watermark is not None,
        expand_text=args.expand_text,
        api_key=api_key,
        allow_uploads=args.allow_uploads,
    )
    programs.compile(service.message(0))
    for name, path in list_voices(args.voices).items():
        try:
            service.voices.reference(path)
        except EchoError as error:
            logger.warning(f"voice {name} is not served: {error}")
    metrics.set_ready()
    engine.start()
    host = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    serve(
        service,
        listener,
        f"ready at {address} after compiling for {clock.seconds:.1f} s; voices: "
        f"{', '.join(service.voices.names)}",
    )
    engine.stop()


def check_usage(args: Args) -> None:
    """**Raises**: `UsageError` for flags that are wrong with any model."""
    args.sampler.check()
    if args.first_seconds is not None and not 0 < args.first_seconds < math.inf:
        raise UsageError(f"first_seconds: expected more than 0 or None, got {args.first_seconds}")
    for name in ("batch_size", "max_requests", "max_characters", "max_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")


def with_recommended(dit: EchoDiT, codec: Codec) -> Args:
    """The flags parsed again, with the models' recommended settings as defaults."""
    base = Args(
        sampler=dit.generation.sampler,
        watermark=codec.watermark is not None,
        expand_text=dit.generation.expand_text,
        length=dit.generation.length,
    )
    return parse(Args, __doc__, default=base)
