"""The tar reader agrees with `tarfile` on valid archives and is bounded on all others."""

import io
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from shards import npy_bytes, write_shard

from echo_eqx.data.tar import MAX_EXTENDED, Member, TarError, read_members
from echo_eqx.data.tar_index import Skipped, index_tar

LATENTS = npy_bytes(np.zeros((3, 8), np.float16))
TEXT = b'{"text": "words"}'


def members_of(path: Path) -> list[Member]:
    with path.open("rb") as file:
        return list(read_members(file.fileno()))


def assert_as_tarfile_reads(path: Path) -> None:
    """Names, places and links of all members, and where a file's data are."""
    kinds = {
        tarfile.LNKTYPE: "hard link",
        tarfile.SYMTYPE: "symbolic link",
        tarfile.DIRTYPE: "folder",
        tarfile.FIFOTYPE: "FIFO",
        tarfile.GNUTYPE_SPARSE: "sparse file",
    }
    with tarfile.open(path, "r:") as tar:
        expected = tar.getmembers()
    found = members_of(path)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.name.rstrip("/") == theirs.name
        assert ours.kind == ("sparse file" if theirs.issparse() else kinds.get(theirs.type, "file"))
        if ours.kind == "file":
            assert (ours.offset, ours.size) == (theirs.offset_data, theirs.size)
        assert ours.target == theirs.linkname


def test_every_tarfile_format_is_read_as_by_tarfile(tmp_path):
    rng = np.random.default_rng(0)
    names = ["a.npy", "b/" * 40 + "c.json", "größe.npy", "d" * 99, "e" * 100, "f" * 155 + "/g" * 40]
    long = [*names, "h" * 101, "i/" * 120 + "j", "k" * 5000]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind, pax_headers={"comment": "honest"}) as tar:
            for name in names if kind == tarfile.USTAR_FORMAT else long:
                data = rng.bytes(int(rng.integers(0, 2000)))
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), 1.5 if kind == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(data))
                for type_ in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
                    info = tarfile.TarInfo(name[:50] + "x")
                    info.type = type_
                    if type_ in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                        info.linkname = name if kind != tarfile.USTAR_FORMAT else name[:100]
                    tar.addfile(info)
        assert_as_tarfile_reads(path)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_gnu_tar_archives_are_read_as_by_tarfile(tmp_path, kind):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.npy").write_bytes(LATENTS)
    os.link(folder / "sub" / "a.npy", folder / "sub" / "b.npy")
    os.symlink("a.npy", folder / "sub" / "c.npy")
    if kind not in ("v7", "ustar"):
        (folder / ("n" * 120)).write_bytes(b"long")
    with (folder / "holes").open("wb") as file:  # more holes than one header has room for
        for place in range(60):
            file.seek(place << 17)
            file.write(b"x" * 4096)
    path = tmp_path / "a.tar"
    sparse = [] if kind in ("v7", "ustar") else ["--sparse"]
    command = ["tar", "-c", f"--format={kind}", *sparse, "-f", path, "-C", folder, "."]
    subprocess.run(command, check=True)
    assert_as_tarfile_reads(path)


