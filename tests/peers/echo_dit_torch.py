"""EchoDiT in PyTorch, with the names of the community's implementation.

    python echo_dit_torch.py FOLDER CASES.npz VELOCITY.npy

loads `FOLDER/pytorch_model.safetensors` strictly into `EchoDiT(**FOLDER/config.json)`, without the
block-wise modules if the file has none, and computes the velocity of the batch in CASES.npz, in
float64: what differs from another implementation is then that one's rounding.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

NEGATIVE = torch.finfo(torch.float32).min


class RMSNorm(nn.Module):
    def __init__(self, shape: int | tuple[int, int], eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(shape)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.eps) * self.weight


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE over interleaved pairs of the last axis; x (batch, position, head, width)."""
    width = x.shape[-1]
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = (positions[:, None] * frequencies)[:, None]
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    turn = torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
    return torch.view_as_real(pairs * turn).reshape(x.shape)


def rotate_half_of_the_heads(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[2] // 2
    return torch.cat([rotate(x[:, :, :half], positions), x[:, :, half:]], dim=2)


def attend(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """`allowed` (batch, query or 1, key) -> (batch, query, heads * width)."""
    logits = torch.einsum("bthk,bjhk->bhtj", queries, keys) / math.sqrt(queries.shape[-1])
    weights = torch.where(allowed[:, None], logits, NEGATIVE).softmax(-1)
    return torch.einsum("bhtj,bjhk->bthk", weights, values).flatten(2)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w3, self.w2 = linear(dim, hidden), linear(dim, hidden), linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool, eps: float):
        super().__init__()
        for name in ("wq", "wk", "wv", "wo", "gate"):
            setattr(self, name, linear(dim, dim))
        self.q_norm = RMSNorm((heads, dim // heads), eps)
        self.k_norm = RMSNorm((heads, dim // heads), eps)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        length = x.shape[1]
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)) for w in (self.wq, self.wk, self.wv))
        positions = torch.arange(length)
        q, k = rotate(self.q_norm(q), positions), rotate(self.k_norm(k), positions)
        allowed = torch.ones(1, length, length, dtype=torch.bool)
        if self.causal:
            allowed = allowed.tril()
        if mask is not None:
            allowed = allowed & mask[:, None]
        return self.wo(attend(q, k, v, allowed) * self.gate(x).sigmoid())


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, causal: bool, eps: float):
        super().__init__()
        self.attention, self.mlp = SelfAttention(dim, heads, causal, eps), MLP(dim, hidden)
        self.attention_norm, self.mlp_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class TextEncoder(nn.Module):
    def __init__(self, vocab: int, dim: int, layers: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.text_embedding = nn.Embedding(vocab, dim)
        blocks = (EncoderBlock(dim, heads, hidden, False, eps) for _ in range(layers))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.text_embedding(ids)
        for block in self.blocks:
            x = block(x, mask)
        return x


class LatentEncoder(nn.Module):
    def __init__(
        self, latent: int, patch: int, dim: int, layers: int, heads: int, hidden: int, eps: float
    ):
        super().__init__()
        self.in_proj = nn.Linear(latent * patch, dim)
        blocks = (EncoderBlock(dim, heads, hidden, True, eps) for _ in range(layers))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.in_proj(latents.reshape(len(latents), -1, self.in_proj.in_features)) / 6
        for block in self.blocks:
            x = block(x, None)
        return x


class AdaLN(nn.Module):
    def __init__(self, dim: int, rank: int):
        super().__init__()
        for kind in ("shift", "scale", "gate"):
            setattr(self, f"{kind}_down", linear(dim, rank))
            setattr(self, f"{kind}_up", nn.Linear(rank, dim))

    def forward(self, shared: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        def own(kind: str, vector: Tensor) -> Tensor:
            down, up = getattr(self, f"{kind}_down"), getattr(self, f"{kind}_up")
            return (up(down(functional.silu(vector))) + vector)[:, None]

        shift, scale, gate = shared
        return own("shift", shift), own("scale", scale), own("gate", gate).tanh()


class JointAttention(nn.Module):
    def __init__(self, dim: int, heads: int, text: int, speaker: int, eps: float):
        super().__init__()
        for name in ("wq", "wk", "wv", "wo", "gate"):
            setattr(self, name, linear(dim, dim))
        for name, width in (("text", text), ("speaker", speaker), ("latent", speaker)):
            setattr(self, f"wk_{name}", linear(width, dim))
            setattr(self, f"wv_{name}", linear(width, dim))
        self.q_norm = RMSNorm((heads, dim // heads), eps)
        self.k_norm = RMSNorm((heads, dim // heads), eps)
        self.heads = heads

    def forward(
        self, x: Tensor, text: Tensor, text_mask: Tensor, speaker: Tensor, speaker_mask: Tensor
    ) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1))

        positions = torch.arange(x.shape[1])
        queries = rotate_half_of_the_heads(self.q_norm(split(self.wq(x))), positions)
        own = rotate_half_of_the_heads(self.k_norm(split(self.wk(x))), positions)
        keys = [
            own,
            *(self.k_norm(split(y)) for y in (self.wk_text(text), self.wk_speaker(speaker))),
        ]
        values = [split(y) for y in (self.wv(x), self.wv_text(text), self.wv_speaker(speaker))]
        mask = torch.cat([torch.ones(x.shape[:2], dtype=torch.bool), text_mask, speaker_mask], 1)
        out = attend(queries, torch.cat(keys, 1), torch.cat(values, 1), mask[:, None])
        return self.wo(out * self.gate(x).sigmoid())


class Block(nn.Module):
    def __init__(
        self, dim: int, heads: int, hidden: int, text: int, speaker: int, rank: int, eps: float
    ):
        super().__init__()
        self.attention = JointAttention(dim, heads, text, speaker, eps)
        self.mlp = MLP(dim, hidden)
        self.attention_adaln, self.mlp_adaln = AdaLN(dim, rank), AdaLN(dim, rank)
        self.eps = eps

    def forward(self, x: Tensor, shared: tuple[Tensor, Tensor, Tensor], *conditions: Tensor):
        shift, scale, gate = self.attention_adaln(shared)
        normed = rms(x, self.eps) * (1 + scale) + shift
        x = x + gate * self.attention(normed, *conditions)
        shift, scale, gate = self.mlp_adaln(shared)
        return x + gate * self.mlp(rms(x, self.eps) * (1 + scale) + shift)


class EchoDiT(nn.Module):
    def __init__(
        self,
        latent_size: int,
        model_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        norm_eps: float,
        text_vocab_size: int,
        text_model_size: int,
        text_num_layers: int,
        text_num_heads: int,
        text_intermediate_size: int,
        speaker_patch_size: int,
        speaker_model_size: int,
        speaker_num_layers: int,
        speaker_num_heads: int,
        speaker_intermediate_size: int,
        timestep_embed_size: int,
        adaln_rank: int,
    ):
        super().__init__()
        eps = norm_eps
        text = (text_model_size, text_num_layers, text_num_heads, text_intermediate_size, eps)
        speaker = (
            *(latent_size, speaker_patch_size, speaker_model_size, speaker_num_layers),
            *(speaker_num_heads, speaker_intermediate_size, eps),
        )
        self.patch, self.embed = speaker_patch_size, timestep_embed_size
        self.text_encoder = TextEncoder(text_vocab_size, *text)
        self.speaker_encoder, self.latent_encoder = LatentEncoder(*speaker), LatentEncoder(*speaker)
        self.text_norm = RMSNorm(text_model_size, eps)
        self.speaker_norm = RMSNorm(speaker_model_size, eps)
        self.latent_norm = RMSNorm(speaker_model_size, eps)
        self.cond_module = nn.Sequential(
            linear(timestep_embed_size, model_size),
            nn.SiLU(),
            linear(model_size, model_size),
            nn.SiLU(),
            linear(model_size, 3 * model_size),
        )
        self.in_proj = nn.Linear(latent_size, model_size)
        sizes = (model_size, num_heads, intermediate_size, text_model_size, speaker_model_size)
        self.blocks = nn.ModuleList(Block(*sizes, adaln_rank, eps) for _ in range(num_layers))
        self.out_norm = RMSNorm(model_size, eps)
        self.out_proj = nn.Linear(model_size, latent_size)

    def without_blockwise_modules(self) -> "EchoDiT":
        del self.latent_encoder, self.latent_norm
        for block in self.blocks:
            del block.attention.wk_latent, block.attention.wv_latent
        return self

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        speaker_latents: Tensor,
        speaker_mask: Tensor,
    ) -> Tensor:
        half = self.embed // 2
        steps = torch.arange(half, dtype=t.dtype) / half
        angles = 1000 * t[:, None] * torch.exp(-math.log(10_000) * steps)
        shared = self.cond_module(torch.cat([angles.cos(), angles.sin()], dim=1)).chunk(3, dim=1)
        text = self.text_norm(self.text_encoder(text_ids, text_mask))
        speaker = self.speaker_norm(self.speaker_encoder(speaker_latents))
        x = self.in_proj(x)
        for block in self.blocks:
            x = block(x, shared, text, text_mask, speaker, speaker_mask[:, :: self.patch])
        return self.out_proj(self.out_norm(x))


def main(folder: Path, cases: Path, output: Path) -> None:
    state = load_file(folder / "pytorch_model.safetensors")
    model = EchoDiT(**json.loads((folder / "config.json").read_text()))
    if "latent_norm.weight" not in state:
        model.without_blockwise_modules()
    model.load_state_dict(state, strict=True)
    model.double()
    names = ("x", "t", "text_ids", "text_mask", "speaker_latents", "speaker_mask")
    arrays = np.load(cases)
    inputs = [torch.from_numpy(arrays[name]) for name in names]
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.inference_mode():
        np.save(output, model(*inputs).numpy())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
