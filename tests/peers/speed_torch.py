"""The speed of sampling with EchoDiT in PyTorch, with cached keys of text and reference.

    python speed_torch.py SIZES.json

Prints `ready` once it is warm; then each line on stdin samples once, and its seconds are printed.
"""

import json
import sys
import time
from pathlib import Path

import torch
from echo_dit_torch import EchoDiT, rms, rotate_half_of_the_heads
from torch import Tensor, nn
from torch.nn import functional


def build(sizes: dict) -> EchoDiT:
    text, speaker = sizes["text"], sizes["speaker"]
    model = EchoDiT(
        latent_size=sizes["latent_dim"],
        model_size=sizes["model_dim"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        intermediate_size=sizes["mlp_dim"],
        norm_eps=sizes["norm_eps"],
        text_vocab_size=256,
        text_model_size=text["dim"],
        text_num_layers=text["num_layers"],
        text_num_heads=text["num_heads"],
        text_intermediate_size=text["mlp_dim"],
        speaker_patch_size=sizes["patch_size"],
        speaker_model_size=speaker["dim"],
        speaker_num_layers=speaker["num_layers"],
        speaker_num_heads=speaker["num_heads"],
        speaker_intermediate_size=speaker["mlp_dim"],
        timestep_embed_size=sizes["time_embed_dim"],
        adaln_rank=sizes["adaln_rank"],
    )
    return model.without_blockwise_modules()


def cached_keys(attention: nn.Module, text: Tensor, speaker: Tensor) -> tuple[Tensor, Tensor]:
    def split(y: Tensor) -> Tensor:
        return y.unflatten(-1, (attention.heads, -1))

    keys = [split(attention.wk_text(text)), split(attention.wk_speaker(speaker))]
    values = [split(attention.wv_text(text)), split(attention.wv_speaker(speaker))]
    return torch.cat([attention.k_norm(k) for k in keys], 1), torch.cat(values, 1)


def attend(attention: nn.Module, x: Tensor, cache: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    def split(y: Tensor) -> Tensor:
        return y.unflatten(-1, (attention.heads, -1))

    positions = torch.arange(x.shape[1])
    queries = rotate_half_of_the_heads(attention.q_norm(split(attention.wq(x))), positions)
    own = rotate_half_of_the_heads(attention.k_norm(split(attention.wk(x))), positions)
    keys, values = torch.cat([own, cache[0]], 1), torch.cat([split(attention.wv(x)), cache[1]], 1)
    out = functional.scaled_dot_product_attention(
        *(y.transpose(1, 2) for y in (queries, keys, values)), attn_mask=mask[:, None, None]
    )
    return attention.wo(out.transpose(1, 2).flatten(2) * attention.gate(x).sigmoid())


def velocity(model: EchoDiT, x: Tensor, t: Tensor, caches: list, mask: Tensor) -> Tensor:
    half = model.embed // 2
    angles = 1000 * t * torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(half) / half)
    embedding = torch.cat([angles.cos(), angles.sin()])[None]
    shared = model.cond_module(embedding).chunk(3, dim=1)
    x = model.in_proj(x)
    for block, cache in zip(model.blocks, caches, strict=True):
        shift, scale, gate = block.attention_adaln(shared)
        normed = rms(x, block.eps) * (1 + scale) + shift
        x = x + gate * attend(block.attention, normed, cache, mask)
        shift, scale, gate = block.mlp_adaln(shared)
        x = x + gate * block.mlp(rms(x, block.eps) * (1 + scale) + shift)
    return model.out_proj(model.out_norm(x))


def main(path: str) -> None:
    sizes = json.loads(Path(path).read_text())
    torch.manual_seed(0)
    model = build(sizes)
    frames, channels, steps = sizes["frames"], sizes["latent_dim"], sizes["steps"]
    text_ids = torch.randint(0, 256, (1, sizes["text_bytes"]))
    speaker_latents = torch.randn(1, sizes["speaker_frames"], channels)
    # By branch, whether it keeps the text and the reference.
    keeps = {"joint": [(1, 1), (0, 0)], "independent": [(1, 1), (0, 1), (1, 0)]}[sizes["guidance"]]
    patches = sizes["speaker_frames"] // sizes["patch_size"]
    masks = torch.tensor(
        [[1] * frames + [text] * sizes["text_bytes"] + [ref] * patches for text, ref in keeps]
    ).bool()

    def sample() -> Tensor:
        text = model.text_norm(model.text_encoder(text_ids, torch.ones_like(text_ids).bool()))
        speaker = model.speaker_norm(model.speaker_encoder(speaker_latents))
        caches = [cached_keys(block.attention, text, speaker) for block in model.blocks]
        wide = [tuple(y.expand(len(keeps), *y.shape[1:]) for y in cache) for cache in caches]
        x = torch.randn(1, frames, channels)
        for step in range(steps):
            t = torch.tensor(1 - step / steps)
            if t >= sizes["cfg_min_t"]:
                rows = velocity(model, x.expand(len(keeps), -1, -1), t, wide, masks)
                v = rows[:1] + sum(3.0 * (rows[:1] - row[None]) for row in rows[1:])
            else:
                v = velocity(model, x, t, caches, masks[:1])
            x = x - v / steps
        return x

    with torch.inference_mode():
        sample()
        print("ready", flush=True)
        for _ in sys.stdin:
            started = time.perf_counter()
            sample()
            print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
