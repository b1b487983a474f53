"""Codec training: losses, crops, one step over a mesh, and runs in real processes."""

import dataclasses
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import processes
import pytest
import soundfile as sf
from conftest import max_difference
from processes import SCRIPTS, xla_flags

import echo_eqx
from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.codec.residual import sine_squared
from echo_eqx.config import CodecConfig
from echo_eqx.data.quality import signal_to_distortion
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.prepare.clips import list_clips
from echo_eqx.sharding.mesh import batch_sharding, make_mesh, mesh_shape, replicated
from echo_eqx.train.codec.augment import vary
from echo_eqx.train.codec.config import CodecLossConfig, CodecTrainConfig
from echo_eqx.train.codec.crops import CropStream
from echo_eqx.train.codec.discriminators import discriminator_loss, generator_losses
from echo_eqx.train.codec.losses import (
    WINDOWS,
    _autocorrelation,
    kl_divergence,
    log_distance,
    magnitudes,
    mel_filters,
    periodicity_distance,
    spectral_distances,
    spectrum,
)
from echo_eqx.train.codec.standardize import rescaled
from echo_eqx.train.codec.step import (
    AudioBatch,
    init_train_state,
    make_step,
    reconstruct,
)

SIZES = CodecConfig(
    encoder_dim=4,
    encoder_rates=(4, 5),
    hidden_dim=8,
    latent_dim=3,
    decoder_dim=12,
    decoder_rates=(5, 4),
    sample_rate=8000,
    watermark=None,
)


def config(**changes) -> CodecTrainConfig:
    return dataclasses.replace(CodecTrainConfig(data="x", batch_size=8, num_steps=40), **changes)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for i, seconds in enumerate((0.3, 0.9, 1.4, 0.1)):
        sound = 0.3 * np.sin(np.cumsum(rng.uniform(0.05, 0.5, int(seconds * 8000))))
        sf.write(folder / f"{i}.wav", sound, 8000)
        (folder / f"{i}.txt").write_text("Words.\n")
    return folder


def crops_of(folder: Path, rows, step: int = 0, seed: int = 0, samples: int = 800) -> CropStream:
    clips, _ = list_clips(str(folder), max_seconds=1e6, cache=folder)
    return CropStream(clips, sample_rate=8000, samples=samples, rows=rows, seed=seed, step=step)


# --- Losses ---------------------------------------------------------------------------------------


def test_white_noise_has_magnitudes_around_one_at_every_resolution():
    noise = jr.normal(jr.key(0), (24_000,))
    for window in (128, 512, 2048):
        assert float(jnp.sqrt(jnp.mean(magnitudes(noise, window) ** 2))) == pytest.approx(1, 0.05)


def test_a_tone_is_in_the_mel_band_of_its_frequency():
    tone = jnp.sin(2 * jnp.pi * jnp.arange(24_000.0) / 24)
    mel = np.asarray(magnitudes(tone, 512) @ mel_filters(24_000, 512))
    step = 2595 * np.log10(1 + 12_000 / 700) / 81  # bands lie at equal distances in mel
    expected = 2595 * np.log10(1 + 1000 / 700) / step - 1
    assert abs(np.argmax(mel.mean(0)) - expected) <= 1


