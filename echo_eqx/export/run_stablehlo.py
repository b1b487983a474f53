"""Speak with the programs in this folder: python run.py "Some text." out.wav [voice.wav]

Needs jax, flatbuffers, numpy and safetensors. The reference voice.wav is 16-bit mono at the rate of
out.wav; without one the voice is arbitrary. The text is spoken as it is: write numbers as words. Of
the recommended settings, `guidance`, `apg_eta`, `rescale_*`, `speaker_kv_*` and `length` are not
used.
"""

import functools
import itertools
import json
import math
import sys
import wave
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.flax import load_file

FOLDER = Path(__file__).resolve().parent
ABOUT = json.loads((FOLDER / "programs.json").read_text())
WEIGHTS = load_file(FOLDER / ABOUT["weights"])
DIT, CODEC, SETTINGS = ABOUT["dit"], ABOUT["codec"], ABOUT["generation"]["sampler"]
RATE, HOP = CODEC["sample_rate"], math.prod(CODEC["encoder_rates"])


@functools.cache
def load(name):
    about = ABOUT["programs"][name]
    call = jax.jit(export.deserialize(bytearray((FOLDER / about["file"]).read_bytes())).call)
    weights = [WEIGHTS[weight] for weight in about["weights"]]
    return lambda *inputs: call(*weights, *inputs)


def speak(text, voice=None, seed=42):
    """Audio (samples,) of `text`, in the voice of the audio `voice` (samples,)."""
    patch, channels = DIT["patch_size"], DIT["latent_dim"]
    reference = np.zeros((1, patch, channels), np.float32)
    if voice is not None:
        reference = load("encode")(voice[None, : len(voice) // (HOP * patch) * HOP * patch])[0]
    ids = np.frombuffer(b"\0" + text.encode(), np.uint8).astype(np.int32)[None]
    voice_mask = np.ones((1, reference.shape[1] // patch), bool)
    cache = load("context")(ids, ids >= 0, reference, voice_mask)

    # Rows of the batch: with everything, without the text, without the voice.
    keeps = np.array([[True, True], [False, True], [True, False]])
    scales = [SETTINGS["cfg_scale"], SETTINGS["speaker_scale"]]
    if voice is None:
        keeps, scales = keeps[:2] & [True, False], scales[:1]
    rows, frames = len(keeps), min(DIT["max_frames"], round(15 * RATE / HOP))
    text_keys, text_values, keys, values = (jnp.repeat(part, rows, axis=0) for part in cache)
    text_mask = np.repeat(keeps[:, :1], ids.shape[1], axis=1)
    voice_mask = np.repeat(keeps[:, 1:], voice_mask.shape[1], axis=1)
    frame_mask = np.ones((rows, frames), bool)
    inputs = frame_mask, text_keys, text_values, text_mask, keys, values, voice_mask

    velocity, voice_scale = load("velocity"), np.ones(DIT["num_layers"], np.float32)
    steps, start_t = SETTINGS["steps"], SETTINGS["start_t"] or 1.0
    noise = np.random.default_rng(seed).standard_normal((frames, channels), np.float32)
    x = SETTINGS["noise_scale"] * noise
    done = np.arange(steps + 1) / steps
    done = done + SETTINGS["sway"] * (np.cos(np.pi / 2 * done) - 1 + done)
    times = start_t * (1 - done)
    update = None  # the guidance that was last added
    for step, (t, t_next) in enumerate(itertools.pairwise(times.tolist())):
        is_guided = SETTINGS["cfg_min_t"] <= t <= SETTINGS["cfg_max_t"]
        is_new = is_guided and (step % SETTINGS["guidance_every"] == 0 or update is None)
        n = rows if is_new else 1
        batch = np.repeat(x[None], n, axis=0), np.float32(t), *(array[:n] for array in inputs)
        v, *dropped = np.asarray(velocity(*batch, voice_scale))
        if is_new:
            update = sum(scale * (v - d) for scale, d in zip(scales, dropped, strict=True))
        update = update if is_guided else None
        v = v if update is None else v + update
        x = x + (t_next - t) * v

    # The decoder starts and ends with a click, which falls into silence that is cut off again.
    padding = ABOUT["decoder_padding"]
    silence = np.repeat(np.array([ABOUT["silence"]], np.float32), padding, axis=0)
    audio = np.asarray(load("decode")(np.concatenate([silence, x, silence])[None])[0])
    return audio[padding * HOP : len(audio) - padding * HOP]


def main(text, out, voice=None):
    if voice is not None:
        with wave.open(voice, "rb") as file:
            form = file.getnchannels(), file.getsampwidth(), file.getframerate()
            if form != (1, 2, RATE):
                sys.exit(f"{voice}: expected (channels, bytes, rate) {(1, 2, RATE)}, got {form}")
            voice = np.frombuffer(file.readframes(file.getnframes()), "<i2") / np.float32(2**15)
    audio = speak(text if text.startswith("[S") else f"[S1] {text}", voice)
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
