"""Say what tar shards of latents hold, and what of it is broken.

    echo-eqx inspect_shards --data shards/
    echo-eqx inspect_shards --data hf://datasets/OWNER/NAME --plot shards.png
    echo-eqx inspect_shards --data shards/ --play KEY --output sample.wav

Every record is read. Exit code 0 says that all is well, 1 that something is broken.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import echo_eqx
from echo_eqx.cli import StepBar, parse
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.config import DIT_PRESETS, DiTConfig, presets_of_width
from echo_eqx.data.audio import audio_kind, save_audio
from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.shards import ShardIndex, list_shards
from echo_eqx.errors import EchoError, UsageError, printable
from echo_eqx.files import write_whole
from echo_eqx.prepare.inspect import Report, find_sample, inspect_shards

LISTED = 20
MANY_WITHOUT = 0.2
"""Share of samples without a reference above which that is told."""
BARS = 10
BAR_WIDTH = 40


@dataclass(frozen=True)
class Args:
    data: str | None = None
    """Tar shards: a folder, a glob in quotes, one file, or hf://datasets/owner/name[@revision]."""
    model: str | None = None
    """Model that the shards are for: its preset gives window, longest text and longest reference,
    and latents of another width are an error."""
    max_frames: int | None = None
    """Window of a sample in latent frames; by default the model's, 768."""
    max_text_bytes: int | None = None
    """Longest text in bytes, with the byte that leads it; by default the model's, 768."""
    max_speaker_frames: int | None = None
    """Longest reference in latent frames; by default the model's, 512."""
    all: bool = False
    """List everything broken, not the first 20, and every channel."""
    json: bool = False
    """Print the report as one JSON object, with all that is broken and every channel."""
    plot: Path | None = None
    """Also draw lengths and channels into a *.png (needs the extra: pip install
    'echo_eqx[plots]')."""
    play: str | None = None
    """Instead of a report: decode the sample with this key to --output, and its reference to
    *.ref.wav beside it."""
    codec: str = "facebook/dacvae-watermarked"
    """With --play: DACVAE weights. A file, a folder, or a Hub id."""
    output: Path = Path("output.wav")
    """With --play: where to write, *.wav or *.flac."""
    cache_dir: Path = Path("~/.cache/echo_eqx/shards")
    """Where shards from the Hub lie while they are read."""
    cache_gb: float = 200.0
    """Room for them, in 10^9 bytes."""


def main() -> None:
    args = parse(Args, __doc__)
    check_usage(args)
    assert args.data is not None
    window = window_of(args)
    folder = args.cache_dir
    shard_index = list_shards(args.data, folder)
    cache = ShardCache(folder, int(args.cache_gb * 1e9))
    try:
        if args.play is not None:
            return play(shard_index, cache, args.play, args.codec, args.output)
        bar = StepBar("reading shards")
        report = inspect_shards(
            shard_index,
            cache,
            max_frames=window.max_frames,
            max_text_bytes=window.max_text_bytes,
            max_speaker_frames=window.max_speaker_frames,
            progress=bar,
        )
        bar.close()
    finally:
        cache.close()
    if args.json:
        print(json.dumps(as_json(report), indent=2))
    else:
        print("\n".join(lines_of(report, window, args.all)))
    if args.plot is not None:
        plot(report, args.plot)
    if args.model is not None and report.samples and len(report.mean) != window.latent_dim:
        width = len(report.mean)
        raise EchoError(
            f"{args.data} holds latents of {width} channels; --model {args.model} has "
            f"{window.latent_dim}; {fitting_models(width)}"
        )
    if report.broken or not report.samples:
        raise SystemExit(1)


def window_of(args: Args) -> DiTConfig:
    """The model's sizes, with the lengths that the flags give."""
    lengths = {
        "max_frames": args.max_frames,
        "max_text_bytes": args.max_text_bytes,
        "max_speaker_frames": args.max_speaker_frames,
    }
    given = {name: value for name, value in lengths.items() if value is not None}
    return replace(DIT_PRESETS[args.model or "1.3B"], **given)


def fitting_models(width: int) -> str:
    names = presets_of_width(width)
    return f"--model {' or '.join(names)} fits" if names else "no --model has as many"


