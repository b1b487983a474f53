"""The small voice in the package: its models, recordings and shards, by `scripts/build_voice.py`.

It is trained on speech of espeak-ng alone.
"""

from pathlib import Path

from echo_eqx.flow.sampler import SamplerSettings

WEIGHTS = Path(__file__).parent / "weights"
CHECKPOINT = WEIGHTS / "dit.safetensors"
CODEC = WEIGHTS / "codec.safetensors"
REFERENCES = Path(__file__).parent / "references"
"""A recording of each voice, `NAME.flac`."""
SHARDS = Path(__file__).parent / "shards"
"""A small part of what it was trained on."""
SETTINGS = SamplerSettings(cfg_scale=2.0, speaker_scale=2.0, cfg_min_t=0.3, noise_scale=0.9)
"""The way from noise to latents that suits these models."""
