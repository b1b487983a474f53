"""Upload a folder of shards to the Hub: a dataset with a card.

Shards are checked against the SHA-256 in their index before they are sent, and indexes and card
follow in the last commit, so the listing on the Hub is correct at all times. Nothing is written to
the folder, and uploaded files are recognized by their SHA-256, so the same call on any machine
continues an interrupted upload. `HfApi.upload_large_folder` guarantees no order, keeps its state in
the folder and does not know about indexes.
"""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_eqx.data.shards import HOLDOUT
from echo_eqx.errors import EchoError
from echo_eqx.prepare.index import parse_index
from echo_eqx.upload import CARD, Repository, check_repo, is_same, merged_card, new_card

MAX_COMMITS = 100
"""Most commits of shards in one upload: the Hub limits how many there are in an hour."""
_SMALL = re.compile(r"silence\.safetensors|codec\.json|(index|clips-).*\.json")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Dataset:
    """What to upload. Names are relative to the folder.

    Small files are read once, because an index that is updated meanwhile would list other shards.
    """

    shards: dict[str, dict]
    """The index entry of each shard, sorted by name."""
    small_files: dict[str, bytes]
    """Silence, codec, indexes and lists of clips."""
    codec: dict[str, Any]
    """The codec that made the latents, according to the indexes."""


