"""Rows of Parquet: any order, in bounded memory."""

import random

import pytest

from echo_eqx import EchoError
from echo_eqx.prepare import parquet

pyarrow = pytest.importorskip("pyarrow")


def test_rows_are_read_in_any_order_and_few_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_CACHE_BYTES", 5000)
    path = tmp_path / "a.parquet"
    data = [bytes([i]) * (1000 + i) for i in range(40)]
    made = [{"audio": {"bytes": audio, "path": f"{i}"}, "n": i} for i, audio in enumerate(data)]
    made[7]["audio"] = None
    table = pyarrow.Table.from_pylist(made)
    parquet.pyarrow_parquet().write_table(table, path, row_group_size=20)
    beside = list(parquet.read_rows(path, "audio"))
    assert [(group, row) for group, row, _, _ in beside] == [divmod(i, 20) for i in range(40)]
    assert [name for _, _, name, _ in beside][6:9] == ["6", None, "8"]
    order = [*range(40), *random.Random(0).sample(range(40), 40)]
    for i in order:
        row = parquet.ParquetRow(path, "audio", i // 20, i % 20)
        if i == 7:
            with pytest.raises(EchoError, match="a row without bytes"):
                row.read()
        else:
            assert row.read() == data[i]
    for group in (0, 1):
        kept = parquet._row_group(path, "audio", group)._cache
        assert sum(len(audio or b"") for audio in kept.values()) <= 5000
    with pytest.raises(EchoError, match=r"a\.parquet cannot be read"):
        parquet.ParquetRow(path, "audio", 1, 20).read()


def test_other_columns_of_bytes_are_not_read(tmp_path):
    path = tmp_path / "a.parquet"
    audio = {"bytes": b"sound", "path": "x.wav"}
    made = [{"text": "words", "audio": audio, "image": b"large", "second": audio}]
    parquet.pyarrow_parquet().write_table(pyarrow.Table.from_pylist(made), path)
    ((group, row, name, fields),) = parquet.read_rows(path, "audio")
    assert (group, row, name) == (0, 0, "x.wav")
    assert fields == {"text": "words", "image": None, "second": {"path": "x.wav"}}
