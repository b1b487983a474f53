"""An export as a model on the Hugging Face Hub: its card, and the upload.

Every export has a card, `README.md`. Its front matter follows
https://huggingface.co/docs/hub/model-cards; its body says what a program must know to use the
model: sample rate, latents, text and reference.
"""

import contextlib
import logging
from pathlib import Path

from echo_eqx.config import CODEC_PRESETS, CodecConfig, FishConfig
from echo_eqx.export.folder import LISTING, listed_files, parse_listing
from echo_eqx.export.models import Models
from echo_eqx.generation import ECHO_TTS_CHANNELS
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.codec import PUBLISHED_CODECS
from echo_eqx.trees import num_parameters
from echo_eqx.upload import CARD, Repository, is_same, merged_card, new_card

logger = logging.getLogger(__name__)
_LIBRARIES = {"native": "echo_eqx", "stablehlo": "jax", "mlx": "mlx-audio"}
"""`library_name` of a format, where it is not the format's name."""
_SPEAK = """
```
echo-eqx infer --checkpoint {} --text "Hello."
```
"""


def write_card(
    models: Models,
    folder: Path,
    *,
    form: str,
    dtype: str,
    name: str,
    license: str,
    language: str | None,
) -> None:
    """Write the card of an export of `models` in `form` and `dtype`; `name` is the repository's or
    the folder's."""
    task = "audio-to-audio" if models.dit is None else "text-to-speech"
    language = f"language: {language}\n" if language else ""
    header = f"""\
---
license: {license}
library_name: {_LIBRARIES.get(form, form)}
pipeline_tag: {task}
{language}tags:
- {task}
- audio
- echo_eqx
- {form}
---
"""
    description = _description(models, form, dtype)
    if form == "native" and models.dit is not None:
        description += _SPEAK.format(name)
    (folder / CARD).write_bytes(new_card(header, name.rpartition("/")[2], description))


def push(folder: Path, repo: str) -> None:
    """Upload the export in `folder` to the model `repo`, `owner/name`, in one commit.

    Files that are there already are not sent again. Files of an earlier export that are not part of
    this one are removed; others stay. Of an existing card, only the block between two markers
    changes. A model that does not exist is created, private.

    **Raises**: `EchoError` if `repo` is not such a name, or the Hub cannot be reached or refuses.
    """
    repository = Repository(repo, "model")
    remote = repository.files()
    names = [*listed_files(folder), LISTING]
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    files[CARD] = merged_card(repository.read(CARD), (folder / CARD).read_bytes())
    changed = {name: data for name, data in files.items() if not is_same(remote.get(name), data)}
    removed = sorted((_earlier_files(repository) - files.keys()) & remote.keys())
    if changed or removed:
        repository.commit(changed, "Export from echo_eqx", removed=removed)
    logger.info(f"https://huggingface.co/{repo}: {len(changed)} files sent, {len(removed)} removed")


def _earlier_files(repository: Repository) -> set[str]:
    """Files of the export that is on the Hub now."""
    data = repository.read(LISTING)
    with contextlib.suppress(ValueError):
        return set() if data is None else set(parse_listing(data))
    return set()


def _description(models: Models, form: str, dtype: str) -> str:
    rows = [("format", f"{form}, {dtype}")]
    if models.dit is not None:
        rows += _dit_rows(models.dit)
    if models.codec is not None:
        codec = models.codec
        kind = type(codec).__name__
        rows.append(("codec", f"{kind}, {num_parameters(codec):,} parameters"))
        rows += _codec_rows(codec.config.sample_rate, codec.config.hop, codec.config.latent_dim)
    elif models.dit is not None:
        rows += _named_codec_rows(models.dit)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Model\n\n| | |\n|---|---|\n{table}\n"


def _dit_rows(dit: EchoDiT) -> list[tuple[str, str]]:
    config, generation = dit.config, dit.generation
    lufs = generation.reference_lufs
    level = "its own level" if lufs is None else f"{lufs:g} LUFS"
    return [
        ("model", f"EchoDiT, {num_parameters(dit):,} parameters"),
        ("latents", f"{config.latent_dim} channels, at most {config.max_frames} frames"),
        (
            "text",
            f"byte 0, then UTF-8, at most {config.max_text_bytes} bytes; straight quotes, commas "
            "instead of colons and dashes, a speaker tag [S1] at the start",
        ),
        (
            "reference voice",
            f"latents, at most {config.max_speaker_frames} frames, a multiple of "
            f"{config.patch_size}; the recording at {level}",
        ),
        (
            "sampler",
            f"{generation.sampler.steps} Euler steps from t = 1 (noise) to 0, guidance "
            f"{generation.sampler.cfg_scale:g} for the text and "
            f"{generation.sampler.speaker_scale:g} for the reference",
        ),
    ]


def _named_codec_rows(dit: EchoDiT) -> list[tuple[str, str]]:
    """What is known of the codec that the model's latents are from."""
    name, width = dit.generation.codec, dit.config.latent_dim
    published: dict[int, CodecConfig | FishConfig]
    published = {128: CODEC_PRESETS["48khz"], ECHO_TTS_CHANNELS: FishConfig()}
    if name is None and width in published:
        config = published[width]
        rows = _codec_rows(config.sample_rate, config.hop, config.latent_dim)
        return [("codec", PUBLISHED_CODECS[width]), *rows]
    return [("codec", name)] if name else []


def _codec_rows(sample_rate: int, hop: int, channels: int) -> list[tuple[str, str]]:
    return [
        ("audio", f"{sample_rate:,} Hz, mono, {hop:,} samples a frame"),
        ("codec latents", f"{channels} channels, {sample_rate / hop:g} frames a second"),
    ]