def test_spectral_distances_measure_ratios_and_ignore_silence():
    ones = jnp.ones((4, 5))
    assert float(log_distance(ones, 100 * ones)) == pytest.approx(2)
    assert float(log_distance(1e-5 * ones, 1e-9 * ones)) == 0
    audio = 0.1 * jr.normal(jr.key(1), (4000,))
    assert [float(x) for x in spectral_distances(audio, audio, 8000)] == [0, 0]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_spectrum_is_the_fourier_transform_under_a_hann_window(window):
    audio = np.random.default_rng(window).standard_normal(3 * window).astype(np.float32)
    hann = np.hanning(window + 1)[:-1]
    frames = np.lib.stride_tricks.sliding_window_view(audio, window)[:: window // 4]
    wanted = np.fft.rfft(frames * hann / np.linalg.norm(hann))
    ours = spectrum(jnp.asarray(audio), window)
    assert max_difference(ours, np.stack([wanted.real, wanted.imag], axis=-1)) < 1e-5


def test_autocorrelations_are_the_transform_of_the_power():
    power = np.random.default_rng(0).uniform(size=(3, 129)).astype(np.float32)
    lags = (0, 1, 40, 128)
    assert max_difference(power @ _autocorrelation(256, lags), np.fft.irfft(power)[:, lags]) < 1e-6


def test_periodicity_measures_pitch_and_ignores_phase_and_level():
    def pulses(period: int, first: int = 0) -> jnp.ndarray:
        return jnp.zeros(4096).at[first::period].set(0.5)

    def distance(*sounds) -> float:
        return float(periodicity_distance(*sounds, 8000))

    voice = pulses(40)
    assert distance(voice, voice) == 0
    assert distance(0.3 * pulses(40, 17), voice) < 1e-3
    octave, third = distance(pulses(80), voice), distance(pulses(50), voice)
    assert octave > 0.01 and third > 0.03
    assert distance(pulses(40)[:500], voice[:500]) == 0  # no frame fits


def test_kl_divergence_is_that_of_gaussians():
    mean, deviation = jnp.array([[0.0, 2.0]]), jnp.array([[1.0, 0.5]])
    expected = (0.0 + 0.5 * (4 + 0.25 - 1) - np.log(0.5)) / 2
    assert float(kl_divergence(mean, deviation)) == pytest.approx(expected)


def test_signal_to_distortion_is_scale_invariant():
    rng = np.random.default_rng(0)
    audio, noise = rng.standard_normal((2, 4000))
    noise -= audio * (noise @ audio) / (audio @ audio)
    noise *= 0.1 * np.linalg.norm(audio) / np.linalg.norm(noise)
    for scale in (1.0, -0.3):
        assert signal_to_distortion(scale * (audio + noise), audio) == pytest.approx(20, abs=0.2)


@pytest.mark.slow
def test_every_parameter_of_the_main_path_is_trained():
    codec = jax.jit(lambda key: DACVAE.init(SIZES, key=key))(jr.key(0))
    audio = 0.3 * jnp.sin(0.2 * jnp.arange(800.0))

    def loss(codec):
        decoded = reconstruct(codec, audio, jr.key(1), False)
        mel, _ = spectral_distances(decoded.audio, audio, 8000)
        return mel + 0.1 * kl_divergence(decoded.mean, decoded.std)

    changes = jax.tree.leaves(jax.jit(jax.grad(loss))(codec))
    assert all(bool(jnp.any(change != 0)) for change in changes)


def test_the_gradient_of_sine_squared_is_sin_2z():
    z = jnp.linspace(-9, 9, 1001)
    slope = jax.vmap(jax.grad(lambda z: sine_squared(z)))(z)
    assert max_difference(slope, np.sin(2 * np.asarray(z, np.float64))) < 1e-5


def test_a_standardized_codec_decodes_the_same_audio():
    codec = jax.jit(lambda key: DACVAE.init(SIZES, key=key))(jr.key(0))
    audio = 0.3 * np.sin(0.2 * np.arange(4000, dtype=np.float32) ** 1.1)
    # As in a trained bottleneck: narrow around the mean.
    narrow = codec.bottleneck.in_proj.bias.at[SIZES.latent_dim :].set(-8.0)
    codec = eqx.tree_at(lambda c: c.bottleneck.in_proj.bias, codec, narrow)
    mean, deviation = codec.encode(audio)
    center, spread = np.asarray(mean).mean(0), np.asarray(mean).std(0)
    changed = rescaled(codec, center, spread)
    standard, standard_deviation = changed.encode(audio)
    np.testing.assert_allclose(np.asarray(standard).mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(standard).std(0), 1, rtol=1e-4)
    expected = (deviation - 1e-4) / spread[None]
    np.testing.assert_allclose(standard_deviation - 1e-4, expected, rtol=0.02)
    assert max_difference(changed.decode(standard), codec.decode(mean)) < 1e-5


# --- Crops ----------------------------------------------------------------------------------------


def test_crops_are_the_same_on_any_number_of_hosts_and_from_any_step(recordings):
    whole = crops_of(recordings, range(6))
    batches = [next(whole) for _ in range(4)]
    assert batches[0].batch.audio.shape == (6, 800) and len(set(batches[3].keys)) > 1
    for rows in (range(2), range(2, 6)):
        part = crops_of(recordings, rows, step=3)
        np.testing.assert_array_equal(next(part).batch.audio, batches[3].batch.audio[list(rows)])
        part.close()
    other = crops_of(recordings, range(6), seed=1)
    assert np.any(next(other).batch.audio != batches[0].batch.audio)
    whole.close()
    other.close()


def test_short_recordings_are_padded_and_long_ones_sampled_more_often(recordings):
    stream = crops_of(recordings, range(8), samples=1600)
    met = {"0": [], "1": [], "2": [], "3": []}
    for _ in range(25):
        crops = next(stream)
        for key, audio in zip(crops.keys, crops.batch.audio, strict=True):
            met[key].append(audio)
    stream.close()
    assert len(met["2"]) > 2 * len(met["0"]) > 0
    assert all(np.any(audio[-80:]) for audio in met["1"])
    # 0.1 s, or 800 samples, and then silence.
    assert met["3"] and all(np.any(a[700:800]) and not np.any(a[800:]) for a in met["3"])


def test_pauses_are_crops_too(tmp_path):
    tone = 0.3 * np.sin(np.arange(800))
    sf.write(tmp_path / "pause.wav", np.concatenate([tone, np.zeros(8000), tone]), 8000)
    (tmp_path / "pause.txt").write_text("Wait.")
    clips, _ = list_clips(str(tmp_path), max_seconds=1e6, cache=tmp_path)
    stream = CropStream(clips, sample_rate=8000, samples=400, rows=range(20), seed=0)
    sounds = next(stream).batch.audio.any(axis=1)
    stream.close()
    assert sounds.any() and not sounds.all() and not stream.broken


def test_varied_crops_have_other_pitches_and_levels_and_are_the_same_from_any_step(tmp_path):
    sf.write(
        tmp_path / "tone.wav", 0.999 * np.sin(2 * np.pi * 200 / 8000 * np.arange(80_000)), 8000
    )
    (tmp_path / "tone.txt").write_text("A tone.")
    clips, _ = list_clips(str(tmp_path), max_seconds=1e6, cache=tmp_path)
    sizes = dict(sample_rate=8000, samples=4000, rows=range(100), seed=0, augment=True)
    stream, later = CropStream(clips, **sizes), CropStream(clips, step=1, **sizes)
    crops, second = next(stream).batch.audio, next(stream).batch.audio
    np.testing.assert_array_equal(next(later).batch.audio, second)
    stream.close()
    later.close()
    assert crops.shape == (100, 4000) and crops.dtype == np.float32
    peaks = 20 * np.log10(np.abs(crops).max(axis=1))
    assert peaks.max() <= 1e-5 and peaks.min() > -30.1 and peaks.std() > 5
    pitches = 2 * np.argmax(np.abs(np.fft.rfft(crops)), axis=1)  # bins of 2 Hz
    assert 155 <= pitches.min() < 170 and 235 < pitches.max() <= 255

    def purity(audio):
        power = np.abs(np.fft.rfft(audio * np.hanning(4000), axis=1)) ** 2
        return np.sort(power, axis=1)[:, -6:].sum(axis=1) / power.sum(axis=1)

    # Noise or echoes in about half of them.
    assert 0.2 < (purity(crops) < 0.9999).mean() < 0.8


def test_quiet_crops_are_not_made_louder():
    hiss = 1e-3 * np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    for seed in range(40):
        varied = vary(hiss, 8000, np.random.default_rng(seed))
        assert np.abs(varied).max() < 4 * np.abs(hiss).max()


def test_a_damaged_recording_is_replaced_and_many_are_an_error(recordings, tmp_path):
    for path in recordings.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    clips, _ = list_clips(str(tmp_path), max_seconds=1e6, cache=tmp_path)
    content = (tmp_path / "1.wav").read_bytes()
    (tmp_path / "1.wav").write_bytes(content[: len(content) // 2])
    sizes = dict(sample_rate=8000, samples=800, rows=range(4), seed=0)
    patient = CropStream(clips, max_broken=0.9, **sizes)
    keys = [key for _ in range(10) for key in next(patient).keys]
    assert "1" not in keys and len(keys) == 40 and sum(patient.broken.values()) > 0
    patient.close()
    strict = CropStream(clips, max_broken=0.01, **sizes)
    with pytest.raises(EchoError, match=r"got \d+ of \d+; the first: 1\.wav is truncated"):
        for _ in range(10):
            next(strict)
    strict.close()


# --- A step ---------------------------------------------------------------------------------------


def run_step(devices: int, settings: CodecTrainConfig, steps: int = 2, samples: int = 1200):
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(devices, 1, 1), ("data", "fsdp", "tensor")
    )
    init = jax.jit(
        lambda key: init_train_state(DACVAE.init(SIZES, key=key), settings, key),
        out_shardings=replicated(mesh),
    )
    state = init(jr.key(0))
    step = make_step(mesh, SIZES, settings, state)
    audio = 0.2 * np.random.default_rng(0).standard_normal((8, samples)).astype(np.float32)
    batch = AudioBatch(jax.device_put(audio, batch_sharding(mesh)))
    before = jax.tree.map(np.array, state.model)  # the step takes the state's memory
    metrics = None
    for _ in range(steps):
        state, metrics = step(state, batch, jax.device_put(jr.key(1), replicated(mesh)))
    return before, jax.device_get(state), jax.device_get(metrics)


@pytest.mark.full  # a minute of compiling
def test_a_step_on_eight_devices_equals_one_on_a_single_device():
    _, one, of_one = run_step(1, config())
    _, eight, of_eight = run_step(8, config())
    assert max_difference(of_one.loss, of_eight.loss) < 1e-5 * of_one.loss
    # Adam moves every number by about the rate, whatever the gradient's size: the moments tell.
    for a, b in zip(jax.tree.leaves(one.adam.mu), jax.tree.leaves(eight.adam.mu), strict=True):
        assert max_difference(a, b) <= 1e-4 * np.abs(a).max() + 1e-9
    assert set(of_one.terms) == {"mel", "stft", "periodicity", "waveform", "kl"}


@pytest.mark.slow
def test_a_frozen_encoder_does_not_change():
    before, after, _ = run_step(1, config(freeze_encoder=True, init_from="x"))
    kept = [(before.encoder, after.model.encoder)]
    kept += [(before.bottleneck.in_proj, after.model.bottleneck.in_proj)]
    for old, new in kept:
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.any(before.decoder.conv_in.weight != after.model.decoder.conv_in.weight)


@pytest.mark.full  # twenty discriminators take a minute to compile
def test_discriminators_are_trained_too():
    settings = config(loss=CodecLossConfig(adversarial=1.0))
    _, after, metrics = run_step(1, settings, samples=2400)
    assert bool(metrics.updated)
    assert set(metrics.terms) >= {"adversarial", "feature_matching", "discriminator"}
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(after.discriminators_adam.mu))


def test_losses_of_discriminators_are_least_squares():
    def seen(verdict: float, feature: float):
        return [[jnp.full((2, 3), feature), jnp.full((2,), verdict)]]

    real, decoded = seen(0.8, 1.0), seen(0.3, 1.5)
    assert float(discriminator_loss(real, decoded)) == pytest.approx(0.2**2 + 0.3**2)
    verdict, alike = generator_losses(real, decoded)
    assert float(verdict) == pytest.approx(0.7**2) and float(alike) == pytest.approx(0.5)


# --- Real runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("codec_runs")


def train(home: Path, recordings: Path, run: str, *flags: str, code: int = 0) -> str:
    source = ["--data", str(recordings), "--run_dir", str(home / run)]
    sizes = "--sample_rate 8000 --encoder_dim 4 --encoder_rates 4 5 --latent_dim 3".split()
    lengths = "--decoder_dim 12 --crop_seconds 0.1 --batch_size 4 --log_every 1".split()
    options = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags()}
    done = processes.run(SCRIPTS / "train_codec.py", *source, *sizes, *lengths, *flags, **options)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


