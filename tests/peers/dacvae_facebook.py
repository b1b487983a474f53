"""Encode, and decode with a watermark, with facebook's own class."""

import sys

import numpy as np
import torch
from dacvae import DACVAE

folder = sys.argv[1]
codec = DACVAE.load(f"{folder}/weights.pth").eval()
state = torch.load(f"{folder}/weights.pth", weights_only=True)["state_dict"]
loaded = codec.state_dict()
assert set(loaded) == set(state) and all(torch.equal(loaded[n], t) for n, t in state.items())
given = np.load(f"{folder}/in.npz")
with torch.no_grad():
    audio, latents = torch.from_numpy(given["audio"]), torch.from_numpy(given["latents"])
    mean = codec.quantizer.in_proj(codec.encoder(audio[:, None])).chunk(2, dim=1)[0]
    message = torch.from_numpy(given["message"])
    hidden = codec.quantizer.out_proj(latents.transpose(1, 2))
    marked = codec.decoder(hidden, message=message)
np.savez(f"{folder}/out.npz", mean=mean.transpose(1, 2).numpy(), marked=marked[:, 0].numpy())
