"""Velocity of an EchoDiT that mlx-audio loads strictly from a folder."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLX_DISABLE_COMPILE"] = "1"  # it needs a C++ compiler

import mlx.core as mx
import mlx_audio.tts
import numpy as np

folder = sys.argv[1]
model = mlx_audio.tts.load(folder, strict=True)
given = {name: mx.array(array)[None] for name, array in np.load(f"{folder}/in.npz").items()}
dit, text_mask = model.model, given["text_mask"]
velocity = dit(
    x=given["x"],
    t=given["t"],
    text_mask=text_mask,
    speaker_mask=given["speaker_mask"],
    kv_cache_text=dit.get_kv_cache_text(given["text_ids"], text_mask),
    kv_cache_speaker=dit.get_kv_cache_speaker(given["speaker_latents"]),
)
latents = model.generate_latents("Hello.", num_steps=2, sequence_length=12)
np.savez(f"{folder}/out.npz", velocity=np.array(velocity)[0], latents=np.array(latents)[0])