WHOLE = ("--num_steps", "6", "--checkpoint_every", "3")


def lines_of(home: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (home / run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(home, recordings):
    held_out = ["--eval_data", str(recordings), "--eval_every", "4", "--eval_batches", "2"]
    samples = ["--sample_every", "6", "--sample_count", "2"]
    train(home, recordings, "whole", *held_out, *samples, *WHOLE)
    return home / "whole"


def test_every_command_accepts_the_trained_codec(whole):
    lines = lines_of(whole.parent, "whole")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["mel"] > 0 and line["periodicity"] > 0 for line in lines)
    assert all(line["loss"] > 0 for line in lines)
    assert {"eval_loss", "eval_mel", "eval_si_sdr"} <= set(lines[3])
    codec = echo_eqx.load_codec(whole)
    assert codec.config == dataclasses.replace(SIZES, hidden_dim=256)
    exported = echo_eqx.load_codec(whole / "checkpoints" / "step_000000006.safetensors")
    assert max_difference(exported.decoder.conv_in.weight, codec.decoder.conv_in.weight) < 0.01
    names = sorted(path.name for path in (whole / "samples" / "step_000000006").iterdir())
    assert names == [f"{i}.{end}" for i in (0, 1) for end in ("original.wav", "txt", "wav")]
    with pytest.raises(EchoError, match="expected an EchoDiT, got a codec"):
        echo_eqx.load_dit(whole)


def test_a_resumed_run_has_bit_identical_losses(whole, home, recordings):
    folder = home / "cut"
    shutil.copytree(whole, folder)
    # As if killed after step 3: nothing later exists.
    for path in sorted((folder / "checkpoints").glob("step_000000006*"), reverse=True):
        for child in sorted(path.iterdir()) if path.is_dir() else []:
            child.unlink()
        path.rmdir() if path.is_dir() else path.unlink()
    said = train(home, recordings, "cut", *WHOLE)
    assert "resuming after step 3" in said
    losses = [[line["loss"] for line in lines_of(home, run)] for run in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_unusable_inputs_give_one_line_errors(whole, home, recordings, tmp_path):
    refusals = {
        "model: expected one of .*, got 'big'": {"model": "big"},
        "--data is missing": {"data": None},
        "crop_seconds: expected a positive number, got 0.0": {"crop_seconds": 0.0},
        "loss.mel: expected 0 or more, got -1.0": {"loss": CodecLossConfig(mel=-1.0)},
        "--freeze_encoder needs the trained encoder of --init_from": {"freeze_encoder": True},
        "batch_size: expected at least 1, got 0": {"batch_size": 0},
        "encoder_rates: expected factors": {"encoder_rates": (4, 0)},
    }
    for message, changes in refusals.items():
        with pytest.raises(UsageError, match=message):
            config(**changes).check()
    short = train(home, recordings, "short", "--crop_seconds", "0.001", code=2)
    assert "expected at least 128 samples, the shortest STFT window, got 0.001 s" in short
    said = train(home, tmp_path, "none", code=1)
    assert said.count("\n") == 1 and ": expected recordings" in said
    dit = train(home, recordings, "whole", "--latent_dim", "4", "--num_steps", "7", code=1)
    assert "has another architecture: expected latent_dim 4, got 3" in dit


def test_meshes_that_do_not_fit_are_rejected():
    with pytest.raises(UsageError, match="expected a mesh of 8 devices"):
        make_mesh(mesh_shape("data=3", 8))