def push(folder: Path, repo: str) -> None:
    """Upload the shards in `folder` and `folder/holdout` to the dataset `repo`, `owner/name`.

    Shards on the Hub with the same SHA-256 are not sent again, so the same call continues an
    interrupted upload. Silence, codec, indexes, lists of clips and the card come last, in one
    commit. Of an existing card, only the block between two markers changes. A dataset that does not
    exist is created, private.

    **Raises**: `EchoError` if `repo` is not such a name, the folder has no shards, a shard differs
    from its index, or the Hub cannot be reached or refuses.
    """
    check_repo(repo, "dataset")
    dataset = _read_dataset(folder)
    repository = Repository(repo, "dataset")
    remote = repository.files()
    total, missing = len(dataset.shards), []
    for number, (name, listed) in enumerate(dataset.shards.items(), 1):
        lfs = remote[name].lfs if name in remote else None
        if lfs is not None and lfs.sha256 == listed["sha256"]:
            logger.info("%s is already there (%d of %d)", name, number, total)
        else:
            missing.append((number, name))
    size = max(1, -(-len(missing) // MAX_COMMITS))
    for batch in (missing[i : i + size] for i in range(0, len(missing), size)):
        for _, name in batch:
            _check_sum(folder / name, dataset.shards[name]["sha256"])
        repository.commit({name: folder / name for _, name in batch}, f"Add {batch[0][1]}")
        for number, name in batch:
            logger.info("%s sent (%d of %d)", name, number, total)
    new = new_card(_HEADER, repo.split("/")[1], _description(repo, dataset))
    files = {**dataset.small_files, CARD: merged_card(repository.read(CARD), new)}
    changed = {name: data for name, data in files.items() if not is_same(remote.get(name), data)}
    if changed:
        repository.commit(changed, "Update index and card")
        logger.info("%s sent", ", ".join(changed))


def _read_dataset(folder: Path) -> _Dataset:
    """**Raises**: `EchoError` if shards and indexes do not fit together."""
    small_files: dict[str, bytes] = {}
    shards: dict[str, dict] = {}
    codecs: list[tuple[dict[str, Any], str]] = []
    found: set[str] = set()
    try:
        for prefix in ("", f"{HOLDOUT}/"):
            if prefix and not (folder / prefix).is_dir():
                continue
            for path in sorted((folder / prefix).iterdir()):
                if not path.is_file() or path.is_symlink():
                    continue
                if path.suffix == ".tar":
                    found.add(prefix + path.name)
                if not _SMALL.fullmatch(path.name):
                    continue
                data = small_files[prefix + path.name] = path.read_bytes()
                if not path.name.startswith("index"):
                    continue
                codec, summaries = _read_index(path, data)
                codecs.append((codec, prefix + path.name))
                for name, listed in summaries.items():
                    known = shards.setdefault(prefix + name, listed)
                    if known["sha256"] != listed["sha256"]:
                        raise EchoError(
                            f"{path.parent / name}: two index*.json list it with different SHA-256"
                        )
    except OSError as error:
        raise EchoError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not found:
        raise EchoError(f"{folder}: expected at least one shard (*.tar), got none")
    if not codecs:
        raise EchoError(f"{folder}: expected an index*.json that lists the shards, got none")
    first, one = codecs[0]
    for other, name in codecs:
        if other != first:
            raise EchoError(
                f"{folder}: expected shards of one codec, but {one} names {first['id']} and {name} "
                f"names {other['id']}"
            )
    for name in sorted(found - shards.keys()):
        raise EchoError(f"{folder / name} is in no index*.json; move it away or list it")
    for name in sorted(shards.keys() - found):
        if shards[name]["samples"]:  # prepare lists a shard without samples, but writes no file
            raise EchoError(f"{folder / name} does not exist, but an index lists it")
    return _Dataset({n: shards[n] for n in sorted(found)}, small_files, first)


def _read_index(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, dict]]:
    """The codec, and the entry of each shard."""
    try:
        index = parse_index(data, ("samples", "frames"))
        if index is None:
            raise ValueError("it is of another kind")
        codec = {name: int(index["codec"][name]) for name in ("sample_rate", "hop", "latent_dim")}
        if min(codec.values()) < 1:
            raise ValueError(f"a size of its codec is {min(codec.values())}")
        return codec | {"id": str(index["codec"]["id"])}, index["shards"]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise EchoError(f"{path}: expected an index of shards: {reason}") from None


def _check_sum(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EchoError(f"{path} cannot be read: {error.strerror}") from None
    if found != sha256:
        raise EchoError(f"{path}: expected SHA-256 {sha256} as in its index, got {found}")


_HEADER = """\
---
# Fill in the license: https://huggingface.co/docs/hub/repositories-licenses
license: other
task_categories:
- text-to-speech
tags:
- audio
- webdataset
- dacvae
- echo_eqx
configs:
- config_name: default
  data_files:
  - split: train
    path: "*.tar"
---
"""


def _description(repo: str, dataset: _Dataset) -> str:
    rate, hop, width = (dataset.codec[x] for x in ("sample_rate", "hop", "latent_dim"))
    shards = [listed for name, listed in dataset.shards.items() if "/" not in name]
    samples, frames = (sum(listed[x] for listed in shards) for x in ("samples", "frames"))
    hours = frames * hop / rate / 3600
    extra = ""
    if count := sum(listed["samples"] for listed in dataset.shards.values()) - samples:
        extra += f"\n`{HOLDOUT}/` holds {count:,} more samples to evaluate on."
    if "silence.safetensors" in dataset.small_files:
        extra += "\n`silence.safetensors` holds latents of digital silence by the same codec."
    return f"""\
## Shards

{hours:,.2f} hours of speech as latents: {samples:,} samples in {len(shards):,} WebDataset shards. \
Each sample has

| file | content |
|---|---|
| `KEY.npy` | latents, float16 (frames, {width}), {rate / hop:g} frames a second |
| `KEY.ref.npy` | latents of other speech by the same speaker, float16 \
(frames, {width}); not every sample has them |
| `KEY.json` | `text`, and what else is known of the recording |

The latents are from the codec `{dataset.codec["id"]}`: {rate:,} Hz, {hop:,} audio samples \
a frame, {width} channels.{extra}
`index*.json` list SHA-256, samples and frames of each shard.

Train on them with echo_eqx:

```
echo-eqx train --data hf://datasets/{repo}
```
"""
