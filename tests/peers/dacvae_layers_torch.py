"""Encode and decode in PyTorch with the layers that the published DACVAE is documented to have."""

import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

folder = sys.argv[1]
file = torch.load(f"{folder}/weights.pth", weights_only=True)
mapped = torch.load(f"{folder}/weights.pth", weights_only=True, mmap=True)["state_dict"]
twin = load_file(f"{folder}/model.safetensors")
w, kwargs = file["state_dict"], file["metadata"]["kwargs"]
assert list(w) == list(mapped) and set(w) == set(twin) and len(w) == 317
for name, tensor in w.items():
    assert tensor.is_contiguous() and tensor.dtype == torch.float32
    assert torch.equal(tensor, mapped[name]) and torch.equal(tensor, twin[name]), name


def kernel(name):
    v = w[f"{name}.weight_v"]
    return w[f"{name}.weight_g"] * v / v.norm(dim=(1, 2), keepdim=True)


def conv(name, x, **options):
    return F.conv1d(x, kernel(name), w[f"{name}.bias"], **options)


def snake(name, x):
    alpha = w[f"{name}.alpha"]
    return x + torch.sin(alpha * x) ** 2 / (alpha + 1e-9)


def unit(name, x, dilation):
    y = snake(f"{name}.block.0", x)
    y = conv(f"{name}.block.1", y, dilation=dilation, padding=3 * dilation)
    return x + conv(f"{name}.block.3", snake(f"{name}.block.2", y))


def encode(x):
    x = F.pad(x, (0, -x.shape[-1] % math.prod(kwargs["encoder_rates"])), mode="reflect")
    x = conv("encoder.block.0", x, padding=3)
    for i, s in enumerate(kwargs["encoder_rates"], 1):
        for j, dilation in enumerate((1, 3, 9)):
            x = unit(f"encoder.block.{i}.block.{j}", x, dilation)
        x = snake(f"encoder.block.{i}.block.3", x)
        x = conv(f"encoder.block.{i}.block.4", x, stride=s, padding=s // 2)
    x = conv(f"encoder.block.{i + 2}", snake(f"encoder.block.{i + 1}", x), padding=1)
    return conv("quantizer.in_proj", x).chunk(2, dim=1)[0]


def decode(x):
    x = conv("decoder.model.0", conv("quantizer.out_proj", x), padding=3)
    for i, s in enumerate(kwargs["decoder_rates"], 1):
        name = f"decoder.model.{i}.block"
        x = F.conv_transpose1d(
            snake(f"{name}.0", x),
            kernel(f"{name}.1"),
            w[f"{name}.1.bias"],
            stride=s,
            padding=(s + 1) // 2,
            output_padding=s % 2,
        )
        for j, dilation in ((4, 1), (5, 3), (8, 9)):
            x = unit(f"{name}.{j}", x, dilation)
    pre = "decoder.wm_model.encoder_block.pre"
    return torch.tanh(conv(f"{pre}.1", snake(f"{pre}.0", x), padding=3))


given = np.load(f"{folder}/in.npz")
with torch.no_grad():
    mean = encode(torch.from_numpy(given["audio"])[:, None])
    audio = decode(torch.from_numpy(given["latents"]).transpose(1, 2))
np.savez(f"{folder}/out.npz", mean=mean.transpose(1, 2).numpy(), audio=audio[:, 0].numpy())
