"""The infer command as a user runs it: flags, files, messages and exit codes."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import DATA, GOLDEN, random_model
from processes import SCRIPTS, call, run

import echo_eqx
from echo_eqx.config import CodecConfig, WatermarkConfig

CHECKPOINT = GOLDEN / "dit_tiny" / "full_state.pkl"
NARROW_CODEC = GOLDEN / "dacvae_tiny" / "weights.pth"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a codec for the golden model."""
    folder = tmp_path_factory.mktemp("infer")
    watermark = WatermarkConfig(dim=2, bottleneck_dim=8)
    config = CodecConfig(encoder_dim=2, hidden_dim=12, decoder_dim=32, watermark=watermark)
    echo_eqx.save(random_model(echo_eqx.DACVAE, config, 0.12), folder / "codec")
    return folder


def models(place: Path) -> list[object]:
    return ["--checkpoint", CHECKPOINT, "--codec", place / "codec"]


def quick(place: Path) -> list[object]:
    return [*models(place), "--steps", 2, "--duration", 2]


def test_published_flags_work_with_a_reference_voice(place, tmp_path):
    output = tmp_path / "out.wav"
    command = [
        *models(place),
        "--text",
        "Grüße aus Köln, 猫 and 🎉!",
        "--output",
        output,
        "--speaker_ref",
        DATA / "speech.mp3",
        "--cfg_scale",
        3.0,
        "--steps",
        2,
        "--duration",
        3.0,
        "--no-trim",
        "--seed",
        42,
    ]
    done = run(SCRIPTS / "infer.py", *command, "--json")
    assert done.returncode == 0, done.stderr
    audio, rate = sf.read(output)
    assert rate == 48_000 and len(audio) == 3 * rate and np.abs(audio).max() > 1e-3
    *_, last = done.stdout.strip().splitlines()
    assert "3.00 s of audio in " in last
    assert "compiling" in last and "running" in last and "real-time factor" in last
    assert "watermark message: " in done.stdout
    # Without a terminal there is no bar and no log; speech from random weights never ends.
    (warning,) = done.stderr.splitlines()
    assert "Grüße aus Köln" in warning and "does not end within 3.00 s" in warning

    described = json.loads((tmp_path / "out.json").read_text())
    assert described["cfg_scale"] == 3.0 and described["speaker_scale"] == 5.0
    assert described["steps"] == 2 and described["seed"] == 42
    assert described["checkpoint"]["config"]["model_dim"] == 48
    assert len(described["codec"]["sha256"]) == 64
    assert described["message"] in done.stdout

    first = output.read_bytes()
    again = call("infer", *command)
    assert again.returncode == 0 and output.read_bytes() == first  # bit for bit
    assert call("infer", *command[:-1], 43).returncode == 0 and output.read_bytes() != first


@pytest.mark.slow
def test_codec_dtype_and_matmul_precision_are_used(place, tmp_path):
    audio = {}
    for dtype in ("float32", "float16"):
        fast = ("--codec_dtype", dtype, "--matmul_precision", "tensorfloat32")
        done = run(SCRIPTS / "infer.py", *quick(place), *fast, "--text", "Hello.", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        audio[dtype], _ = sf.read(tmp_path / "output.wav")
    noise = audio["float16"] - audio["float32"]
    assert 0 < np.sum(noise**2) < 1e-4 * np.sum(audio["float32"] ** 2)  # 40 dB


def test_without_watermark_and_as_flac(place, tmp_path):
    text = ["--text", "Hello.", "--output", tmp_path / "out.flac"]
    done = call("infer", *quick(place), *text, "--no-watermark", "--no-trim")
    assert done.returncode == 0 and "message" not in done.stdout
    assert sf.info(tmp_path / "out.flac").format == "FLAC"
    bits = "0110" * 4
    done = call("infer", *quick(place), *text, "--message", bits)
    assert f"watermark message: {bits}" in done.stdout


def test_lines_of_a_text_file_and_candidates_are_numbered(place, tmp_path):
    (tmp_path / "lines.txt").write_text("Hello.\n\nGood bye.\n")
    output = ["--output", tmp_path / "out.wav", "--num_candidates", 2]
    done = call("infer", *quick(place), "--text_file", tmp_path / "lines.txt", *output)
    assert done.returncode == 0, done.stderr
    names = [f"out_{line:04d}_c{candidate}.wav" for line in (1, 2) for candidate in (1, 2)]
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == names
    assert len({(tmp_path / name).read_bytes() for name in names}) == 4


def test_json_lines_set_voice_output_and_seed(place, tmp_path):
    lines = [
        {"text": "Hello.", "output": "a.flac", "speaker_ref": str(DATA / "speech.opus")},
        {"text": "Hello.\u2028You.", "seed": 7},
    ]
    text = "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "lines.jsonl").write_text(text)
    output = ["--output", tmp_path / "out.wav"]
    done = call("infer", *quick(place), "--text_file", tmp_path / "lines.jsonl", *output)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"lines.jsonl", "a.flac", "out_0002.wav"}


