"""Tables of other trainers: each is read as by its own trainer, or rejected in one line."""

import json
import logging
import os
import unicodedata
from pathlib import Path

import pytest
from test_sources import kinds, put, wav

from echo_eqx import EchoError
from echo_eqx.prepare.clips import Clip, SkippedInput, list_clips

WAV = wav(0.2)
TEXTS = ["One two.", "Three, four.", 'He said "five".', "Six seven eight."]


def read(path: Path, text: str | bytes) -> tuple[list[Clip], list[SkippedInput], list[str]]:
    """Clips, skipped inputs and what is logged."""
    lines: list[str] = []
    log, handler = logging.getLogger("echo_eqx"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    put(path, text)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        clips, skipped = list_clips(str(path), max_seconds=30.0, cache=path.parent)
    finally:
        log.removeHandler(handler)
    return clips, skipped, lines


def folder(root: Path, *names: str) -> Path:
    for name in names:
        put(root / name, WAV)
    return root


def rows(*columns: list[str], separator: str = "|") -> str:
    return "".join(f"{separator.join(row)}\n" for row in zip(*columns, strict=True))


IDS = ["a", "b", "c", "d"]
WAVS = [f"wavs/{name}.wav" for name in IDS]
PEOPLE = ["ann", "ann", "bo", "bo"]
NUMBERS = ["0", "0", "1", "1"]
LISTS = {
    "F5-TTS": ("metadata.csv", "audio_file|text\n" + rows(WAVS, TEXTS), TEXTS, None),
    "XTTS": (
        *("metadata.csv", "audio_file|text|speaker_name\n" + rows(WAVS, TEXTS, PEOPLE)),
        *(TEXTS, PEOPLE),
    ),
    "LJSpeech": ("metadata.csv", rows(IDS, [t.upper() for t in TEXTS], TEXTS), TEXTS, None),
    "ids with a suffix": ("metadata.csv", rows([f"{i}.wav" for i in IDS], TEXTS), TEXTS, None),
    "with speakers": ("metadata.csv", rows(IDS, TEXTS, TEXTS, PEOPLE), TEXTS, PEOPLE),
    "Piper": ("metadata.csv", rows(IDS, PEOPLE, TEXTS), TEXTS, PEOPLE),
    "StyleTTS 2": ("train_list.txt", rows(WAVS, TEXTS, NUMBERS), TEXTS, NUMBERS),
    "VITS": ("x.txt", rows([f"DUMMY1/{i}.wav" for i in IDS], NUMBERS, TEXTS), TEXTS, NUMBERS),
    "GPT-SoVITS": ("x.list", rows(WAVS, PEOPLE, ["EN"] * 4, TEXTS), TEXTS, PEOPLE),
    "Common Voice": (
        "train.TSV",
        rows(
            ["client_id", *PEOPLE],
            ["path", *(f"{i}.wav" for i in IDS)],
            ["sentence", *TEXTS],
            ["locale", *["EN"] * 4],
            separator="\t",
        ),
        *(TEXTS, PEOPLE),
    ),
    "a spreadsheet": (
        *("list.csv", 'sep=;\nFile;Text;Speaker\n"wavs/a.wav";"One; ""two"".";ann\n'),
        *(['One; "two".'], ["ann"]),
    ),
    "Windows": ("list.CSV", "\ufeffWav_Path,TEXT\r\n\r\nwavs\\a.wav,One.\r\n", ["One."], None),
    "with comments": (
        *("list.csv", "# made by hand\n#audio|text|\nwavs/a.wav|One.|\n\n", ["One."], None),
    ),
    "over lines": ("list.csv", 'audio,text\nwavs/a.wav,"One,\ntwo."\n', ["One,\ntwo."], None),
    "quoted throughout": (
        *("list.psv", '"audio"|"text"\n"wavs/a.wav"|"One ""two""."\n', ['One "two".'], None),
    ),
    "one row": ("metadata.csv", "a|One two.|One two.|ann\n", ["One two."], ["ann"]),
}


@pytest.mark.parametrize("kind", LISTS)
def test_tables_of_other_trainers_are_read(tmp_path, kind):
    name, text, texts, speakers = LISTS[kind]
    where = "clips" if kind == "Common Voice" else "wavs"
    folder(tmp_path, *(f"{where}/{i}.wav" for i in IDS))
    clips, skipped, said = read(tmp_path / name, text)
    assert [clip.text for clip in clips] == texts
    assert [clip.speaker for clip in clips] == (speakers or [None] * len(clips))
    has_language = kind in ("Common Voice", "GPT-SoVITS")
    assert {clip.language for clip in clips} == ({"EN"} if has_language else {None})
    assert len(skipped) == (3 if kind == "one row" else 0)
    assert said[0].startswith(f"{name}: columns ")


def test_the_columns_found_are_logged(tmp_path):
    folder(tmp_path, *WAVS)
    *_, said = read(tmp_path / "metadata.csv", LISTS["XTTS"][1])
    assert said == ["metadata.csv: columns audio|text|speaker"]
    *_, said = read(tmp_path / "metadata.csv", LISTS["with speakers"][1])
    assert said == ["metadata.csv: columns audio|raw_text|text|speaker (it has no header)"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("name", ["list.csv", "list.ndjson", "list.JSONL", "list.json"])
def test_tables_in_every_unicode_encoding_are_read(tmp_path, encoding, name):
    folder(tmp_path, *WAVS)
    texts = ["一二三，四五。", "Größe."]
    if name == "list.csv":
        content = "audio|text\n" + rows(WAVS[:2], texts)
    else:
        lines = zip(WAVS, texts, strict=False)
        content = "".join(
            json.dumps({"wav": w, "text": t}, ensure_ascii=False) + "\n" for w, t in lines
        )
    clips, skipped, _ = read(tmp_path / name, content.encode(encoding))
    assert not skipped and [clip.text for clip in clips] == texts


def test_a_json_array_is_read(tmp_path):
    folder(tmp_path, *WAVS)
    objects = [{"wav": name, "text": text} for name, text in zip(WAVS, TEXTS, strict=True)]
    clips, skipped, _ = read(tmp_path / "list.json", json.dumps([*objects, 5], indent=1))
    assert [clip.text for clip in clips] == TEXTS and kinds(skipped) == {"manifest": 1}
    for text in ("[" * 100_000, "[" + "9" * 5000 + "]", '[{"wav": '):
        with pytest.raises(EchoError, match=r"list.json: expected JSON \("):
            read(tmp_path / "list.json", text)


def test_damaged_utf_16_gives_a_one_line_error(tmp_path):
    folder(tmp_path, *WAVS)
    with pytest.raises(EchoError, match=r"list.csv: expected text, got bytes that are not utf-16"):
        read(tmp_path / "list.csv", "audio|text\nwavs/a.wav|One.\n".encode("utf-16") + b"\0")


def test_ambiguous_columns_are_rejected(tmp_path):
    folder(tmp_path, *WAVS, *(f"clean/{i}.wav" for i in IDS))
    other = ["un deux", "trois quatre", "cinq", "six"] * 6
    many = [t + f" {i}" for i in range(6) for t in TEXTS]
    for text, message in {
        rows(WAVS, [f"clean/{i}.wav" for i in IDS], TEXTS): "1 and 2 both name existing audio",
        "a|Hello|ann\n": "cannot tell what column",
        rows(WAVS * 6, many, [f"{t} {i}" for i, t in enumerate(other)]): "column 3 is",
        rows(WAVS, TEXTS, ["0.25", "1.75", "3.5", "2.25"]): r"column 3 is \(example: '0.25'\)",
        rows(WAVS, PEOPLE, ["sad", "sad", "glad", "sad"], TEXTS): "cannot tell what column",
        "wavs/a.wav|\n": "expected a column of text",
        "audio|text|text\nwavs/a.wav|One.|Two.\n": "got 'text' more than once",
        "x|One two.\n": "expected a header",
        "# nothing but a comment\n": "expected a header",
        "a One two.\nb Three.\n": "\\(Kaldi\\) is not supported",
    }.items():
        with pytest.raises(EchoError, match=message) as caught:
            read(tmp_path / "list.csv", text)
        assert "\n" not in str(caught.value)


def test_unusable_rows_are_counted(tmp_path):
    folder(tmp_path, *WAVS)
    text = rows(IDS, PEOPLE, TEXTS) + "a|ann\nx|bo|Gone.\na|ann|Again.\nb|bo|One|two.\n|bo|No id.\n"
    clips, skipped, _ = read(tmp_path / "metadata.csv", text)
    assert [clip.text for clip in clips] == TEXTS
    assert kinds(skipped) == {"manifest": 3, "audio": 1, "duplicate": 1}


def test_an_unclosed_quote_swallows_no_rows(tmp_path):
    folder(tmp_path, *WAVS)
    for separator in "|\t":
        text = rows(WAVS, ['"One two.', "Three.", 'Fo"ur.', '"Five" six.'], separator=separator)
        clips, skipped, _ = read(tmp_path / "list.txt", text)
        assert len(clips) == 4 and not skipped and clips[0].text == '"One two.'
    text = 'audio,text\nwavs/a.wav,"One two.\nwavs/b.wav,Three.\nwavs/c.wav,"Four."\nwavs/d.wav,x\n'
    clips, skipped, _ = read(tmp_path / "list.csv", text)
    assert all("wavs" not in clip.text for clip in clips) and kinds(skipped) == {"manifest": 1}


def test_file_names_are_found_in_every_spelling(tmp_path):
    name = "wavs/Käse é.wav"
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        root = folder(tmp_path / form, unicodedata.normalize(form, name), "wavs/LOUD.WAV")
        given = unicodedata.normalize(other, name)
        for path in (given, given.replace("/", "\\"), given.removeprefix("wavs/"), given[5:-4]):
            for loud in ("wavs\\LOUD.WAV", "LOUD.wav", "LOUD"):
                text = f"audio|text\n{path}|One.\n{loud}|Two.\n"
                clips, skipped, _ = read(root / "list.csv", text)
                assert {clip.text for clip in clips} == {"One.", "Two."} and not skipped
    root = folder(tmp_path / "beside", unicodedata.normalize("NFD", "é.wav"))
    put(root / unicodedata.normalize("NFC", "é.txt"), "One.")
    clips, skipped = list_clips(str(root), max_seconds=30.0, cache=tmp_path)
    assert len(clips) == 1 and not skipped


def test_moved_paths_are_found_under_a_single_prefix(tmp_path):
    folder(tmp_path, "wavs/x/1.wav", "wavs/x/2.wav", "1.wav")
    for begin in ("/data/me/set", "C:\\data\\set", "DUMMY"):
        names = [f"{begin}/{name}" for name in ("x/1.wav", "x/2.wav", "y/1.wav")]
        text = "audio|text\n" + rows(names, TEXTS[:3])
        clips, skipped, said = read(tmp_path / "list.csv", text)
        assert [clip.metadata["source"] for clip in clips] == ["wavs/x/1.wav", "wavs/x/2.wav"]
        assert kinds(skipped) == {"audio": 1} and "2 files below" in said[1]
    # Two speakers whose files have the same names are never confused.
    names = ["/data/ann/1.wav", "/data/bo/1.wav"]
    clips, skipped, _ = read(tmp_path / "list.csv", "audio|text\n" + rows(names, TEXTS[:2]))
    assert not clips and kinds(skipped) == {"audio": 2}


def test_layouts_of_other_speech_corpora_are_read(tmp_path):
    vctk = folder(tmp_path / "vctk", "wav48/p225/p225_001_mic1.flac", "wav48/p226/p226_001.wav")
    put(vctk / "txt/p225/p225_001.txt", "One.")
    put(vctk / "txt/p226/p226_001.txt", "Two.")
    libri = folder(tmp_path / "libri", "19/198/19_198_1.wav")
    put(libri / "19/198/19_198_1.normalized.txt", "One.")
    put(libri / "19/198/19_198_1.original.txt", "1.")
    for root, texts in ((vctk, ["One.", "Two."]), (libri, ["One."])):
        clips, skipped = list_clips(str(root), max_seconds=30.0, cache=tmp_path)
        assert [clip.text for clip in clips] == texts and not skipped
    listed = folder(tmp_path / "listed", "clips/a.wav")
    put(listed / "validated.tsv", "path\tsentence\na.wav\tOne.\n")
    clips, _ = list_clips(str(listed), max_seconds=30.0, cache=tmp_path)
    assert [clip.text for clip in clips] == ["One."]
    put(listed / "test.tsv", "path\tsentence\na.wav\tOne.\n")
    with pytest.raises(EchoError, match="expected one manifest or table, got several"):
        list_clips(str(listed), max_seconds=30.0, cache=tmp_path)
    put(listed / "wav.scp", "a clips/a.wav\n")
    with pytest.raises(EchoError, match="is a Kaldi folder"):
        list_clips(str(listed), max_seconds=30.0, cache=tmp_path)


def test_circular_and_broken_links_are_counted(tmp_path):
    folder(tmp_path, "x/a.wav")
    put(tmp_path / "x/a.txt", "One.")
    os.symlink(tmp_path, tmp_path / "x/again")
    os.symlink(tmp_path / "x", tmp_path / "alias")
    os.symlink(tmp_path / "nowhere", tmp_path / "gone.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    clips, skipped = list_clips(str(tmp_path), max_seconds=30.0, cache=tmp_path)
    assert len(clips) == 1 and kinds(skipped) == {"path": 4}
