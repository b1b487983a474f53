"""Report what tar shards of latents contain, and what in them is broken.

    echo-eqx inspect_shards --data shards/
    echo-eqx inspect_shards --data hf://datasets/OWNER/NAME --plot shards.png
    echo-eqx inspect_shards --data shards/ --play KEY --output sample.wav

Every record is read. The exit code is 0 if everything is usable and 1 if something is broken.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import echo_eqx
from echo_eqx.cli import StepBar, parse
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.config import DiTConfig, presets_of_width
from echo_eqx.data.audio import audio_kind, save_audio
from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.shards import ShardIndex, list_shards
from echo_eqx.errors import EchoError, UsageError, optional, printable
from echo_eqx.files import write_whole
from echo_eqx.prepare.inspect import Report, find_sample, inspect_shards
from echo_eqx.prepare.options import model_preset, reference_warning

MAX_LISTED = 20
LENGTHS = ("max_frames", "max_text_bytes", "max_speaker_frames")


@dataclass(frozen=True)
class Args:
    data: str | None = None
    """Tar shards: a folder, a quoted glob, one file, or hf://datasets/owner/name[@revision]."""
    model: str | None = None
    """Model to train on the shards: its preset gives the lengths below, and latents of another
    width are an error."""
    max_frames: int | None = None
    """Longest recording in latent frames; default: the model's, 768."""
    max_text_bytes: int | None = None
    """Longest text in bytes, with its leading byte; default: the model's, 768."""
    max_speaker_frames: int | None = None
    """Longest reference in latent frames; default: the model's, 512."""
    all: bool = False
    """List every broken record, not only the first 20, and every channel."""
    json: bool = False
    """Print the report as one JSON object, with every broken record and every channel."""
    plot: Path | None = None
    """Also plot lengths and channels to this *.png (pip install 'echo_eqx[plots]')."""
    play: str | None = None
    """Instead of a report, decode the sample with this key to --output, and its reference to a
    file *.ref.wav next to it."""
    codec: str = "facebook/dacvae-watermarked"
    """With --play: codec weights. A file, a folder, or a Hub id."""
    output: Path = Path("output.wav")
    """With --play: output file, *.wav or *.flac."""
    cache_dir: Path = Path("~/.cache/echo_eqx/shards")
    """Where shards from the Hub are kept while they are read."""
    cache_gb: float = 200.0
    """Size limit of that folder, in 10^9 bytes."""


def main() -> None:
    args = parse(Args, __doc__)
    check_usage(args)
    assert args.data is not None
    given = {name: getattr(args, name) for name in LENGTHS if getattr(args, name) is not None}
    config = replace(model_preset(args.model), **given)
    shard_index = list_shards(args.data, args.cache_dir)
    cache = ShardCache(args.cache_dir, int(args.cache_gb * 1e9))
    try:
        if args.play is not None:
            return play(shard_index, cache, args.play, args.codec, args.output)
        bar = StepBar("reading shards")
        report = inspect_shards(shard_index, cache, bar)
        bar.close()
    finally:
        cache.close()
    if args.json:
        print(json.dumps(as_json(report, config), indent=2))
    else:
        print("\n".join(as_text(report, config, args.all)))
    if args.plot is not None:
        plot(report, args.plot)
    if args.model is not None and report.samples and len(report.mean) != config.latent_dim:
        width = len(report.mean)
        raise EchoError(
            f"{args.data}: expected latents of {config.latent_dim} channels for --model "
            f"{args.model}, got {width}; {fitting_models(width)}"
        )
    if report.broken or not report.samples:
        raise SystemExit(1)


def fitting_models(width: int) -> str:
    names = presets_of_width(width)
    return f"--model {' or '.join(names)} fits" if names else "no --model has as many"


