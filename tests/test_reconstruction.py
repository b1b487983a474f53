"""What a codec keeps of recordings is measured as it says."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import GOLDEN
from processes import call

from echo_eqx.voice.reconstruction import NAMES, compare

RATE = 24_000


def vowel(hertz: float, seconds: float = 1.0) -> np.ndarray:
    """Harmonics that fall by 1 / k."""
    t = np.arange(int(seconds * RATE)) / RATE
    harmonics = [np.sin(2 * np.pi * hertz * k * t + k) / k for k in range(1, int(7000 / hertz))]
    return 0.2 * sum(harmonics) + 1e-4 * np.random.default_rng(0).standard_normal(len(t))


@pytest.mark.parametrize("hertz", [85.0, 130.0, 220.0])
def test_pitch_differences_are_in_cents(hertz):
    for cents in (7, 40, 150):
        measured = compare(vowel(hertz * 2 ** (cents / 1200)), vowel(hertz), RATE)
        assert measured.f0_cents == pytest.approx(cents, abs=3), cents
        assert measured.voiced == 1 and measured.periodicity == pytest.approx(1, abs=0.02)


def test_the_same_recording_has_no_distance_and_a_louder_one_only_its_level():
    audio = vowel(110)
    same = compare(audio, audio, RATE)
    assert (same.mel_db, same.mcd_db, same.f0_cents) == (0, 0, 0)
    assert (same.voiced, same.periodicity) == (1, 1) and same.si_sdr_db > 80
    louder = compare(2 * audio, audio, RATE)
    assert louder.mel_db == pytest.approx(6.02, abs=0.01) and louder.mcd_db < 0.01
    assert louder.si_sdr_db > 80


def test_a_hoarse_voice_is_less_periodic():
    audio = vowel(150)
    noise = np.random.default_rng(1).standard_normal(len(audio))
    hoarse = compare(audio + 0.3 * noise, audio, RATE)
    assert hoarse.periodicity < 0.8 and hoarse.si_sdr_db < 3
    whispered = compare(0.1 * noise, audio, RATE)
    assert whispered.voiced < 0.1 and whispered.periodicity < 0.5


def test_without_a_voice_nothing_is_said_of_it():
    noise = np.random.default_rng(0).standard_normal(RATE)
    measured = compare(noise, noise, RATE)
    assert all(np.isnan([measured.f0_cents, measured.voiced, measured.periodicity]))
    assert measured.mcd_db == 0


def test_the_command_prints_a_table_and_draws_spectrograms(tmp_path):
    for i in range(2):  # without transcripts
        sf.write(tmp_path / f"{i}.wav", 0.5 * vowel(100 + 50 * i, 0.3), RATE)
    sf.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    codec = ["--codec", GOLDEN / "dacvae_tiny" / "weights.pth", "--data", tmp_path]
    more = ["--plot", tmp_path / "plot.png", "--output", tmp_path / "out"]
    done = call("eval_codec", *codec, *more)
    assert done.returncode == 0, done.stderr
    assert "left out: silent.wav is silent" in done.stderr and "\n2 recordings" in done.stdout
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line[0] == "|"]
    assert [cell.strip() for cell in rows[0][1:]] == list(NAMES) and len(rows) == 5
    assert {len(row) for row in rows} == {1 + len(NAMES)}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{i}.{end}" for i in (0, 1) for end in ("wav", "decoded.wav")
    }
    (tmp_path / "out").rename(tmp_path.parent / "out")
    done = call("eval_codec", *codec, "--json", "--count", 1)
    report = json.loads(done.stdout)
    assert list(report["recordings"]) == ["0"] and report["median"] == report["recordings"]["0"]


def test_what_is_unknown_is_null(tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE // 3)
    sf.write(tmp_path / "noise.wav", noise, RATE)
    (tmp_path / "cut.wav").write_bytes(b"RIFF")
    codec = ["--codec", GOLDEN / "dacvae_tiny" / "weights.pth"]
    done = call("eval_codec", *codec, "--data", tmp_path, "--json", "--max_seconds", 0.25)
    report = json.loads(done.stdout, parse_constant=pytest.fail)
    assert report["median"]["f0_cents"] is None and report["median"]["mel_db"] > 0
    (said,) = done.stderr.splitlines()  # and no warning of NumPy's
    assert said.startswith("warning: left out 1 inputs of ") and "cut.wav" in said


def test_bad_input_gives_one_line_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {
        "expected recordings": ["--data", tmp_path / "empty"],
        "expected a count of 1 or more": ["--data", tmp_path, "--count", "0"],
        "nowhere does not exist": ["--data", tmp_path / "nowhere"],
        "cannot write": ["--data", tmp_path, "--output", Path(__file__)],
    }
    for said, words in cases.items():
        done = call("eval_codec", *words)
        assert done.returncode in (1, 2) and said in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
