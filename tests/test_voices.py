"""Voices: made from recordings, kept as files, used by name, refused with another codec."""

import dataclasses
import json
import re

import jax
import numpy as np
import programs
import pytest
import soundfile as sf
from conftest import DATA, max_difference, random_model
from processes import call

import echo_eqx
from echo_eqx import EchoError, UsageError, voice
from echo_eqx.config import CodecConfig
from echo_eqx.data.quality import find_voice_change, signal_to_noise
from echo_eqx.data.reference import load_reference
from echo_eqx.data.text import encode_text, normalize_text
from echo_eqx.files import write_whole
from echo_eqx.generation import GenerationConfig, KnownVoice
from echo_eqx.speech.codec import codec_identity, silence_latent
from echo_eqx.speech.continuation import continue_recording
from echo_eqx.speech.joining import decode_with_silence
from echo_eqx.speech.make_voice import make_voice
from echo_eqx.speech.speaker import encode_speech, speaker_latents
from echo_eqx.speech.voices import (
    Voice,
    VoiceInfo,
    check_codec,
    default_folder,
    find_voice,
    list_voices,
    load_voice,
    remove_voice,
    save_voice,
)
from echo_eqx.weights.safetensors_writer import save_arrays

RNG = np.random.default_rng(0)
INFO = VoiceInfo("Ann, by letter", -23.0, 24_000, 960, "0" * 64, sources=("a.wav",))


def some_voice(name: str = "ann", frames: int = 13, channels: int = 6) -> Voice:
    latents = RNG.standard_normal((frames, channels)).astype(np.float32)
    return Voice(name, latents, np.ones(channels, np.float32), INFO)


def test_a_voice_comes_back_bit_for_bit_with_what_is_known_of_it(tmp_path):
    made = some_voice()
    path = save_voice(made, tmp_path / "new" / "folder")
    again = load_voice(path)
    assert path.name == "ann.safetensors" and again.name == "ann" and again.info == made.info
    assert np.array_equal(again.latents, made.latents) and np.array_equal(again.silence, [1] * 6)
    assert again.seconds == 13 * 960 / 24_000
    assert [file.name for file in path.parent.iterdir()] == ["ann.safetensors"]