def check_usage(args: Args) -> None:
    """**Raises**: `UsageError` for flags that cannot work, before anything is read."""
    if args.data is None:
        raise UsageError(
            "--data is missing; expected a folder of tar shards, a glob or hf://datasets/..."
        )
    model_preset(args.model)
    for name in LENGTHS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}: expected at least 1, got {value}")
    if not 0 < args.cache_gb < float("inf"):
        raise UsageError(f"--cache_gb: expected a positive number, got {args.cache_gb}")
    if args.play is not None:
        if args.json or args.plot is not None:
            raise UsageError("--play: expected no --json or --plot, because it makes no report")
        audio_kind(args.output)
    if args.plot is not None:
        if args.plot.suffix.lower() != ".png":
            raise UsageError(f"--plot: expected a *.png, got {args.plot}")
        optional("matplotlib", "plots")


# --- The report ---------------------------------------------------------------------------------


def as_text(report: Report, config: DiTConfig, show_all: bool) -> list[str]:
    """The report as lines of text."""
    n = report.samples
    revision = "" if report.revision is None else f" at {report.revision}"
    by = "" if report.has_frame_rate else ", assumed because no codec.json gives it"
    lines = [
        f"source      {printable(report.source)}{revision}",
        f"shards      {report.shards}",
        f"samples     {n}",
        f"hours       {report.hours:.2f} ({report.frame_rate:g} latent frames per second{by})",
        f"speakers    {report.speakers}, named by {share(report.with_speaker, n)}",
        f"languages   {', '.join(f'{printable(k)} {v}' for k, v in report.languages.items()) or 0}",
        f"references  {share(report.references, n)}",
        f"fit         {share(report.fit(config)['fitting'], n)} in {config.max_frames} frames and "
        f"{config.max_text_bytes} bytes of text",
        *(f"WARNING     {line}" for line in warnings(report, config)),
    ]
    if report.extras:
        extras = ", ".join(f"{printable(suffix)} {n}" for suffix, n in report.extras.items())
        lines.append(f"extras      {extras}: further files of records, not used in training")
    if n:
        mean, std = report.overall
        channels = f"{len(report.mean)} channels ({fitting_models(len(report.mean))})"
        lines += [
            f"latents     {channels}, mean {mean:.4f}, std {std:.4f}",
            f"channels    mean {report.mean.min():.4f} to {report.mean.max():.4f}, "
            f"std {report.std.min():.4f} to {report.std.max():.4f}",
        ]
        if show_all:
            for i, (mean, std) in enumerate(zip(report.mean, report.std, strict=True)):
                lines.append(f"  {i:>4}  mean {mean:>9.4f}  std {std:>9.4f}")
    if report.unseen is None:
        lines.append(f"silence     {report.silence or 'none next to the shards'}")
        index = f"{', '.join(map(printable, report.indexes))}: {report.compared} shards compared"
        lines.append(f"index       {index if report.indexes else 'none next to the shards'}")
    else:
        lines.append(f"next to it  {report.unseen}")
    for name, lengths in summaries(report).items():
        if lengths is not None:
            words = ", ".join(f"{which} {length:.6g}" for which, length in lengths.items())
            lines.append(f"{name.replace('_', ' '):<12}{words}")
    if n:
        pace = f"{report.frames_per_byte:g} frames per byte of text or less"
        lines.append(f"pace        {pace}, in 95 % of the samples")
    kinds = ", ".join(f"{kind} {count}" for kind, count in report.kinds.items())
    lines += ["", f"broken      {len(report.broken)}" + (f" ({kinds})" if kinds else "")]
    listed = report.broken if show_all else report.broken[:MAX_LISTED]
    for record in listed:
        place = " ".join(printable(name) for name in (record.shard, record.key) if name)
        lines.append(f"  {place}: {record.kind}: {printable(record.detail)}")
    if len(listed) < len(report.broken):
        lines.append(f"  ... {len(report.broken) - len(listed)} more (--all)")
    return lines


