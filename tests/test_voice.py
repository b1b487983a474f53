"""The voice in the package: it speaks intelligibly, and can be trained further."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA
from processes import SCRIPTS, call, flags, run, xla_flags

import echo_eqx
from echo_eqx import SamplerSettings, voice
from echo_eqx.config import CODEC_PRESETS, DIT_PRESETS
from echo_eqx.data.cepstra import mel_cepstra
from echo_eqx.data.pace import measure_frames_per_byte
from echo_eqx.data.shards import list_shards
from echo_eqx.voice.curve import VARIANTS, num_evaluations
from echo_eqx.voice.evaluate import generate, reference_files
from echo_eqx.voice.grammar import held_out_texts, training_texts
from echo_eqx.voice.similarity import dtw_distances


def test_all_packaged_files_are_small_and_complete():
    files = [path for path in Path(voice.__file__).parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert echo_eqx.load_codec("voice").config == CODEC_PRESETS["24khz"]
    assert echo_eqx.load_dit("voice").config == DIT_PRESETS["voice"]
    assert len(reference_files(voice.REFERENCES)) == 4


def test_held_out_sentences_are_intelligible():
    """The speech of two sentences that were never trained on is nearest to espeak-ng's own
    recording of the same text, among fifty, where chance finds one in fifty.
    `tests/data/held_out.npz` has the mel cepstra of those."""
    stored = np.load(DATA / "held_out.npz")
    texts = [str(text) for text in stored["texts"]]
    assert texts == held_out_texts("seen", len(texts))
    assert not set(texts) & set(islice(training_texts(0), 9000))
    ends = np.cumsum(stored["lengths"])
    originals = np.split(stored["cepstra"].astype(np.float64), ends[:-1])
    dit, codec = echo_eqx.load_dit(voice.CHECKPOINT), echo_eqx.load_codec(voice.CODEC)
    reference = {"anna": voice.REFERENCES / "anna.flac"}
    spoken = generate(dit, codec, texts[:2], reference, voice.SETTINGS)
    for i, audio in enumerate(spoken):
        cepstra = mel_cepstra(audio, codec.config.sample_rate)
        assert np.argmin(dtw_distances(cepstra, originals)) == i


@pytest.mark.slow
def test_training_on_the_packaged_shards_lowers_the_loss_and_speaks(tmp_path):
    settings = flags(
        num_steps=12,
        batch_size=4,
        max_frames=96,
        checkpoint_every=12,
        sample_every=0,
        log_every=4,
        run_dir="run",
    )
    done = run(SCRIPTS / "train.py", *settings, cwd=tmp_path, XLA_FLAGS=xla_flags())
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 12 and np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    # The run knows its codec and settings, and so does its export.
    checkpoint = ["--checkpoint", "run", "--steps", "4", "--json"]
    done = call("infer", *flags(text="Hello.", output="early.wav"), *checkpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "early.json").read_text())
    assert described["steps"] == 4 and described["cfg_scale"] == voice.SETTINGS.cfg_scale
    assert described["codec"]["source"] == "voice"
    exported = echo_eqx.load_dit(tmp_path / "run" / "checkpoints" / "step_000000012.safetensors")
    assert exported.generation == echo_eqx.load_dit(tmp_path / "run").generation
    assert exported.generation.sampler == voice.SETTINGS
    shards = list_shards(str(voice.SHARDS), tmp_path)
    assert exported.generation.frames_per_byte == measure_frames_per_byte(shards)
    assert (tmp_path / "early.wav").stat().st_size > 1000


@pytest.mark.slow
def test_losses_of_two_hundred_steps_do_not_depend_on_remat(tmp_path):
    """Rounding differs from the first update on; its effect grows, but not beyond 2 %."""
    losses = {}
    for remat in ("none", "dots", "full"):
        settings = flags(num_steps=200, batch_size=4, max_frames=96, checkpoint_every=200)
        settings += flags(sample_every=0, eval_every=1000, remat=remat, run_dir=remat)
        done = run(SCRIPTS / "train.py", *settings, cwd=tmp_path, XLA_FLAGS="")
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (tmp_path / remat / "metrics.jsonl").open()]
        losses[remat] = np.array([line["loss"] for line in lines])
    for remat in ("dots", "full"):
        difference = np.abs(losses[remat] / losses["none"] - 1)
        print(f"{remat}: {difference[:20].max():.1e} in 20 steps, {difference.max():.1e} in 200")
        assert len(difference) == 200
        assert difference[:20].max() < 1e-4 and difference.max() < 0.02


def test_evaluations_are_counted_with_the_branches_of_new_guidance():
    for changes, expected in (
        ({}, 10 + 2 * 7),  # t = 1, 0.9, ... 0.4
        ({"guidance": "joint"}, 10 + 7),
        ({"guidance_every": 2}, 10 + 2 * 4),
        ({"guidance_every": 100}, 10 + 2),
        ({"sway": -1.0}, 10 + 2 * 8),
    ):
        settings = SamplerSettings(steps=10, cfg_min_t=0.35, **changes)
        assert num_evaluations(settings) == expected, changes


@pytest.mark.slow
def test_the_curve_is_a_table_and_a_plot(tmp_path):
    words = flags(count=2, kinds="small", curve=2, plot="curve.png", output="out")
    done = call("eval_voice", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 1 + len(VARIANTS) and {row.count("|") for row in rows} == {11}
    converged, *others = json.loads((tmp_path / "out" / "report.json").read_text())
    assert converged["steps"] == 256 and converged["converged_mcd_db"] == 0
    assert all(point["converged_mcd_db"] > 1 for point in others)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