def test_a_voice_is_only_replaced_on_request_and_by_nothing_but_a_voice(tmp_path):
    path = save_voice(some_voice(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(EchoError, match=r"exists already; .* --overwrite"):
        save_voice(some_voice(), tmp_path)
    assert path.read_bytes() == before
    save_voice(some_voice(frames=7), tmp_path, overwrite=True)
    assert len(load_voice(path).latents) == 7
    save_arrays(tmp_path / "model.safetensors", {"w": np.ones(3, np.float32)}, {})
    for act in (
        lambda: save_voice(some_voice("model"), tmp_path, overwrite=True),
        lambda: remove_voice("model", tmp_path),
    ):
        with pytest.raises(EchoError, match="expected a voice"):
            act()
    assert remove_voice("ann", tmp_path) == path
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def damaged(tmp_path):
    """Files that are no voices, with what is said of each."""
    good = some_voice()
    info = json.dumps(dataclasses.asdict(good.info))
    arrays = {"latents": good.latents, "silence": good.silence}

    def write(name, kind="voice", data=info, **changed):
        path = tmp_path / f"{name}.safetensors"
        save_arrays(path, arrays | changed, {"format": "echo_eqx", "kind": kind, "voice": data})
        return path

    bits = bytearray(save_voice(good, tmp_path).read_bytes())
    bits[-3] ^= 1
    (tmp_path / "flip.safetensors").write_bytes(bits)
    (tmp_path / "cut.safetensors").write_bytes(bits[:-8])
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.truncate(2**27)
    nan = np.full((4, 6), np.nan, np.float32)
    return {
        tmp_path / "none.safetensors": "does not exist",
        tmp_path: "not a regular file",
        tmp_path / "flip.safetensors": "silence is damaged",
        tmp_path / "cut.safetensors": "not a readable safetensors",
        tmp_path / "huge.safetensors": "at most 67108864 bytes",
        write("model", "dit"): "expected a voice",
        write("json", data="{"): "not a readable voice",
        write("unknown", data='{"pose": 1}'): "unknown field pose",
        write("mute", data=info.replace("Ann, by letter", " ")): "consent: expected 1 to 2000",
        write("path", data=info.replace("a.wav", "/home/a.wav")): "names without folders",
        write("rate", data=info.replace("24000", "1e99")): "sample_rate: expected a whole number",
        write("nan", latents=nan): "expected finite latents",
        write("long", latents=np.zeros((3002, 6), np.float32)): "1 to 3001 frames",
        write("empty", latents=np.zeros((0, 6), np.float32)): "1 to 3001 frames",
        write("other", more=np.zeros(3, np.float32)): "silence .channels,., got",
        write("half", latents=good.latents.astype(np.float16)): "expected float32 latents",
        write("narrow", silence=good.silence[:5]): "silence .channels,., got",
    }


def test_files_that_are_no_voices_are_refused_by_name(tmp_path):
    for path, message in damaged(tmp_path).items():
        with pytest.raises(EchoError, match=message) as caught:
            load_voice(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "a/b", "../a", ".a", "a.b", "-a", "ä", "a b", "a" * 65, "a\n"]
)
def test_names_are_never_paths(tmp_path, name):
    for act in (
        lambda: save_voice(some_voice(name), tmp_path),
        lambda: find_voice(name, tmp_path),
        lambda: remove_voice(name, tmp_path),
    ):
        with pytest.raises(UsageError, match="name of a voice: expected 1 to 64 letters"):
            act()
    assert not list(tmp_path.iterdir())


def test_voices_in_the_package_are_listed_too_and_stay(tmp_path):
    built_in = {"anna", "ben", "clara", "david"}
    assert set(list_voices(tmp_path)) == built_in
    path = save_voice(some_voice("ann"), tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "no voice.safetensors").touch()
    voices = list_voices(tmp_path)
    assert (
        set(voices) == {"ann", *built_in} and voices["ann"] == find_voice("ann", tmp_path) == path
    )
    assert find_voice("ben", tmp_path) == voice.REFERENCES / "ben.flac"
    with pytest.raises(UsageError, match="ben is in the package"):
        save_voice(some_voice("ben"), tmp_path)
    with pytest.raises(EchoError, match="ben is in the package"):
        remove_voice("ben", tmp_path)
    with pytest.raises(EchoError, match=r"no voice nobody .* ann, anna, ben"):
        find_voice("nobody", tmp_path)
    with pytest.raises(EchoError, match="expected a folder of voices"):
        list_voices(tmp_path / "none")


def test_the_users_folder_is_that_of_the_xdg_specification(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "echo_eqx" / "voices"
    assert set(list_voices()) == {"anna", "ben", "clara", "david"}  # it need not exist
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", ignored)
        monkeypatch.setenv("HOME", "/home/ann")
        assert str(default_folder()) == "/home/ann/.local/share/echo_eqx/voices"


def test_a_voice_made_in_the_meantime_is_not_replaced(tmp_path):
    path = tmp_path / "ann.safetensors"

    def write(temporary):
        temporary.write_text("mine")
        path.write_text("theirs")  # another process was faster

    with pytest.raises(FileExistsError):
        write_whole(path, write, replace=False)
    assert path.read_text() == "theirs" and list(tmp_path.iterdir()) == [path]


def test_a_voice_of_another_codec_is_refused(golden_codec):
    config = golden_codec.config
    silence = silence_latent(golden_codec)
    made = some_voice(channels=config.latent_dim)
    sizes = {"sample_rate": config.sample_rate, "hop": config.hop}
    info = dataclasses.replace(INFO, **sizes, codec_sha256=codec_identity(golden_codec))
    check_codec(dataclasses.replace(made, info=info), golden_codec)
    info = dataclasses.replace(info, codec_sha256="0" * 64, codec="some/codec")
    check_codec(dataclasses.replace(made, info=info, silence=silence + 0.01), golden_codec)
    for changed, message in (
        ({"silence": silence + 0.2}, r"some/codec\), got another one: .* differs by 0.20 RMS"),
        ({"info": dataclasses.replace(info, hop=960)}, "12 channels at 48000 Hz / 960, got"),
    ):
        with pytest.raises(EchoError, match=f"voice ann: expected the codec .*{message}"):
            check_codec(dataclasses.replace(made, **({"info": info} | changed)), golden_codec)


# --- Recordings ---------------------------------------------------------------------------------

RATE = 24_000


CODEC = CodecConfig(
    encoder_dim=2,
    encoder_rates=(24, 40),
    hidden_dim=8,
    latent_dim=6,
    decoder_dim=8,
    decoder_rates=(40, 24),
    sample_rate=RATE,
    watermark=None,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny model and its codec."""
    folder = tmp_path_factory.mktemp("models")
    config = dataclasses.replace(programs.DIT, max_frames=50, max_speaker_frames=48)
    codec = random_model(echo_eqx.DACVAE, CODEC, 0.3)
    silence = tuple(silence_latent(codec).tolist())
    voices = (KnownVoice("ann", silence, 100.0),)
    whitening = tuple(map(tuple, np.eye(6).tolist()))
    generation = GenerationConfig(
        reference_lufs=-22.5, codec_silence=silence, voices=voices, voice_whitening=whitening
    )
    dit = random_model(echo_eqx.EchoDiT, config, 0.3)
    echo_eqx.save(dataclasses.replace(dit, generation=generation), folder / "dit.safetensors")
    echo_eqx.save(codec, folder / "codec.safetensors")
    return folder


@pytest.fixture(scope="module")
def codec(models):
    return echo_eqx.load_codec(models)


@pytest.fixture(scope="module")
def speech():
    """Speech of the voices in the package."""
    paths = sorted(voice.REFERENCES.glob("*.flac"))
    return {path.stem: load_reference(path, RATE, 120.0) for path in paths}


def noise(samples: int, like: np.ndarray, decibels: float) -> np.ndarray:
    """White noise so far below the louder half of `like`."""
    blocks = np.sort(np.square(like[: len(like) // 240 * 240]).reshape(-1, 240).mean(axis=1))
    level = np.sqrt(blocks[len(blocks) // 2 :].mean()) * 10 ** (-decibels / 20)
    return (level * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)


def test_recordings_are_joined_at_one_level_without_their_silence(codec, speech, tmp_path):
    anna = speech["anna"]
    sf.write(tmp_path / "loud.wav", 3 * anna, RATE, subtype="FLOAT")
    sf.write(tmp_path / "quiet.wav", 0.05 * anna, RATE, subtype="FLOAT")
    sf.write(tmp_path / "late.flac", np.pad(anna, (3 * RATE, RATE)), RATE)
    quiet = ("C:/home/quiet.wav", (tmp_path / "quiet.wav").read_bytes())
    files = [tmp_path / "loud.wav", quiet, tmp_path / "late.flac"]
    made = make_voice("ann", files, codec, consent=" Anna, on paper ", lufs=-20.0)
    assert made.info.sources == ("loud.wav", "quiet.wav", "late.flac")
    assert made.info.warnings == () and made.info.consent == "Anna, on paper"
    assert made.info.made and made.info.version
    expected = encode_speech(codec, anna, -20.0)
    for start in (0, len(expected)):
        part = made.latents[start : start + len(expected)]
        assert max_difference(part[10:-10], expected[10:-10]) < 0.02
    assert abs(made.seconds - 3 * len(anna) / RATE) < 0.3
    assert max_difference(made.silence, silence_latent(codec)) == 0


def test_what_is_wrong_with_recordings_is_told_and_they_are_used(
    codec, speech, tmp_path, monkeypatch
):
    anna, ben = speech["anna"], speech["ben"]
    clipped = np.clip(1.5 * anna / np.abs(anna).max(), -1, 1)
    long = np.tile(anna, 3)
    monkeypatch.setattr("echo_eqx.speech.make_voice.MAX_SECONDS", 12.0)
    for name, audios, message in (
        ("noise", [anna + noise(len(anna), anna, 15)], r"the noise is only 1[456] dB below"),
        ("clipped", [clipped], r"a0.wav: 0\.\d% of its samples are at its ceiling"),
        ("two", [anna, ben], r"a0.wav at 0 to 5 s of speech and a1.wav at 0 .* different voices"),
        ("short", [anna[: int(1.5 * RATE)]], r"expected 3 s of speech or more, got 1\.\d s"),
        ("long", [long, anna], r"a0.wav is only partly used.* 12 s of speech\na1.wav is not used"),
    ):
        paths = [tmp_path / f"a{i}.wav" for i in range(len(audios))]
        for path, audio in zip(paths, audios, strict=True):
            sf.write(path, np.tile(audio, 1 if name == "short" else 2), RATE)
        made = make_voice(name, paths, codec, consent="x")
        told = "\n".join(made.info.warnings)
        assert re.search(message, told, re.DOTALL), told
        assert len(made.info.warnings) == (2 if name == "long" else 1), told
        assert made.seconds <= 12
    with pytest.raises(EchoError, match=r"a0.wav is clipped"):
        sf.write(paths[0], np.clip(30 * anna, -1, 1), RATE)
        make_voice("x", paths[:1], codec, consent="x")
    for changed, message in (
        ({"consent": "  "}, "consent: expected who"),
        ({"lufs": 3.0}, "expected -70 to 0 LUFS, got 3.0"),
        ({"name": "a/b"}, "name of a voice"),
        ({"recordings": []}, "expected at least one, got none"),
    ):
        options = {"name": "x", "recordings": paths, "consent": "x"} | changed
        with pytest.raises(UsageError, match=message):
            make_voice(options.pop("name"), options.pop("recordings"), codec, **options)


@pytest.mark.parametrize("decibels", [10, 20, 30])
def test_the_noise_of_a_recording_is_estimated_within_one_decibel(speech, decibels):
    for audio in speech.values():
        assert signal_to_noise(audio, RATE) > 40
        noisy = audio + noise(len(audio), audio, decibels)
        assert signal_to_noise(noisy, RATE) == pytest.approx(decibels, abs=1.2)


def test_a_second_speaker_is_noticed_if_the_timbre_differs(speech):
    """espeak-ng's men differ from its women; voices of the same sex can be too alike."""
    alone = [find_voice_change([audio, audio[::-1][::-1]], RATE) for audio in speech.values()]
    assert alone == [None] * 4
    for woman in ("anna", "clara"):
        for man in ("ben", "david"):
            change = find_voice_change([speech[woman], speech[man]], RATE)
            assert change is not None and change.recordings == (0, 1)
    turns = [np.tile(speech[name], 4)[: 8 * RATE] for name in ("anna", "anna", "david", "anna")]
    change = find_voice_change([np.concatenate(turns)], RATE)
    assert change is not None and 16 - 2.5 <= max(change.spans)[0] <= 24
    assert find_voice_change([np.concatenate(turns[:2])], RATE) is None


# --- Use ----------------------------------------------------------------------------------------


def test_a_voice_is_added_listed_shown_spoken_and_removed(models, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    recordings = [voice.REFERENCES / "ben.flac", voice.REFERENCES / "ben.flac"]
    consent = ["--consent", "Ben, by phone", "--checkpoint", models]
    done = call("voice", "add", "me", *recordings, *consent)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "voice me: 5.9" in done.stdout and "at -22.5 LUFS" in done.stdout
    assert "1.92 s of speech, sounds like ann" in done.stdout
    file = tmp_path / "data" / "echo_eqx" / "voices" / "me.safetensors"
    assert file.is_file()
    done = call("voice", "add", "me", *recordings, *consent)
    assert done.returncode == 1 and "exists already" in done.stderr
    done = call("voice", "list")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 5
    assert "me                   5.9 s at -22.5 LUFS" in done.stdout
    assert load_voice(file).info.codec is None  # it would be a path of this machine

    pytest.importorskip("matplotlib")
    files = ["--plot", tmp_path / "me.png", "--output", tmp_path / "me.wav"]
    done = call("voice", "show", "me", *files, "--checkpoint", models)
    assert done.returncode == 0 and "consent     Ben, by phone" in done.stdout, done.stderr
    assert "recordings  ben.flac, ben.flac" in done.stdout and "nearest     ann" in done.stdout
    assert (tmp_path / "me.png").read_bytes().startswith(b"\x89PNG")
    assert sf.info(tmp_path / "me.wav").duration == pytest.approx(load_voice(file).seconds)

    lines = [{"text": "Hi.", "voice": str(file)}, {"text": "Hi.", "speaker_ref": str(file)}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, [{"text": "Hi."}, *lines])))
    quick = ["--steps", 1, "--duration", 1, "--batch_size", 1, "--no_watermark", "--json"]
    quick += ["--checkpoint", models, "--voice", "me", "--output", tmp_path / "out.wav"]
    done = call("infer", "--text_file", tmp_path / "lines.jsonl", *quick)
    assert done.returncode == 0 and "1.92 s of speech, sounds like ann" in done.stdout
    assert len({(tmp_path / f"out_000{i}.wav").read_bytes() for i in (1, 2, 3)}) == 1
    described = json.loads((tmp_path / "out_0001.json").read_text())
    assert described["speaker_ref"] == str(file) and described["speaker_lufs"] == -22.5

    done = call("voice", "remove", "me")
    assert done.returncode == 0 and not file.exists()
    done = call("infer", "--text", "Hi.", *quick)
    assert done.returncode == 1 and "there is no voice me" in done.stderr


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["infer", "--text", "a", "--voice", "ben", "--speaker_ref", "b.wav"], 2, "either --voice"),
        (["infer", "--text", "a", "--voice", "../ben"], 2, "name of a voice"),
        (["infer", "--text", "a", "--voice", "./no.safetensors"], 1, "no.safetensors does not"),
        (["infer", "--text_file", "lines.jsonl"], 1, "line 1: there is no voice nobody"),
        (["infer", "--text_file", "both.jsonl"], 1, "line 1: expected either voice or speaker_ref"),
        (["voice", "add", "x"], 2, "consent"),
        (["voice", "add", "x", "--consent", "y"], 2, "expected at least one, got none"),
        (["voice", "add", "x", "none.wav", "--consent", "y"], 1, "none.wav does not exist"),
        (["voice", "add", "anna", DATA / "speech.wav", "--consent", "y"], 2, "in the package"),
        (["voice", "remove", "anna"], 1, "in the package"),
        (["voice", "show", "ben", "--plot", "a.pdf"], 2, "expected a *.png, got a.pdf"),
        (["voice", "list", "--voices", "none"], 1, "expected a folder of voices"),
    ],
)
def test_unusable_voices_give_one_line_errors(tmp_path, monkeypatch, words, code, message):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "lines.jsonl").write_text('{"text": "a", "voice": "nobody"}')
    (tmp_path / "both.jsonl").write_text('{"text": "a", "voice": "ben", "speaker_ref": "a.wav"}')
    done = call(*words, cwd=tmp_path)
    assert done.returncode == code and message in done.stderr + done.stdout, done.stderr
    if done.stderr.startswith("error"):
        assert done.stderr.count("\n") == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_the_level_of_a_voice_is_fixed_and_one_unlike_the_models_is_mentioned(
    models, codec, tmp_path, caplog
):
    dit = echo_eqx.load_dit(models)
    made = make_voice("loud", [voice.REFERENCES / "ben.flac"], codec, consent="x", lufs=-16.0)
    path = save_voice(made, tmp_path)
    latents = speaker_latents(dit, codec, path)
    assert np.array_equal(latents, made.latents[:48]) and "-16 LUFS" in caplog.text
    assert len(speaker_latents(dit, codec, path, max_seconds=2.4)) == 60
    with pytest.raises(UsageError, match=r"level was set to -16.0 LUFS .* got -20"):
        speaker_latents(dit, codec, path, lufs=-20.0)