def warnings(report: Report, config: DiTConfig) -> list[str]:
    """Warnings about training on these shards."""
    n, cut = report.samples, report.fit(config)
    warning = reference_warning(n, report.references)
    found = [] if warning is None else [warning]
    if cut["longer_recordings"]:
        hours = cut["frames_cut"] / report.frame_rate / 3600
        found.append(
            f"{share(cut['longer_recordings'], n)} recordings are longer than {config.max_frames} "
            f"frames: training cuts {hours:.2f} hours of audio and keeps the texts whole; raise "
            "--max_frames, or leave them out with --skip_longer"
        )
    if cut["longer_texts"]:
        found.append(
            f"{share(cut['longer_texts'], n)} texts are longer than {config.max_text_bytes} bytes: "
            "training cuts them; raise --max_text_bytes, or leave them out with --skip_longer"
        )
    if cut["longer_references"]:
        found.append(
            f"{share(cut['longer_references'], n)} references are longer than "
            f"{config.max_speaker_frames} frames: training takes a random crop of each"
        )
    return found


def as_json(report: Report, config: DiTConfig) -> dict[str, Any]:
    """The report as plain JSON values; null if there are no samples to compute it from."""
    fields = asdict(report)
    for name in ("frames", "speaker_frames"):
        fields.pop(name)
    mean, std = report.overall if report.samples else (None, None)
    return {
        **fields,
        **report.fit(config),
        **summaries(report),
        "samples": report.samples,
        "references": report.references,
        "hours": report.hours,
        "frames_per_byte": report.frames_per_byte,
        "latent_dim": len(report.mean) or None,
        "mean": mean,
        "std": std,
        "channels": {"mean": report.mean.tolist(), "std": report.std.tolist()},
        "kinds": report.kinds,
    }


def summaries(report: Report) -> dict[str, dict[str, float] | None]:
    """Shortest, median and longest lengths."""
    lengths = {"seconds": report.frames / report.frame_rate, "text_bytes": report.text_bytes}
    return {
        name: {"min": float(x.min()), "median": float(np.median(x)), "max": float(x.max())}
        if len(x)
        else None
        for name, x in lengths.items()
    }


def share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")


def plot(report: Report, path: Path) -> None:
    """Plot lengths and channels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (seconds, text), channels = figure.subplots(2, 2)
    seconds.hist(report.frames / report.frame_rate, bins=50)
    seconds.set(xlabel="length (s)", ylabel="samples")
    text.hist(report.text_bytes, bins=50)
    text.set(xlabel="text (bytes)", ylabel="samples")
    for axes, name in zip(channels, ("mean", "std"), strict=True):
        values = getattr(report, name)
        axes.bar(np.arange(len(values)), values)
        axes.set(xlabel="channel", ylabel=f"{name} of the latents")
    figure.suptitle(f"{report.samples} samples, {report.hours:.2f} hours")
    try:
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    except OSError as error:
        raise EchoError(f"cannot write {path}: {error.strerror}") from None


# --- One sample ---------------------------------------------------------------------------------


def play(shard_index: ShardIndex, cache: ShardCache, key: str, weights: str, output: Path) -> None:
    """Decode a sample and its reference."""
    sample = find_sample(shard_index, cache, key)
    use_compilation_cache()
    codec = echo_eqx.load_codec(weights)
    width = sample.latents.shape[1]
    if width != codec.config.latent_dim:
        raise EchoError(
            f"{key!r}: expected latents of {codec.config.latent_dim} channels for this codec, got "
            f"{width}"
        )
    rate = codec.config.sample_rate
    parts = [(output, sample.latents)]
    if sample.reference is not None and len(sample.reference):
        parts.append((output.with_stem(f"{output.stem}.ref"), sample.reference))
    for path, latents in parts:
        audio = np.asarray(codec.decode(latents.astype(np.float32)))
        save_audio(path, audio, rate)
        print(f"{path}: {len(audio) / rate:.2f} s")
    print(f"text: {printable(sample.text)}")
