"""Counts of what a data loader skips, truncates or leaves out, with an example of each."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from echo_eqx.data.records import BrokenRecord
from echo_eqx.data.sample_stream import ReadResult
from echo_eqx.data.shards import Shard
from echo_eqx.data.tar_index import Skipped
from echo_eqx.errors import EchoError, printable

MIN_SEEN = 100
"""Records read before the fraction of broken ones is checked."""
_NAMES = {
    "broken_records": "{} broken records skipped",
    "skipped_members": "{} shard members that belong to no record",
    "left_out": "{} samples left out because they are too long",
    "cut_recordings": "{} recordings cut to --max_frames, their texts whole",
    "cut_texts": "{} texts cut to --max_text_bytes",
    "cropped_references": "{} references cropped at random",
}


def describe_counts(counts: Mapping[str, int]) -> str:
    """Counts as words, such as "3 broken records skipped"; empty if nothing was counted."""
    return "; ".join(name.format(counts[key]) for key, name in _NAMES.items() if counts.get(key))


class RecordLog:
    """Counts since this process started, also of prefetched records that are not used yet.

    `broken` counts broken records by kind, and `seen` all records read. `examples` has, for each
    counter, a sentence about its first case, in order of appearance.
    """

    def __init__(self, source: str, max_broken: float, path: Path | None):
        """More than a fraction `max_broken` of broken records in `source` is an error. They, and
        members that belong to no record, are listed once each in `path`, a JSON lines file."""
        self.broken: Counter[str] = Counter()
        self.seen = 0
        self.examples: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._source, self._max_broken, self._path = source, max_broken, path
        self._listed = _read_log(path)
        self._indexed: set[str] = set()

    @property
    def counts(self) -> dict[str, int]:
        """Counts by name in `metrics.jsonl`; zeros are left out, except for broken records."""
        return {"broken_records": self.broken.total(), **self._counts}

    def count(self, name: str, sentence: str) -> None:
        self._counts[name] += 1
        self.examples.setdefault(name, sentence)

    def add(self, read: ReadResult) -> None:
        """Count a record.

        **Raises**: `EchoError` if too many are broken, or the list cannot be written.
        """
        self.seen += 1
        if isinstance(read.result, BrokenRecord):
            broken = read.result
            self.broken[broken.kind] += 1
            sentence = f"skipped broken record {read.shard.name}:{read.key}: {broken.detail}"
            self.examples.setdefault("broken_records", printable(sentence))
            self._list(read.shard, read.key, broken.kind, broken.detail)
        total, examples = self.broken.total(), self.examples
        if self.seen >= MIN_SEEN and total > self._max_broken * self.seen:
            kinds = ", ".join(f"{kind} {count}" for kind, count in self.broken.most_common())
            raise EchoError(
                f"expected at most {self._max_broken:.1%} broken records (--max_broken), got "
                f"{total} of {self.seen} ({kinds}); the first: {examples['broken_records']}"
            )

    def add_skipped(self, shard: Shard, members: list[Skipped]) -> None:
        """Count the members of a shard that belong to no record, once per shard.

        **Raises**: `EchoError` if there are many and no record was seen yet, or the list cannot be
        written.
        """
        members = [member for member in members if member.kind != "extra"]
        if not members or shard.name in self._indexed:
            return
        self._indexed.add(shard.name)
        self._counts["skipped_members"] += len(members)
        sentence = (
            f"skipped {len(members)} members of {shard.name} that belong to no record, such as "
            f"{members[0].name[:100]}: {members[0].detail}"
        )
        self.examples.setdefault("skipped_members", printable(sentence))
        for member in members:
            self._list(shard, member.name, member.kind, member.detail)
        many = self._counts["skipped_members"] >= MIN_SEEN and self._max_broken < 1
        if self.seen == 0 and many:
            raise EchoError(self.nothing_used("the shards read so far have no record"))

    def nothing_used(self, what: str) -> str:
        """Why there is nothing to train on, with counts and examples."""
        reasons = {**self._counts, "broken_records": self.broken.total()}
        for used in ("cut_recordings", "cut_texts", "cropped_references"):
            reasons.pop(used, None)
        counted = describe_counts(reasons) or "the shards are empty"
        examples = "".join(f"; {sentence}" for sentence in self.examples.values())
        return (
            f"{printable(self._source)}: {what}: {counted}{examples}; "
            "`echo-eqx inspect_shards` lists them all"
        )

    def _list(self, shard: Shard, key: str, kind: str, detail: str) -> None:
        if self._path is None or (shard.name, key) in self._listed:
            return
        self._listed.add((shard.name, key))
        fields = {"shard": shard.name, "key": key, "kind": kind, "detail": detail}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(fields) + "\n")
        except OSError as error:
            raise EchoError(f"cannot write {self._path}: {error.strerror}") from None


def _read_log(path: Path | None) -> set[tuple[str, str]]:
    """The records that earlier launches listed."""
    listed = set()
    if path is not None and path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                fields = json.loads(line)
                listed.add((fields["shard"], fields["key"]))
            except (ValueError, KeyError, TypeError, RecursionError):  # a line cut off by a kill
                continue
    return listed