# --- Continuation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blockwise(models, tmp_path_factory):
    """A folder with a tiny block-wise model and the same codec."""
    folder = tmp_path_factory.mktemp("blockwise")
    config = dataclasses.replace(
        programs.DIT, max_frames=48, max_speaker_frames=48, blockwise=True, max_text_bytes=64
    )
    dit = random_model(echo_eqx.EchoDiT, config, 0.3)
    echo_eqx.save(dit, folder / "dit.safetensors")
    (folder / "codec.safetensors").write_bytes((models / "codec.safetensors").read_bytes())
    return folder


def test_a_recording_is_continued_after_its_end(blockwise, tmp_path):
    """The result is the end of what `sample_blockwise` makes of the recording's latents."""
    dit, codec = echo_eqx.load_dit(blockwise), echo_eqx.load_codec(blockwise)
    audio = load_reference(voice.REFERENCES / "ben.flac", RATE, 0.7)  # 17 frames and a rest
    sf.write(tmp_path / "said.wav", audio, RATE, subtype="FLOAT")
    settings = echo_eqx.SamplerSettings(steps=2)
    options = {"settings": settings, "trim": False, "seed": 3}
    said, text = tmp_path / "said.wav", "He said this, and that."
    spoken = continue_recording(dit, codec, text, said, block_frames=16, **options)
    assert len(spoken) == 32 * 960 and np.isfinite(spoken).all()  # of 48, the recording has 16
    given = encode_speech(codec, audio[-16 * 960 :], None)
    ids = encode_text(normalize_text(text))
    padded = np.pad(ids, (0, 64 - len(ids)))[None]
    noise = jax.random.normal(jax.random.key(3), (1, 32, 6))
    latents = echo_eqx.sample_blockwise(
        dit,
        padded,
        np.arange(64)[None] < len(ids),
        block_sizes=[16, 16],
        continuation=given[None],
        noise=[noise[:, :16], noise[:, 16:]],
        settings=settings,
    )
    expected = decode_with_silence(codec, np.asarray(latents[0]))[16 * 960 :]
    assert max_difference(spoken[200:-200], expected[200:-200]) < 1e-3 * np.abs(expected).max()

    flags = [
        "--json",
        "--checkpoint",
        blockwise,
        "--continue_from",
        said,
        "--text",
        text,
        "--seed",
        3,
    ]
    quick = ["--steps", 2, "--no_trim", "--block_frames", 16, "--output", tmp_path / "out.wav"]
    done = call("infer", *flags, *quick)
    assert done.returncode == 0, done.stderr
    assert sf.info(tmp_path / "out.wav").frames == 32 * 960
    assert json.loads((tmp_path / "out.json").read_text())["continue_from"] == str(said)
    for changed, code, message in (
        (["--output", said], 1, "would replace the recording"),
        (
            ["--block_frames", 10],
            2,
            "blocks: expected positive multiples of 4 frames, got blocks of 10",
        ),
        (
            ["--duration", 0.7, "--text", "Hi."],
            1,
            "said.wav: expected a recording shorter than the 0.64 s",
        ),
        (["--text", text * 9], 2, "text: expected at most what can be spoken in 1.92 s"),
        (["--stream", "-"], 2, "--continue_from: expected --output with it, got --stream"),
        (["--continue_from", "no.wav"], 1, "no.wav does not exist"),
    ):
        done = call("infer", *flags, *quick, *changed)
        assert done.returncode == code and message in done.stderr, done.stderr


def test_other_models_cannot_continue_a_recording(models, codec):
    with pytest.raises(UsageError, match=r"cannot continue a.wav: .* without latent_encoder"):
        continue_recording(echo_eqx.load_dit(models), codec, "Hi.", "a.wav")