def header(name: str, size: int, kind: bytes = b"0", size_field: bytes | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size_field is not None:
        block[124:136] = size_field
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def extended(data: bytes, kind: bytes = b"x") -> bytes:
    return header("e", len(data), kind) + padded(data)


FILE = header("a.npy", len(LATENTS)) + padded(LATENTS)
HOSTILE = {
    "digits": extended(b"1" * 900_000) + FILE,
    "no line ends": extended(b"9 path=abcdefghijk") + FILE,
    "length of nothing": extended(b"0 path=a\n" * 9) + FILE,
    "length of a negative": extended(b"-9 path=a\n") + FILE,
    "length beyond the end": extended(b"999999999999 path=a\n") + FILE,
    "too long a header": header("e", MAX_EXTENDED + 1, b"x") + bytes(MAX_EXTENDED + 512) + FILE,
    "gigabytes of a name": header("e", 8 << 30, b"L", b"\x80" + (8 << 30).to_bytes(11, "big")),
    "a name for all": extended(b"12 path=abc\n", b"g") + FILE * 3,
    "a size of letters": extended(b"13 size=1e99\n") + FILE,
    "a size of a thousand digits": extended(b"1011 size=" + b"9" * 1000 + b"\n") + FILE,
    "a negative size": header("a", 0, b"0", b"\xff" * 12) + FILE,
    "the largest size": header("a", 0, b"0", b"\x80" + b"\xff" * 11) + FILE,
    "no octal": header("a", 0, b"0", b"0000000009a\0") + FILE,
    "an endless map": header("a", 0, b"S")[:482] + b"\1" + header("a", 0, b"S")[483:],
    "nothing after": FILE + extended(b"9 path=a\n"),
    "gzip": b"\x1f\x8b" + bytes(1000),
    "more behind the end": FILE + bytes(1024) + FILE,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tar_is_rejected_quickly(tmp_path, case):
    path = tmp_path / "a.tar"
    path.write_bytes(HOSTILE[case])
    started = time.perf_counter()
    with pytest.raises(TarError) as caught:
        members_of(path)
    assert time.perf_counter() - started < 1 and 10 < len(str(caught.value)) < 300


def test_time_is_proportional_to_the_file_size(tmp_path):
    """Chains of extended headers, maps of sparse files, and many records in one header."""
    record = b"18 SCHILY.dev=999\n"
    cases = {
        "chain": b"".join([extended(b"9 path=a\n")] * 2_000) + FILE,
        "long names": b"".join([extended(b"n" * 600, b"L")] * 1_000) + FILE,
        "records": b"".join([extended(record * 50_000)] * 2) + FILE,
        "links": b"".join([header(f"{i}.npy", 0, b"1") for i in range(3_000)]) + FILE,
    }
    for name, data in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        started = time.perf_counter()
        index_tar(path)
        assert time.perf_counter() - started < 5, name


def test_a_hole_of_terabytes_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(FILE + bytes(1024))
    os.truncate(path, 1 << 42)
    started = time.perf_counter()
    assert len(members_of(path)) == 1 and time.perf_counter() - started < 1


@pytest.mark.parametrize("left", [0, 512, 1024])
def test_a_tar_may_end_after_any_member(tmp_path, left):
    path = tmp_path / "a.tar"
    for data in (FILE + bytes(left), FILE[: 512 + len(LATENTS)]):  # with and without its padding
        path.write_bytes(data)
        assert [member.name for member in members_of(path)] == ["a.npy"]


def indexed(path: Path) -> tuple[list[str], list[Skipped]]:
    """Keys of the complete records, and members that belong to none."""
    skipped: list[Skipped] = []
    entries = index_tar(path, skipped)
    return [entry.key for entry in entries if entry.latents and entry.json], skipped


def shard(path: Path, *names: str) -> Path:
    split = (name.partition("|") for name in names)
    return write_shard(
        path,
        [(key, {suffix: LATENTS if "npy" in suffix.lower() else TEXT}) for key, _, suffix in split],
    )


def test_keys_with_dots_are_read_if_unambiguous(tmp_path):
    names = ["LJ.1|npy", "LJ.1|json", "LJ.2|npy", "LJ.2|json", "LJ.2|ref.npy", "LJ.2|flac"]
    keys, skipped = indexed(shard(tmp_path / "a.tar", *names, "v1.5/k|npy", "v1.5/k|json"))
    assert keys == ["LJ.1", "LJ.2", "v1.5/k"]
    assert [(one.name, one.kind) for one in skipped] == [("LJ.2.flac", "extra")]
    # These may belong to a record or be records of their own, which is ambiguous.
    keys, skipped = indexed(shard(tmp_path / "b.tar", "k|npy", "k|json", "k.1|npy", "k.1|json"))
    assert keys == ["k"] and [one.name for one in skipped] == ["k.1.npy", "k.1.json"]
    assert {one.kind for one in skipped} == {"member"} and "k is a key as well" in skipped[0].detail
    keys, skipped = indexed(shard(tmp_path / "c.tar", "a.b|npy", "c.d|json", "c.d|txt"))
    assert keys == [] and {one.name for one in skipped} == {"a.b.npy", "c.d.json", "c.d.txt"}


def test_suffixes_in_upper_case_are_read(tmp_path):
    keys, skipped = indexed(shard(tmp_path / "a.tar", "k|NPY", "k|Json", "k|REF.npy"))
    assert keys == ["k"] and skipped == []
    assert index_tar(tmp_path / "a.tar")[0].reference is not None


def test_members_that_belong_to_no_record_are_listed_with_the_reason(tmp_path):
    path = shard(tmp_path / "a.tar", "k|npy", "k|json", "k|npy", "README|md", "._k|npy", "k|flac")
    with tarfile.open(path, "a") as tar:
        for name, kind, target in [
            ("hard.npy", tarfile.LNKTYPE, "./k.npy"),
            ("hard.json", tarfile.LNKTYPE, "hard2.json"),
            ("soft.npy", tarfile.SYMTYPE, "k.npy"),
            ("pipe.npy", tarfile.FIFOTYPE, ""),
            ("folder.npy", tarfile.DIRTYPE, ""),
            ("nosuffix", tarfile.REGTYPE, ""),
            (".hidden.npy", tarfile.REGTYPE, ""),
            ("n" * 5000 + ".npy", tarfile.REGTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    skipped: list[Skipped] = []
    entries = index_tar(path, skipped)
    assert [entry.key for entry in entries] == ["k", "hard"]
    assert entries[1].latents == entries[0].latents and entries[1].json is None
    assert {one.name[:20]: one.kind for one in skipped} == {
        "k.npy": "duplicate",
        "README.md": "member",
        "._k.npy": "extra",
        "k.flac": "extra",
        "hard.json": "member",
        "soft.npy": "member",
        "pipe.npy": "member",
        "nosuffix": "member",
        ".hidden.npy": "member",
        "n" * 20: "member",
    }
    assert all(one.detail for one in skipped)


def test_keys_may_contain_any_bytes(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in (("ü\n\x1b.npy", LATENTS), ("ü\n\x1b.json", TEXT)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert indexed(path) == (["\udcfc\n\x1b"], [])
