"""Encode and decode with the DACVAE of mlx-audio, loaded strictly from a folder."""

import json
import sys

import mlx.core as mx
import numpy as np
from mlx_audio.codec.models.dacvae import DACVAE, DACVAEConfig

folder = sys.argv[1]
codec = DACVAE(DACVAEConfig(**json.load(open(f"{folder}/config.json"))))
codec.load_weights(f"{folder}/model.safetensors", strict=True)
given = np.load(f"{folder}/in.npz")
mean = codec.encode(mx.array(given["audio"])[None, :, None])
audio = codec.decode(mx.array(given["latents"].T)[None])
np.savez(f"{folder}/out.npz", mean=np.array(mean)[0].T, audio=np.array(audio)[0, :, 0])
