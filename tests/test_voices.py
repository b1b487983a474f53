"""Voices as files: written whole, read strictly, refused with another codec."""

import dataclasses
import json

import numpy as np
import pytest

from echo_eqx import EchoError, UsageError, voice
from echo_eqx.files import write_whole
from echo_eqx.speech.codec import codec_identity, silence_latent
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