def test_long_text_is_spoken_whole(place, tmp_path):
    text = "One sentence stands here. Another one stands here. The last one stands here."
    options = ["--text", text, "--output", tmp_path / "out.wav", "--no-trim"]
    done = call("infer", *quick(place), *options)
    assert done.returncode == 0, done.stderr
    assert sf.info(tmp_path / "out.wav").duration == pytest.approx(6.0)


def test_help_shows_flags_and_examples(place):
    done = call("infer", "--help")
    assert done.returncode == 0
    for word in ("--speaker_ref", "--cfg_scale", "--apg_eta", "owner/name", "voice.mp3"):
        assert word in done.stdout
    # What depends on the checkpoint has no default here: every sampler setting, length and
    # expand_text.
    shown = " ".join(done.stdout.replace("│", " ").split())
    recommended = shown.count("(default: what the checkpoint recommends)")
    assert recommended == len(dataclasses.fields(echo_eqx.SamplerSettings)) + 2
    assert "(default: if the codec can)" in shown


# --- What cannot be used ------------------------------------------------------------------------


def damaged(tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / name for name in ("empty.pkl", "cut.pkl", "note.txt", "folder")}
    files["folder.wav"] = tmp_path / "folder.wav"
    files["folder.wav"].mkdir()
    files["voice.raw"] = tmp_path / "voice.raw"
    files["voice.raw"].write_bytes(bytes(1000))
    files["empty.pkl"].touch()
    files["cut.pkl"].write_bytes(CHECKPOINT.read_bytes()[:100_000])
    files["note.txt"].write_text("not weights")
    files["folder"].mkdir()
    return files


