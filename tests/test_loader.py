"""The data loader: order of samples, truncation and padding, broken records."""

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save_file
from shards import DataServer, make_dataset, npy_bytes, sample_parts, sha256, write_shard

from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.loader import (
    DataLoader,
    LoadedBatch,
    SequenceLengths,
    choose_num_streams,
    first_width,
)
from echo_eqx.data.records import (
    MAX_JSON,
    BrokenRecord,
    load_silence,
    read_sample,
)
from echo_eqx.data.shards import Shard, ShardIndex, list_shards
from echo_eqx.data.tar_index import index_tar
from echo_eqx.errors import EchoError, UsageError

WIDTH = 8
LENGTHS = SequenceLengths(
    WIDTH, max_frames=24, max_text_bytes=31, max_speaker_frames=20, patch_size=4
)
SILENCE = np.linspace(1.0, 2.0, 5 * WIDTH, dtype=np.float32).reshape(5, WIDTH)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("data")
    return list_shards(str(make_dataset(folder, shards=10, per_shard=5)), folder)


@pytest.fixture
def opened(tmp_path):
    """A factory of loaders that are closed after the test."""
    streams = []

    def open_stream(shard_index: ShardIndex, **settings) -> DataLoader:
        settings = {"batch_size": 16, "seed": 1, "num_streams": 8, **settings}
        settings.setdefault("streams", range(settings["num_streams"]))
        settings.setdefault("cache", ShardCache(tmp_path / "cache", 10**9))
        silence = settings.pop("silence", SILENCE)
        streams.append(DataLoader(shard_index, LENGTHS, silence, **settings))
        return streams[-1]

    yield open_stream
    for stream in streams:
        stream.close()


def take(stream: DataLoader, count: int) -> list[LoadedBatch]:
    return list(itertools.islice(stream, count))


def same_step(a: LoadedBatch, b: LoadedBatch) -> bool:
    pairs = zip(a.batch, b.batch, strict=True)
    same = all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)
    return same and a.keys == b.keys and a.cursor == b.cursor


def merged(steps: list[LoadedBatch]) -> LoadedBatch:
    """The global batch from those of the hosts, in the order of their streams."""
    batch = type(steps[0].batch)(*map(np.concatenate, zip(*(s.batch for s in steps), strict=True)))
    cursor = {stream: place for step in steps for stream, place in step.cursor.items()}
    return LoadedBatch(batch, [key for step in steps for key in step.keys], cursor)


def on_hosts(
    opened, shard_index: ShardIndex, hosts: int, count: int, **settings
) -> list[LoadedBatch]:
    share = 8 // hosts
    streams = [range(host * share, (host + 1) * share) for host in range(hosts)]
    streams = [take(opened(shard_index, streams=own, **settings), count) for own in streams]
    return [merged(list(steps)) for steps in zip(*streams, strict=True)]


def test_any_number_of_hosts_sees_the_same_batches(dataset, opened):
    alone = on_hosts(opened, dataset, 1, 6)
    for hosts in (2, 8):
        assert all(map(same_step, alone, on_hosts(opened, dataset, hosts, 6)))
    # One host may resume where others stopped.
    cursor = json.loads(json.dumps(on_hosts(opened, dataset, 2, 3)[-1].cursor))
    for hosts in (1, 2, 8):
        assert all(map(same_step, alone[3:], on_hosts(opened, dataset, hosts, 3, cursor=cursor)))


def test_resuming_from_any_cursor_gives_the_same_bytes(dataset, opened):
    """Streams have 5 or 10 records here, so most of these positions are in different epochs."""
    straight = take(opened(dataset), 12)
    epochs = {place[0] for step in straight for place in step.cursor.values()}
    assert epochs == {0, 1, 2, 3, 4}
    for position in (1, 2, 4, 5, 9):
        resumed = take(opened(dataset, cursor=straight[position - 1].cursor), 3)
        assert all(map(same_step, straight[position:], resumed))


