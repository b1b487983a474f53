"""Text files for `infer`: every Unicode encoding, JSON with any suffix, all line ends."""

import json
from pathlib import Path

import pytest

from echo_eqx import EchoError
from echo_eqx.speech.requests import Request, make_requests

ROWS = [{"text": "Größe.", "output": "a.wav", "seed": 3}, {"text": "二。"}]


@pytest.fixture(scope="module")
def read():
    base = Request("", Path("out.wav"), None, 42)
    return lambda path: make_requests(base, path, 1, False)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["l.jsonl", "l.JSONL", "l.ndjson", "l.NdJson", "l.txt", "l"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_json_lines_are_read_in_every_encoding_and_with_any_suffix(
    read, tmp_path, encoding, name, end
):
    path = tmp_path / name
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_bytes(end.join([*lines, ""]).encode(encoding))
    jobs = read(path)
    assert [job.text for job in jobs] == ["Größe.", "二。"]
    assert jobs[0].output.name == "a.wav" and jobs[0].seed == 3
    assert jobs[1].output.name == "out_0002.wav" and jobs[1].seed == 42


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_plain_lines_are_not_parsed(read, tmp_path, end, encoding):
    lines = ["[S1] One.", "", "{curly} two.", "3", '"four"']
    (tmp_path / "l.TXT").write_bytes(end.join(lines).encode(encoding))
    assert [job.text for job in read(tmp_path / "l.TXT")] == [line for line in lines if line]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "seed": %s}' % ("9" * 4300), "line 1: seed: expected 0 to .*, got 999"),
        ('{"text": "a", "seed": %s}' % ("9" * 5000), "line 1: not valid JSON"),
        ('{"text": "a", "seed": %s}' % ("[" * 700 + "]" * 700), "line 1: .*got seed = a list"),
        ('{"text": "a", "seed": true}', "line 1: .*got seed = True"),
        ('{"text": "a", "seed": -1}', "line 1: seed: expected 0 to .*, got -1"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ("Größe".encode("latin-1"), "not valid UTF-8 at byte 2"),
        ("a".encode("utf-16") + b"\0", "not valid UTF-16"),
        (b"", "got an empty file"),
    ],
    ids=range(9),
)
def test_unreadable_files_give_one_line_errors(read, tmp_path, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "l.jsonl").write_bytes(data)
    with pytest.raises(EchoError, match=message) as caught:
        read(tmp_path / "l.jsonl")
    assert len(str(caught.value)) < 500