def check_usage(args: Args) -> None:
    """What can be refused before anything is read."""
    if args.data is None:
        raise UsageError(
            "--data is missing; wanted a folder of tar shards, a glob or hf://datasets/..."
        )
    if args.model is not None and args.model not in DIT_PRESETS:
        raise UsageError(f"model is {args.model!r}; expected one of {', '.join(DIT_PRESETS)}")
    for name in ("max_frames", "max_text_bytes", "max_speaker_frames"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1")
    if not 0 < args.cache_gb < float("inf"):
        raise UsageError(f"cache_gb is {args.cache_gb}; wanted a positive number")
    if args.play is not None:
        if args.json or args.plot is not None:
            raise UsageError("--play makes no report; wanted it without --json and --plot")
        audio_kind(args.output)
    if args.plot is not None:
        if args.plot.suffix.lower() != ".png":
            raise UsageError(f"plot is {args.plot}; wanted a *.png")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise EchoError(
                "--plot needs matplotlib; wanted pip install 'echo_eqx[plots]'"
            ) from None


# --- The report ---------------------------------------------------------------------------------


def lines_of(report: Report, window: DiTConfig, all_lines: bool) -> list[str]:
    """The report for people."""
    n = report.samples
    revision = "" if report.revision is None else f" at {report.revision}"
    by = "" if report.has_frame_rate else ", as no codec.json says otherwise"
    lines = [
        f"source      {printable(report.source)}{revision}",
        f"shards      {report.shards}",
        f"samples     {n}",
        f"hours       {report.hours:.2f} ({report.frame_rate:g} latent frames a second{by})",
        f"speakers    {report.speakers}, named by {share(report.with_speaker, n)}",
        f"languages   {', '.join(f'{printable(k)} {v}' for k, v in report.languages.items()) or 0}",
        f"references  {share(report.references, n)}",
        f"fit         {share(report.fitting, n)} in {window.max_frames} frames and "
        f"{window.max_text_bytes} bytes of text",
        *(f"WARNING     {line}" for line in warnings(report, window)),
    ]
    if report.extras:
        extras = ", ".join(
            f"{printable(suffix)} {count}" for suffix, count in report.extras.items()
        )
        lines.append(f"extras      {extras}: further files of records; training does not read them")
    if n:
        mean, deviation = report.overall
        channels = f"{len(report.mean)} channels ({fitting_models(len(report.mean))})"
        lines += [
            f"latents     {channels}, mean {mean:.4f}, deviation {deviation:.4f}",
            f"channels    mean {span(report.mean)}, deviation {span(report.deviation)}",
        ]
        if all_lines:
            for i, (mean, deviation) in enumerate(zip(report.mean, report.deviation, strict=True)):
                lines.append(f"  {i:>4}  mean {mean:>9.4f}  deviation {deviation:>9.4f}")
    if report.unseen is None:
        lines.append(f"silence     {report.silence or 'none beside the shards'}")
        index = f"{', '.join(map(printable, report.indexes))}: {report.compared} shards compared"
        lines.append(f"index       {index if report.indexes else 'none beside the shards'}")
    else:
        lines.append(f"beside      cannot be looked at: {report.unseen}")
    if n:
        lines += ["", f"seconds     {extremes(report.frames / report.frame_rate, 2)}"]
        lines += bars(report.frames / report.frame_rate, 2)
        lines += ["", f"text bytes  {extremes(report.text_bytes, 0)}"]
        lines += bars(report.text_bytes, 0)
    if report.broken:
        kinds = ", ".join(f"{kind} {count}" for kind, count in report.kinds.items())
        lines += ["", f"broken      {len(report.broken)} ({kinds})"]
        listed = report.broken if all_lines else report.broken[:LISTED]
        for record in listed:
            place = " ".join(printable(name) for name in (record.shard, record.key) if name)
            lines.append(f"  {place}: {record.kind}: {printable(record.detail)}")
        if len(listed) < len(report.broken):
            lines.append(f"  ... {len(report.broken) - len(listed)} more (--all)")
    else:
        lines += ["", "broken      0"]
    return lines


def warnings(report: Report, window: DiTConfig) -> list[str]:
    """What will surprise whoever trains on these shards."""
    n, found = report.samples, []
    without = n - report.references
    if without > MANY_WITHOUT * n:
        found.append(
            f"{share(without, n)} samples have no reference: a model learns no voice from them; "
            "prepare makes references where recordings name their speaker"
        )
    if report.longer_recordings:
        hours = report.frames_cut / report.frame_rate / 3600
        found.append(
            f"{share(report.longer_recordings, n)} recordings are longer than {window.max_frames} "
            f"frames: training cuts {hours:.2f} hours of audio off and keeps their texts whole, "
            "unless it gets a larger --max_frames, or --skip_longer to leave them out"
        )
    if report.longer_texts:
        found.append(
            f"{share(report.longer_texts, n)} texts are longer than {window.max_text_bytes} bytes: "
            "training cuts them, unless it gets a larger --max_text_bytes, or --skip_longer"
        )
    if report.longer_references:
        found.append(
            f"{share(report.longer_references, n)} references are longer than "
            f"{window.max_speaker_frames} frames: training takes a part of each at random"
        )
    return found


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON values; what needs a sample is null where there is none."""
    fields = asdict(report)
    lengths = {"seconds": report.frames / report.frame_rate, "text_bytes": report.text_bytes}
    mean, deviation = report.overall if report.samples else (None, None)
    for name in ("frames", "text_bytes", "mean", "deviation", "broken"):
        fields.pop(name)
    return fields | {
        "samples": report.samples,
        "hours": report.hours,
        **{name: summary(values) for name, values in lengths.items()},
        "latent_dim": len(report.mean) or None,
        "mean": mean,
        "deviation": deviation,
        "channels": {"mean": report.mean.tolist(), "deviation": report.deviation.tolist()},
        "kinds": report.kinds,
        "broken": [asdict(record) for record in report.broken],
    }


def summary(values: np.ndarray) -> dict[str, Any] | None:
    if not len(values):
        return None
    counts, edges = histogram(values)
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


def histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts, and one more edges."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.array([len(values)]), np.array([low, high])
    return np.histogram(values, BARS, (low, high))


def bars(values: np.ndarray, digits: int) -> list[str]:
    counts, edges = histogram(values)
    labels = [f"{edge:.{digits}f}" for edge in edges]
    width = max(map(len, labels))
    return [
        f"  {labels[i]:>{width}} - {labels[i + 1]:>{width}}  "
        f"{'#' * -(-BAR_WIDTH * int(count) // int(counts.max())):<{BAR_WIDTH}} {count}"
        for i, count in enumerate(counts)
    ]


def extremes(values: np.ndarray, digits: int) -> str:
    three = (values.min(), np.median(values), values.max())
    low, middle, high = (f"{value:.{digits}f}" for value in three)
    return f"min {low}, median {middle}, max {high}"


def span(values: np.ndarray) -> str:
    return f"{values.min():.4f} to {values.max():.4f}"


def share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")


def plot(report: Report, path: Path) -> None:
    """Lengths and channels as one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (seconds, text), (mean, deviation) = figure.subplots(2, 2)
    seconds.hist(report.frames / report.frame_rate, bins=50)
    seconds.set(xlabel="length (s)", ylabel="samples")
    text.hist(report.text_bytes, bins=50)
    text.set(xlabel="text (bytes)", ylabel="samples")
    channels = np.arange(len(report.mean))
    mean.bar(channels, report.mean)
    mean.set(xlabel="channel", ylabel="mean of the latents")
    deviation.bar(channels, report.deviation)
    deviation.set(xlabel="channel", ylabel="standard deviation of the latents")
    figure.suptitle(f"{report.samples} samples, {report.hours:.2f} hours")
    try:
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    except OSError as error:
        raise EchoError(f"{path} cannot be written: {error.strerror}") from None


# --- One sample ---------------------------------------------------------------------------------


def play(shard_index: ShardIndex, cache: ShardCache, key: str, weights: str, output: Path) -> None:
    """Decode a sample and its reference."""
    sample = find_sample(shard_index, cache, key)
    use_compilation_cache()
    codec = echo_eqx.load_codec(weights)
    width = sample.latents.shape[1]
    if width != codec.config.latent_dim:
        raise EchoError(
            f"{key!r} has latents of {width} channels; the codec decodes {codec.config.latent_dim}"
        )
    rate = codec.config.sample_rate
    parts = [(output, sample.latents)]
    if sample.reference is not None and len(sample.reference):
        parts.append((output.with_stem(f"{output.stem}.ref"), sample.reference))
    for path, latents in parts:
        audio = np.asarray(codec.decode(latents))
        save_audio(path, audio, rate)
        print(f"{path}: {len(audio) / rate:.2f} s")
    print(f"text: {printable(sample.text)}")