def test_every_sample_occurs_once_per_epoch(dataset, opened):
    stream = opened(dataset, batch_size=4, num_streams=2)
    steps = take(stream, 25)
    by_stream = [[key for step in steps for key in step.keys[n : n + 2]] for n in (0, 2)]
    first, second = ([stream[:25], stream[25:]] for stream in by_stream)
    everything = set(samples_of(dataset))
    assert set(first[0]) | set(second[0]) == everything and len(everything) == 50
    for stream in (first, second):
        assert len(set(stream[0])) == 25 and set(stream[0]) == set(stream[1])
        assert stream[0] != stream[1]
        shards = [[key.split(":")[0] for key in epoch] for epoch in stream]
        assert all(len(list(itertools.groupby(epoch))) == 5 for epoch in shards)


def test_the_order_depends_only_on_the_seed(dataset, opened):
    keys = [take(opened(dataset, seed=seed), 1)[0].keys for seed in (1, 2, 1)]
    assert keys[0] == keys[2] != keys[1]
    # This must not change, because older runs may have to be resumed.
    assert take(opened(dataset, seed=7), 1)[0].keys[:4] == [
        "00009.tar:part/009_0002",
        "00009.tar:part/009_0003",
        "00007.tar:part/007_0003",
        "00007.tar:part/007_0001",
    ]


def samples_of(shard_index: ShardIndex) -> dict[str, tuple[np.ndarray, np.ndarray | None, str]]:
    """The content of the shards, read with only tarfile and NumPy."""
    found = {}
    for shard in shard_index.shards:
        assert shard.path is not None
        with tarfile.open(shard.path) as tar:
            files = {m.name: part.read() for m in tar if (part := tar.extractfile(m))}
        for name in files:
            key, _, extension = name.partition(".")
            if extension == "npy":
                reference = files.get(f"{key}.ref.npy")
                found[f"{shard.name}:{key}"] = (
                    np.load(io.BytesIO(files[name])).astype(np.float32),
                    None
                    if reference is None
                    else np.load(io.BytesIO(reference)).astype(np.float32),
                    json.loads(files[f"{key}.json"])["text"],
                )
    return found


def test_rows_are_truncated_and_padded_samples(dataset, opened):
    samples = samples_of(dataset)
    crops = Counter()
    for step in take(opened(dataset), 12):
        rows = zip(step.keys, *step.batch, strict=True)
        for key, latents, frame_mask, text_ids, text_mask, speaker, speaker_mask in rows:
            recording, reference, text = samples[key]
            frames = min(len(recording), 24)
            assert np.array_equal(latents[:frames], recording[:frames])
            padding = [SILENCE[min(i, 4)] for i in range(24 - frames)]
            assert np.array_equal(latents[frames:], np.reshape(padding, (-1, WIDTH)))
            assert frame_mask.tolist() == [True] * frames + [False] * (24 - frames)
            coded = (b"\0" + text.encode())[:31]
            assert bytes(text_ids[text_mask].astype(np.uint8)) == coded
            assert text_mask[: len(coded)].all() and not text_ids[len(coded) :].any()
            length = int(speaker_mask.sum())
            have = 0 if reference is None else len(reference)
            assert length == min(have, 20) // 4 * 4 and speaker_mask[:length].all()
            assert not speaker[length:].any()
            if reference is not None and length:
                windows = [reference[i : i + length] for i in range(have - length + 1)]
                starts = [i for i, w in enumerate(windows) if np.array_equal(w, speaker[:length])]
                assert len(starts) == 1 and (have > 20 or starts == [0])
                crops[have > 20 and starts[0]] += 1
    assert len(crops) > 10, "the crop of a long reference should move"
    batch = take(opened(dataset), 1)[0].batch
    kinds = [(x.dtype.name, x.shape) for x in batch]
    assert kinds == [
        ("float32", (16, 24, WIDTH)),
        ("bool", (16, 24)),
        ("int32", (16, 31)),
        ("bool", (16, 31)),
        ("float32", (16, 20, WIDTH)),
        ("bool", (16, 20)),
    ]


