"""Recommended generation settings: stored in the checkpoint, used by commands and library."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, random_model
from safetensors.numpy import load_file, save_file

import echo_eqx
from echo_eqx import EchoError, GenerationConfig, KnownVoice, SamplerSettings, UsageError, voice
from echo_eqx.commands import infer
from echo_eqx.config import DiTConfig, EncoderConfig
from echo_eqx.generation import generation_from_json
from echo_eqx.json_data import to_json
from echo_eqx.speech import batching
from echo_eqx.speech.chunks import target_seconds
from echo_eqx.speech.codec import find_codec
from echo_eqx.speech.requests import Request, check_outputs

SCRIPT = Path(__file__).parents[1] / "scripts" / "infer.py"
SMALL = DiTConfig(
    model_dim=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=24,
    text=EncoderConfig(8, 1, 2, 12),
    speaker=EncoderConfig(8, 1, 2, 12),
    latent_dim=3,
    time_embed_dim=8,
    adaln_rank=4,
)
ALL = GenerationConfig(
    sampler=SamplerSettings(steps=7, guidance="joint", start_t=0.9, speaker_kv_layers=1),
    duration=2.5,
    length="auto",
    frames_per_byte=1.25,
    reference_lufs=-30.5,
    codec="voice",
    codec_silence=(0.5, 1.0, -2.0),
    voices=(KnownVoice("eve", (1.0, 0.0, 0.0), 0.5), KnownVoice("bob", (0.0, 2.0, 0.0), 0.5)),
    voice_whitening=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
)


@pytest.fixture(scope="module")
def dit():
    return random_model(echo_eqx.EchoDiT, SMALL)


@pytest.fixture(scope="module")
def shipped():
    return echo_eqx.load_dit("voice"), echo_eqx.load_codec("voice")


def with_generation(tmp_path, dit, generation: GenerationConfig) -> echo_eqx.EchoDiT:
    echo_eqx.save(dit, tmp_path / "dit.safetensors", generation=generation)
    return echo_eqx.load_dit(tmp_path / "dit.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_saved_files_keep_generation_settings(tmp_path, dit, name):
    echo_eqx.save(dit, tmp_path / name, generation=ALL)
    loaded = echo_eqx.load_dit(tmp_path / name)
    assert loaded.generation == ALL
    echo_eqx.save(loaded, tmp_path / "again.safetensors", dtype="bfloat16")
    assert echo_eqx.load_dit(tmp_path / "again.safetensors").generation == ALL
    if name == "folder":
        described = json.loads((tmp_path / name / "config.json").read_text())
        assert described["generation"]["codec"] == "voice"


def test_files_without_settings_have_the_defaults(tmp_path, dit):
    assert with_generation(tmp_path, dit, GenerationConfig()).generation == GenerationConfig()
    published = echo_eqx.load_dit(GOLDEN / "dit_tiny" / "weights_only.pkl")
    assert published.generation == GenerationConfig()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sampler": {"steps": 0}}, "steps: expected 1 to"),
        ({"sampler": {"steps": 2.5}}, "steps"),
        ({"sampler": {"cfg_scale": float("inf")}}, "cfg_scale"),
        ({"sampler": {"guidance": ["joint"]}}, "guidance"),
        ({"sampler": {"warp": 1}}, "warp"),
        ({"sampler": 3}, "expected an object"),
        ({"duration": "long"}, "duration"),
        ({"length": "short"}, "length"),
        ({"frames_per_byte": 0}, "frames_per_byte: expected 0.001 to 1000"),
        ({"reference_lufs": 10**400}, "reference_lufs"),
        ({"codec": "a\x1b[2J"}, "codec"),
        ({"codec_silence": ["x"]}, "codec_silence"),
        ({"voices": [{"name": "eve"}]}, "voices"),
        ({"voice_whitening": [[1.0]]}, "voice_whitening: expected means and rows of 1 numbers"),
        ({"tempo": 1}, "tempo"),
    ],
)
def test_invalid_settings_are_rejected_by_name(tmp_path, dit, change, message):
    data = to_json(ALL) | change
    with pytest.raises(EchoError, match=message):
        generation_from_json(data)
    config = json.dumps(to_json(SMALL))
    echo_eqx.save(dit, tmp_path / "dit.safetensors")
    metadata = {"format": "echo_eqx", "kind": "dit", "config": config, "generation": "[" * 10_000}
    save_file(load_file(tmp_path / "dit.safetensors"), tmp_path / "deep.safetensors", metadata)
    with pytest.raises(EchoError, match="no usable generation settings"):
        echo_eqx.load_dit(tmp_path / "deep.safetensors")


def test_the_recommended_duration_is_the_default(tmp_path, dit, shipped):
    model = with_generation(tmp_path, dit, ALL)
    assert target_seconds(model, shipped[1]) == 2.5
    assert target_seconds(model, shipped[1], 1.0) == 1.0


def test_the_small_voice_has_generation_settings(shipped):
    generation = shipped[0].generation
    assert generation.sampler == voice.SETTINGS and generation.codec == "voice"
    assert generation.reference_lufs == voice.REFERENCE_LUFS
    assert [known.name for known in generation.voices] == ["anna", "ben", "clara", "david"]


def test_sampling_uses_the_recommended_settings(shipped, monkeypatch):
    given = []

    def stand_in(dit, *conditions, noise, settings, progress):
        given.append(settings)
        return noise

    monkeypatch.setattr(batching, "sample", stand_in)
    echo_eqx.synthesize(*shipped, "Hello.", length="full")
    echo_eqx.synthesize(*shipped, "Hello.", length="full", settings=SamplerSettings(steps=3))
    assert given == [voice.SETTINGS, SamplerSettings(steps=3)]


def test_an_unknown_voice_is_reported(tmp_path, dit, shipped):
    model = with_generation(tmp_path, dit, ALL)
    latents = np.tile(np.float32([1.0, 0.3, 0.0]), (8, 1))
    name, distance = echo_eqx.nearest_voice(model, latents)
    assert name == "eve" and distance == pytest.approx(0.3 / 3**0.5 / 0.5)
    assert echo_eqx.nearest_voice(dit, latents) is None  # it takes any voice
    for path in (voice.REFERENCES / "ben.flac", voice.REFERENCES / "clara.flac"):
        name, distance = echo_eqx.nearest_voice(
            shipped[0], echo_eqx.speaker_latents(*shipped, path)
        )
        assert name == path.stem and distance < 1
    hiss = np.random.default_rng(0).standard_normal(48_000).astype(np.float32)
    _, distance = echo_eqx.nearest_voice(shipped[0], echo_eqx.speaker_latents(*shipped, 0.1 * hiss))
    assert distance > 2


# --- The command --------------------------------------------------------------------------------


def flags(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["infer.py", "--text", "Hi.", *words])


def test_flags_override_what_the_file_recommends(monkeypatch, shipped):
    flags(monkeypatch, "--cfg_scale", "3.5")
    settings = infer.with_recommended(*shipped).sampler
    assert settings == dataclasses.replace(voice.SETTINGS, cfg_scale=3.5)


@pytest.mark.parametrize(
    "words, has_path, expected",
    [
        ([], False, None),
        ([], True, "drawn"),
        (["--no-watermark"], True, None),
        (["--no-watermark"], False, None),
        (["--watermark"], True, "drawn"),
        (["--watermark"], False, "--watermark: expected a codec that can embed"),
        (["--message", "01" * 8], False, "--message: expected a codec that can embed"),
        (["--message", "01" * 8], True, "01" * 8),
    ],
)
def test_watermarking_depends_on_the_codec(
    monkeypatch, shipped, golden_codec, words, has_path, expected
):
    flags(monkeypatch, *words)
    codec = golden_codec if has_path else shipped[1]
    args = infer.with_recommended(shipped[0], codec)
    if expected and expected.startswith("--"):
        with pytest.raises(UsageError, match=expected):
            infer.message_bits(args, codec)
        return
    bits = infer.message_bits(args, codec)
    assert (bits is None) == (expected is None)
    if bits is not None:
        assert len(bits) == 16
    request = Request("Hi.", Path("a.wav"))
    described = infer.effective_settings(args, request, "float32", bits)
    assert described["watermark"] == (bits is not None)


def test_the_checkpoint_chooses_the_codec(tmp_path, dit, shipped):
    assert find_codec(shipped[0]) == ("voice", voice.CODEC)
    assert find_codec(dit, str(voice.CODEC))[1] == voice.CODEC
    with pytest.raises(EchoError, match=r"names no codec, and its latents have 3 channels; give"):
        find_codec(dit)
    gone = dataclasses.replace(ALL, codec=str(tmp_path / "gone.safetensors"))
    with pytest.raises(EchoError, match=r"named by the checkpoint: .*gone\.safetensors does not"):
        find_codec(with_generation(tmp_path, dit, gone))


def test_json_overwrites_only_its_own_files(tmp_path):
    ours = {"text": "", "output": "", "checkpoint": {}, "codec": {}, "version": {"echo_eqx": "0"}}
    contents = {
        "ours.json": json.dumps(ours),
        "config.json": json.dumps({"model_dim": 3, "version": {"echo_eqx": "0"}}),
        "list.json": "[1, 2]",
        "deep.json": "[" * 100_000,
        "text.json": "my notes",
        "bytes.json": "\ufeff",
        "empty.json": "",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    fine = {"ours", "new"}
    for name in [*(name.removesuffix(".json") for name in contents), "folder", "link", "new"]:
        request = Request("Hi.", tmp_path / f"{name}.wav")
        if name in fine:
            check_outputs([request], metadata=True)
        else:
            with pytest.raises(EchoError, match=rf"{name}\.json was not written by this command"):
                check_outputs([request], metadata=True)
        check_outputs([request], metadata=False)  # without --json nothing is replaced


def test_the_output_never_overwrites_the_reference(tmp_path):
    recording = tmp_path / "voice.wav"
    recording.write_bytes(b"x")
    request = Request("Hi.", tmp_path / "." / "voice.wav", recording)
    with pytest.raises(EchoError, match="would replace the reference"):
        check_outputs([request], metadata=False)