CASES = {
    "no text": (["--checkpoint", CHECKPOINT], 2, "either --text or --text_file"),
    "empty text": (["@", "--text", " "], 1, "the text is empty"),
    "nothing to say": (["@", "--text", "..."], 1, "at least one letter or digit, got '...'"),
    "broken UTF-8": (["@", "--text", "a\udcff"], 1, "not valid UTF-8 at character 1"),
    "negative steps": (
        ["@", "--text", "Hi.", "--steps", -1],
        2,
        "steps: expected 1 to 10000, got -1",
    ),
    "steps of a word": (["@", "--text", "Hi.", "--steps", "many"], 2, "many"),
    "unknown flag": (["@", "--text", "Hi.", "--stepz", 3], 2, "stepz"),
    "bad guidance": (["@", "--text", "Hi.", "--guidance", "both"], 2, "both"),
    "long duration": (["@", "--text", "Hi.", "--duration", 60], 2, "got 60.0 s"),
    "suffix": (
        ["@", "--text", "Hi.", "--output", "out.mp3"],
        1,
        "expected .wav or .flac, got '.mp3'",
    ),
    "unwritable": (
        ["@", "--text", "Hi.", "--output", "/proc/out.wav"],
        1,
        "cannot write output '/proc/out.wav'",
    ),
    "no folder": (["@", "--text", "Hi.", "--output", "none/out.wav"], 1, "cannot write output"),
    "bad message": (["@", "--text", "Hi.", "--message", "01"], 2, "expected 16 digits 0 or 1"),
    "no such text file": (["@", "--text_file", "none.txt"], 1, "none.txt does not exist"),
    "no candidates": (
        ["@", "--text", "Hi.", "--num_candidates", 0],
        2,
        "num_candidates: expected at least 1",
    ),
    "missing checkpoint": (["--checkpoint", "none.pkl", "--text", "Hi."], 1, "none.pkl does not"),
    "empty checkpoint": (["--checkpoint", "{empty.pkl}", "--text", "Hi."], 1, "got an empty file"),
    "cut checkpoint": (["--checkpoint", "{cut.pkl}", "--text", "Hi."], 1, "truncated"),
    "a note": (["--checkpoint", "{note.txt}", "--text", "Hi."], 1, "expected a safetensors"),
    "empty folder": (["--checkpoint", "{folder}", "--text", "Hi."], 1, "expected weights"),
    "codec as model": (["--checkpoint", NARROW_CODEC, "--text", "Hi."], 1, "expected an EchoDiT"),
    "two widths": (
        ["@", "--codec", NARROW_CODEC, "--text", "Hi."],
        1,
        "latent channels, as in this checkpoint, got 12",
    ),
    "Hub offline": (["--checkpoint", "a/b", "--text", "Hi."], 1, "a/b"),
    "missing voice": (["@", "--text", "Hi.", "--speaker_ref", "no.wav"], 1, "no.wav does not"),
    "folder as voice": (["@", "--text", "Hi.", "--speaker_ref", "{folder}"], 1, "is not a file"),
    "voice of text": (["@", "--text", "Hi.", "--speaker_ref", "{note.txt}"], 1, "got text"),
    "loudness of NaN": (
        ["@", "--text", "Hi.", "--speaker_ref", DATA / "speech.wav", "--speaker_lufs", "nan"],
        2,
        "got nan",
    ),
    "a folder as output": (["@", "--text", "Hi.", "--output", "{folder.wav}"], 1, "got a folder"),
    "no name as output": (["@", "--text", "Hi.", "--output", ".", "--num_candidates", 2], 1, "''"),
    "no name as output, many lines": (
        ["@", "--text_file", "{note.txt}", "--output", "."],
        1,
        "''",
    ),
    "a long name": (
        ["@", "--text", "Hi.", "--output", "a" * 300 + ".wav"],
        1,
        "cannot write output",
    ),
    "no such user": (["--checkpoint", "~nosuchuser/x", "--text", "Hi."], 1, "not a usable path"),
    "raw voice": (["@", "--text", "Hi.", "--speaker_ref", "{voice.raw}"], 1, "decoded"),
    "seed": (["@", "--text", "Hi.", "--seed", 2**32], 2, "got 4294967296"),
    "blocks": (["@", "--text", "Hi.", "--duration", 4, "--block_frames", 20], 2, "latent_encoder"),
    "NaN setting": (
        ["@", "--text", "Hi.", "--cfg_scale", "nan"],
        2,
        "cfg_scale: expected 0 to 100, got nan",
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_bad_input_gives_a_one_line_error_and_an_exit_code(place, tmp_path, name):
    args, code, message = CASES[name]
    files = damaged(tmp_path)
    args = [models(place) if arg == "@" else [arg] for arg in args]
    args = [arg for group in args for arg in group]
    args = [str(files[arg[1:-1]]) if str(arg)[:1] == "{" else arg for arg in args]
    work = tmp_path / "work"
    work.mkdir()
    done = call("infer", *args, cwd=work)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if "--steps many" not in name and done.stderr.startswith("error"):
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list(work.iterdir())


def test_bad_lines_of_a_text_file_are_reported(place, tmp_path):
    for name, content, message in (
        ("empty.txt", b"\n \n", "empty.txt: expected one utterance per line"),
        ("silent.txt", b"Hi.\n\n...\n", "silent.txt line 3: the text has nothing to say"),
        ("latin.txt", b"Gr\xfc\xdfe", "latin.txt: not valid UTF-8 at byte 2"),
        ("a.jsonl", b'{"text": "Hi."}\n{"text": ', "line 2: not valid JSON"),
        ("b.jsonl", b'{"txt": "Hi."}', 'line 1: expected a JSON object with a string "text"'),
        ("c.jsonl", b'{"text": "Hi.", "speed": 2}', "got speed = 2"),
        ("e.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("f.jsonl", b'{"text": "Hi.", "output": "a\\u0000.wav"}', "cannot write output"),
        ("g.jsonl", b'{"text": "Hi.", "seed": true}', "got seed = True"),
        (
            "d.jsonl",
            b'{"text": "a", "output": "x.wav"}\n{"text": "b", "output": "x.wav"}',
            "a different output",
        ),
    ):
        (tmp_path / name).write_bytes(content)
        done = call("infer", *quick(place), "--text_file", tmp_path / name)
        assert done.returncode in (1, 2) and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_terminal_shows_a_progress_bar(place, tmp_path):
    # `script` gives the command a terminal and writes down what it shows.
    command = [sys.executable, SCRIPTS / "infer.py", *quick(place), "--text", "Hello."]
    command += ["--output", tmp_path / "out.wav"]
    shown = tmp_path / "shown"
    done = subprocess.run(
        ["script", "-qec", f"stty cols 100 rows 30; {shlex.join(map(str, command))}", shown],
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, shown.read_text()
    assert "speaking" in shown.read_text() and "2/2" in shown.read_text()