def test_every_float16_value_is_widened_exactly(tmp_path):
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, WIDTH)
    rng = np.random.default_rng(0)
    parts = sample_parts(rng, 3, WIDTH)
    wide = np.asfortranarray(rng.standard_normal((5, WIDTH)).astype(np.float32))
    samples = [("a", {**parts, "npy": npy_bytes(halves)}), ("b", {**parts, "npy": npy_bytes(wide)})]
    path = write_shard(tmp_path / "a.tar", samples)
    with path.open("rb") as file:
        a, b = (read_sample(file.fileno(), entry, WIDTH) for entry in index_tar(path))
    assert a.latents.tobytes() == halves.tobytes() and a.latents.dtype == np.float16
    assert b.latents.tobytes() == np.ascontiguousarray(wide).tobytes()
    assert b.latents.dtype == np.float32 and a.reference is b.reference is None


def test_batches_are_float16_until_a_float32_recording_is_read(tmp_path, opened):
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((5, WIDTH)).astype(np.float32)
    samples = [(str(i), sample_parts(rng, 3, WIDTH)) for i in range(8)]
    write_shard(tmp_path / "0.tar", samples[:4])
    write_shard(tmp_path / "1.tar", samples[4:])
    options = {"silence": np.zeros((1, WIDTH), np.float32), "batch_size": 2, "num_streams": 2}
    assert next(opened(list_shards(str(tmp_path), tmp_path), **options)).batch.latents.dtype == "f2"
    samples.append(("wide", {**samples[0][1], "npy": npy_bytes(wide)}))
    write_shard(tmp_path / "1.tar", samples[4:])
    loader = opened(list_shards(str(tmp_path), tmp_path), **options)
    batches = [next(loader) for _ in range(10)]
    dtypes = [batch.batch.latents.dtype.name for batch in batches]
    first = dtypes.index("float32")
    assert set(dtypes[:first]) <= {"float16"} and set(dtypes[first:]) == {"float32"}
    row = next(i for i, key in enumerate(batches[first].keys) if key.endswith(":wide"))
    np.testing.assert_array_equal(batches[first].batch.latents[row, :5], wide)


def test_json_may_start_with_a_byte_order_mark(tmp_path):
    parts = sample_parts(np.random.default_rng(0), 3, WIDTH)
    marked = {**parts, "json": b"\xef\xbb\xbf" + parts["json"]}
    path = write_shard(tmp_path / "a.tar", [("a", marked)])
    with path.open("rb") as file:
        assert read_sample(file.fileno(), index_tar(path)[0], WIDTH).text == "Hello."


