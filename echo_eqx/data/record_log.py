"""What a stream of samples skips, cuts or leaves out: counted, and named where that helps."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from echo_eqx.data.lanes import Drawn
from echo_eqx.data.records import BrokenRecord
from echo_eqx.data.shard_index import Skipped
from echo_eqx.data.shards import Shard
from echo_eqx.errors import EchoError, printable

ENOUGH_SEEN = 100
"""Records after which the share of broken ones says something."""
_NAMES = {
    "broken_records": "{} broken records skipped",
    "skipped_members": "{} members of shards in no record",
    "left_out": "{} samples longer than the window left out",
    "cut_recordings": "{} recordings cut at the window, their texts whole",
    "cut_texts": "{} texts cut at the window",
    "cropped_references": "{} references cropped at random",
}


def describe(counts: Mapping[str, int]) -> str:
    """Counts as words, such as "3 broken records skipped"; empty where nothing was counted."""
    return "; ".join(name.format(counts[key]) for key, name in _NAMES.items() if counts.get(key))


class RecordLog:
    """Counts since the start of this process; they run ahead of the batches handed out.

    `broken` has the broken records by kind, `seen` is the number of all that were read. `first` has
    a sentence on the first case of everything that is counted, in the order they came.
    """

    def __init__(self, source: str, max_broken: float, path: Path | None):
        """More than `max_broken` of the records of `source` broken is an error. Broken records and
        members in no record are listed in `path`, a file of JSON lines, each once."""
        self.broken: Counter[str] = Counter()
        self.seen = 0
        self.first: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._source, self._max_broken, self._path = source, max_broken, path
        self._listed = _read_log(path)
        self._indexed: set[str] = set()

    @property
    def counts(self) -> dict[str, int]:
        """By the names they have in `metrics.jsonl`; what has not happened is left out, apart from
        broken records."""
        return {"broken_records": self.broken.total(), **self._counts}

    def count(self, name: str, sentence: str) -> None:
        self._counts[name] += 1
        self.first.setdefault(name, sentence)

    def add(self, drawn: Drawn) -> None:
        """Count a record.

        **Raises**: `EchoError` if too many are broken, or the list cannot be written.
        """
        self.seen += 1
        if isinstance(drawn.result, BrokenRecord):
            broken = drawn.result
            self.broken[broken.kind] += 1
            name = f"{drawn.shard.name}:{drawn.key}"
            sentence = f"{name} is broken and is skipped: {broken.detail}"
            self.first.setdefault("broken_records", printable(sentence))
            self._list(drawn.shard, drawn.key, broken.kind, broken.detail)
        total = self.broken.total()
        if self.seen >= ENOUGH_SEEN and total > self._max_broken * self.seen:
            raise EchoError(
                f"{total} of {self.seen} records are broken ({self._kinds()}); wanted at most "
                f"{self._max_broken:.1%} (--max_broken); the first: {self.first['broken_records']}"
            )

    def add_skipped(self, shard: Shard, members: list[Skipped]) -> None:
        """Count the members of a shard that are in no record, once for each shard.

        **Raises**: `EchoError` if there are many and no record was seen yet, or the list cannot be
        written.
        """
        members = [member for member in members if member.kind != "extra"]
        if not members or shard.name in self._indexed:
            return
        self._indexed.add(shard.name)
        self._counts["skipped_members"] += len(members)
        sentence = (
            f"{len(members)} members of {shard.name} are in no record and are not used, such as "
            f"{members[0].name[:100]}: {members[0].detail}"
        )
        self.first.setdefault("skipped_members", printable(sentence))
        for member in members:
            self._list(shard, member.name, member.kind, member.detail)
        many = self._counts["skipped_members"] >= ENOUGH_SEEN and self._max_broken < 1
        if self.seen == 0 and many:
            raise EchoError(self.nothing_used("shards read so far have no record"))

    def nothing_used(self, what: str) -> str:
        """Why there is nothing to train on, with counts and first cases."""
        reasons = {**self._counts, "broken_records": self.broken.total()}
        for used in ("cut_recordings", "cut_texts", "cropped_references"):
            reasons.pop(used, None)
        first = "".join(f"; {sentence}" for sentence in self.first.values())
        return (
            f"{printable(self._source)}: {what}: {describe(reasons) or 'the shards are empty'}"
            f"{first}; scripts/inspect_shards.py lists all"
        )

    def _kinds(self) -> str:
        return ", ".join(f"{kind} {count}" for kind, count in self.broken.most_common())

    def _list(self, shard: Shard, key: str, kind: str, detail: str) -> None:
        if self._path is None or (shard.name, key) in self._listed:
            return
        self._listed.add((shard.name, key))
        fields = {"shard": shard.name, "key": key, "kind": kind, "detail": detail}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(fields) + "\n")
        except OSError as error:
            raise EchoError(f"{self._path} cannot be written: {error.strerror}") from None


def _read_log(path: Path | None) -> set[tuple[str, str]]:
    """What an earlier start has listed, so that it is not listed twice."""
    listed = set()
    if path is not None and path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                fields = json.loads(line)
                listed.add((fields["shard"], fields["key"]))
            except (ValueError, KeyError, TypeError, RecursionError):  # a line cut by a kill
                continue
    return listed