def header(shape: str, descr: str = "'<f2'", values: bytes = bytes(48)) -> bytes:
    """A .npy with an arbitrary header."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + values


def broken_samples() -> dict[str, tuple[str, dict[str, bytes]]]:
    good = sample_parts(np.random.default_rng(0), 3, WIDTH, reference=8)
    bad = np.zeros((3, WIDTH), np.float16)
    bad[2, 1] = np.nan
    endless = np.full((3, WIDTH), np.inf, np.float32)
    npy = {
        "dtype": {
            "integer": npy_bytes(np.zeros((3, WIDTH), np.int16)),
            "double": npy_bytes(np.zeros((3, WIDTH))),
            "swapped": npy_bytes(np.zeros((3, WIDTH), ">f2")),
            "object": header(f"(3, {WIDTH})", "'|O'"),
            "fields": header(f"(3, {WIDTH})", "[('a', '<f2')]"),
        },
        "shape": {
            "rank": npy_bytes(np.zeros((3, WIDTH, 1), np.float16)),
            "width": npy_bytes(np.zeros((3, WIDTH + 1), np.float16)),
            "none": npy_bytes(np.zeros((0, WIDTH), np.float16)),
            "cut": npy_bytes(np.zeros((3, WIDTH), np.float16))[:-2],
            "absurd": header(f"({10**15}, {WIDTH})"),
            "negative": header(f"(-3, {WIDTH})"),
            "nested": header("(" * 3000 + ")" * 3000),
            "words": header("__import__('os')"),
            "long": header(f"(0x{'f' * 9000}, {WIDTH})"),
            "unary": header("-" * 9000 + "1"),
            "wide": header(f"(3, {10**300})"),
            "empty": b"",
            "noise": bytes(range(200)),
        },
        "nan": {"nan": npy_bytes(bad), "inf": npy_bytes(endless)},
    }
    texts = {
        "json": {
            "no": b"",
            "digits": b'{"text": ' + b"1" * 5000 + b"}",
            "cut": b'{"text": "a',
            "list": b'["a"]',
            "deep": b"[" * 10**5,
        },
        "size": {"lists": b'{"a": [' + b"[]," * (MAX_JSON // 3) + b'[]], "text": "a"}'},
        "text": {"missing": b"{}", "number": b'{"text": 5}', "blank": b'{"text": " \\n"}'},
        "utf8": {"bytes": b'{"text": "\xff"}', "half": b'{"text": "\\ud800"}'},
    }
    broken = {}
    for kind, cases in npy.items():
        for name, data in cases.items():
            broken[f"{kind}-{name}"] = (kind, {**good, "npy": data})
    for kind, cases in texts.items():
        for name, data in cases.items():
            broken[f"{kind}-{name}"] = (kind, {**good, "json": data})
    broken["nan-reference"] = ("nan", {**good, "ref.npy": npy_bytes(bad)})
    broken["missing-npy"] = ("missing", {"json": good["json"], "ref.npy": good["ref.npy"]})
    broken["missing-json"] = ("missing", {"npy": good["npy"], "flac": b"sound"})
    return broken


BROKEN = broken_samples()


def test_each_kind_of_broken_record_is_skipped_counted_and_listed(tmp_path, opened):
    rng = np.random.default_rng(1)
    good = [(f"good{n}", sample_parts(rng, 4, WIDTH)) for n in range(3)]
    mixed = [*((key, parts) for key, (_, parts) in BROKEN.items()), *good]
    write_shard(tmp_path / "data" / "a.tar", mixed)
    shard_index, log = list_shards(str(tmp_path / "data"), tmp_path), tmp_path / "broken.jsonl"
    for _ in range(2):  # a second run adds nothing to the log
        stream = opened(shard_index, num_streams=1, batch_size=3, max_broken=1.0, broken_log=log)
        steps = take(stream, 3)
        stream.close()
        assert all(
            sorted(step.keys) == ["a.tar:good0", "a.tar:good1", "a.tar:good2"] for step in steps
        )
        kinds = Counter(kind for kind, _ in BROKEN.values())
        assert all(stream.log.broken[kind] >= 3 * count for kind, count in kinds.items())
        assert set(stream.log.broken) == set(kinds)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert {line["key"]: line["kind"] for line in lines} == {k: v[0] for k, v in BROKEN.items()}
        assert len(lines) == len(BROKEN)
        assert all(line["shard"] == "a.tar" and 3 < len(line["detail"]) < 300 for line in lines)


def test_too_many_broken_records_stop_the_run(tmp_path, opened):
    rng = np.random.default_rng(0)
    for shard in range(2):
        records = [(f"k{n}", sample_parts(rng, 3, WIDTH)) for n in range(60)]
        records[9] = ("bad", BROKEN["nan-nan"][1])
        write_shard(tmp_path / "data" / f"{shard}.tar", records)
    shard_index = list_shards(str(tmp_path / "data"), tmp_path)
    with pytest.raises(EchoError) as caught:
        take(opened(shard_index, num_streams=2, batch_size=10), 30)
    assert "at most 1.0% broken records (--max_broken), got 2 of" in str(caught.value)
    stream = opened(shard_index, num_streams=2, batch_size=10, max_broken=0.05)
    assert len(take(stream, 30)) == 30 and stream.log.seen >= 300


def test_a_stream_without_usable_records_stops_the_run(tmp_path, opened):
    data = make_dataset(tmp_path / "data", shards=2, per_shard=3)
    write_shard(data / "empty.tar", [])
    write_shard(data / "nothing.tar", [(f"k{n}", BROKEN["nan-nan"][1]) for n in range(4)])
    shard_index = list_shards(str(data), tmp_path)
    with pytest.raises(EchoError, match="usable record"):
        take(opened(shard_index, num_streams=4, batch_size=4), 3)
    # Among other shards they are skipped, and a cursor that points into them is valid.
    straight = take(opened(shard_index, num_streams=1, batch_size=1), 20)
    for position in range(1, 15):
        cursor = straight[position - 1].cursor
        resumed = take(opened(shard_index, num_streams=1, batch_size=1, cursor=cursor), 3)
        assert all(map(same_step, straight[position:], resumed))


def damaged(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    last = members[-1]
    if damage == "cut in a record":
        del data[last.offset_data + last.size // 2 :]
    elif damage == "cut in a header":
        del data[last.offset + 100 :]
    elif damage == "bad header":
        data[members[-2].offset + 20] ^= 255
    elif damage == "zeros in the middle":
        data[members[-2].offset : members[-2].offset + 512] = bytes(512)
    elif damage == "negative size":
        header = tarfile.TarInfo("k.npy")
        header.size = -(10**6)
        data[members[-2].offset : members[-2].offset + 512] = header.tobuf(tarfile.GNU_FORMAT)
    elif damage == "absurd size":
        header = tarfile.TarInfo("k.npy")
        header.size = 10**15
        data[members[-2].offset : members[-2].offset + 512] = header.tobuf(tarfile.GNU_FORMAT)
    elif damage == "compressed":
        data[:2] = b"\x1f\x8b"
    elif damage == "empty":
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        ("", 4),
        ("cut in a record", 4),
        ("cut in a header", 4),
        ("bad header", 3),
        ("zeros in the middle", 3),
        ("negative size", 3),
        ("absurd size", 3),
        ("compressed", 0),
        ("empty", 0),
    ],
)
def test_a_damaged_tar_gives_the_records_before_the_damage(tmp_path, opened, damage, left):
    rng = np.random.default_rng(0)
    parts = [(f"k{n}", sample_parts(rng, 40, WIDTH)) for n in range(4)]
    path = write_shard(tmp_path / "data" / "a.tar", parts)
    damaged(path, damage)
    entries = index_tar(path)
    broken = [entry for entry in entries if entry.damage is not None]
    assert len(broken) == (damage != "") and entries[-1:] * len(broken) == broken
    assert [entry.key for entry in entries if entry.damage is None] == [
        f"k{n}" for n in range(left)
    ]
    if not broken:
        return
    with path.open("rb") as file, pytest.raises(BrokenRecord) as caught:
        read_sample(file.fileno(), broken[0], WIDTH)
    assert caught.value.kind == "tar" and caught.value.detail
    write_shard(tmp_path / "data" / "b.tar", parts)
    shard_index = list_shards(str(tmp_path / "data"), tmp_path)
    stream = opened(shard_index, num_streams=1, batch_size=4, max_broken=1.0)
    take(stream, 8)
    assert stream.log.broken["tar"] >= 2


def test_truncated_samples_are_counted_and_reported(dataset, opened):
    samples = samples_of(dataset)
    stream = opened(dataset)
    expected = Counter()
    for step in take(stream, 6):
        for key in step.keys:
            recording, reference, text = samples[key]
            expected["cut_recordings"] += len(recording) > 24
            expected["cut_texts"] += len(text.encode()) + 1 > 31
            expected["cropped_references"] += reference is not None and len(reference) > 20
        assert step.counts == {**expected, "broken_records": 0}
    assert min(expected.values()) > 0
    assert set(stream.examples) == set(expected)
    assert "its text stays whole" in stream.examples["cut_recordings"]
    assert "24" in stream.examples["cut_recordings"] and "31" in stream.examples["cut_texts"]


def test_longer_samples_are_skipped_on_request(tmp_path, opened):
    rng = np.random.default_rng(0)
    kept = {"fits": (24, "x" * 30)}
    others = {"long": (25, "x"), "wordy": (3, "x" * 31)}
    records = [
        (key, sample_parts(rng, frames, WIDTH, 30, text))
        for key, (frames, text) in (kept | others).items()
    ]
    write_shard(tmp_path / "data" / "a.tar", records)
    shard_index = list_shards(str(tmp_path / "data"), tmp_path)
    settings = {"num_streams": 1, "batch_size": 1, "skip_longer": True}
    steps = take(opened(shard_index, **settings), 5)
    assert [step.keys for step in steps] == [["a.tar:fits"]] * 5
    assert steps[-1].counts["left_out"] >= 8 and "cut_recordings" not in steps[-1].counts
    write_shard(tmp_path / "data" / "a.tar", records[1:])
    with pytest.raises(EchoError, match="usable record: 2 samples left out"):
        take(opened(list_shards(str(tmp_path / "data"), tmp_path), **settings), 1)


def test_members_that_belong_to_no_record_are_counted_once_and_listed(tmp_path, opened):
    data = make_dataset(tmp_path / "data", shards=2, per_shard=3)
    write_shard(data / "b.tar", [("good", sample_parts(np.random.default_rng(0), 3, WIDTH))])
    with tarfile.open(data / "b.tar", "a") as tar:
        for name in ("READ\x1bME", "a\x1b.b.npy"):
            tar.addfile(tarfile.TarInfo(name))
    log = tmp_path / "broken.jsonl"
    stream = opened(list_shards(str(data), tmp_path), num_streams=1, batch_size=7, broken_log=log)
    assert take(stream, 6)[-1].counts["skipped_members"] == 2
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((line["shard"], line["key"], line["kind"]) for line in lines) == [
        ("b.tar", "READ\x1bME", "member"),
        ("b.tar", "a\x1b.b.npy", "member"),
    ]
    sentence = stream.examples["skipped_members"]
    assert (
        "2 members of b.tar that belong to no record" in sentence
        and "such as a\\x1b.b.npy" in sentence
    )


def test_a_run_without_any_records_stops_immediately(tmp_path, opened):
    data = tmp_path / "data"
    for shard in range(3):
        write_shard(data / f"{shard}.tar", [(f"k{n}", {"npz": b"", "txt": b""}) for n in range(60)])
    shard_index = list_shards(str(data), tmp_path)
    stream = opened(shard_index, num_streams=1, batch_size=1)
    with pytest.raises(EchoError) as caught:
        take(stream, 1)
    message = str(caught.value)
    assert "have no record: 120 shard members that belong to no record" in message
    assert "k0.npz: expected KEY.npy, KEY.ref.npy or KEY.json" in message
    # With fewer such members, all shards are read once.
    for shard in range(3):
        write_shard(data / f"{shard}.tar", [("k", {"npz": b""})])
    with pytest.raises(EchoError, match=r"none of the 3 shards .* usable record: 3 shard mem"):
        take(opened(list_shards(str(data), tmp_path), num_streams=1, batch_size=1), 1)


def test_background_errors_are_raised_while_iterating(tmp_path, opened):
    data = make_dataset(tmp_path / "data", shards=2)
    shard_index = list_shards(str(data), tmp_path)
    (data / "00001.tar").unlink()
    stream = opened(shard_index, num_streams=1, batch_size=4)
    for _ in range(2):
        with pytest.raises(EchoError, match=r"cannot open .*00001.tar: No such file"):
            take(stream, 9)
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize(
    ("cursor", "message"),
    [
        ({"0": [0, 0, 0]}, "expected streams 0 to 1, got 0"),
        ({str(n): [0, 0, 0] for n in range(4)}, "expected streams 0 to 1, got 0, 1, 2, 3"),
        ({"0": [0, 0, 0], "1": [0, 5, 0]}, "stream 1: expected a shard below 5, got 5"),
        ({"0": [0, 0, 0], "1": [0, 4, 99]}, "stream 1: expected a record below 5 in shard"),
        ({"0": [0, -1, 0], "1": [0, 0, 0]}, "expected [epoch, shard, record], got"),
        ({"0": [0, 0], "1": [0, 0, 0]}, "expected [epoch, shard, record], got"),
    ],
)
def test_a_cursor_that_does_not_fit_is_rejected(dataset, opened, cursor, message):
    with pytest.raises(EchoError) as caught:
        take(opened(dataset, num_streams=2, cursor=cursor), 1)
    assert message in str(caught.value)


def test_streams_divide_the_batch_and_the_shards():
    cases = {(64, 10_000): 64, (256, 64): 64, (48, 100): 12, (7, 3): 1, (6, 3): 3, (96, 384): 48}
    for (batch_size, shards), streams in cases.items():
        assert choose_num_streams(batch_size, shards, None) == streams, (batch_size, shards)
    assert choose_num_streams(64, 100, 32) == 32
    for batch_size, shards, streams in [(64, 100, 5), (64, 8, 16), (64, 100, 0)]:
        with pytest.raises(UsageError, match=rf"--num_streams: expected .*, got {streams}"):
            choose_num_streams(batch_size, shards, streams)


def test_a_small_cache_gives_the_same_samples_from_the_hub(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = DataServer(tmp_path / "hub")
    data = make_dataset(server.root / "owner/voices", shards=6, per_shard=2)
    local = list_shards(str(data), tmp_path)
    url = f"{server.url}/datasets/owner/voices/resolve/{server.commit}/"
    shards = [
        Shard(s.name, s.size, url=url + s.name, sha256=sha256(data / s.name)) for s in local.shards
    ]
    shard_index = ShardIndex("hf://datasets/owner/voices", server.commit, tuple(shards))
    settings = {"batch_size": 4, "num_streams": 2}
    straight = take(opened(local, **settings), 12)
    # Twice what the streams hold open, so that there is space to prefetch.
    largest = max(shard.size for shard in shards)
    for folder, bound in (("tight", 2 * largest), ("ahead", 4 * largest)):
        stream = opened(shard_index, cache=ShardCache(tmp_path / folder, bound), **settings)
        assert all(map(same_step, straight, take(stream, 12)))
        stream.close()
        assert sum(path.stat().st_size for path in (tmp_path / folder).glob("*.*")) <= bound
    with pytest.raises(UsageError, match=r"--cache_gb: .* lower --num_streams"):
        opened(shard_index, cache=ShardCache(tmp_path / "none", largest), **settings)
    server.faults = ["404"]
    with pytest.raises(EchoError, match="answered 404"):
        take(opened(shard_index, cache=ShardCache(tmp_path / "fresh", 4 * largest), **settings), 2)
    server.stop()


def test_silence_is_read_from_npy_and_safetensors(tmp_path):
    np.save(tmp_path / "a.npy", SILENCE.astype(np.float16))
    save_file({"silence": SILENCE}, tmp_path / "b.safetensors", {"codec": "48khz"})
    assert np.array_equal(load_silence(tmp_path / "a.npy", WIDTH), SILENCE.astype(np.float16))
    silence = load_silence(tmp_path / "b.safetensors", WIDTH)
    assert np.array_equal(silence, SILENCE) and silence.dtype == np.float32
    np.save(tmp_path / "empty.npy", SILENCE[:0])
    np.save(tmp_path / "nan.npy", SILENCE * np.nan)
    np.save(tmp_path / "object.npy", np.array([[None] * WIDTH]), allow_pickle=True)
    save_file({"other": SILENCE}, tmp_path / "other.safetensors")
    save_file({"silence": SILENCE[0]}, tmp_path / "flat.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for name, message in {
        "none.npy": "does not exist",
        "empty.npy": r"\(0, 8\)",
        "nan.npy": "not finite",
        "object.npy": "expected float16 or float32",
        "other.safetensors": "cannot read latents of silence",
        "flat.safetensors": r"\(8,\)",
        "noise.safetensors": "cannot read latents of silence",
    }.items():
        with pytest.raises(EchoError, match=message) as caught:
            load_silence(tmp_path / name, WIDTH)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(EchoError, match=r"expected \(frames, 9\), got \(5, 8\)"):
        load_silence(tmp_path / "a.npy", 9)


def test_the_width_of_local_latents_is_known_before_training(dataset, tmp_path):
    assert first_width(dataset) == WIDTH
    path = write_shard(tmp_path / "a.tar", [("a", {"npy": b"noise"}), ("b", {"json": b"{}"})])
    assert first_width(list_shards(str(path), tmp_path)) is None
    assert first_width(ShardIndex("hub", "c", (Shard("a.tar", 9, url="http://x"),))) is None
