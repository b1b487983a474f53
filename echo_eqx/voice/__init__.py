"""The small voice in the package: its models, recordings and shards, by `scripts/build_voice.py`.

It is trained on speech of espeak-ng alone.
"""

from pathlib import Path

from echo_eqx.flow.sampler import SamplerSettings
from echo_eqx.weights.find import SHIPPED

CHECKPOINT, CODEC = SHIPPED["voice"]["dit"], SHIPPED["voice"]["codec"]
"""What `load_dit("voice")` and `load_codec("voice")` read."""
WEIGHTS = CHECKPOINT.parent
REFERENCES = Path(__file__).parent / "references"
"""A recording of each voice, `NAME.flac`."""
SHARDS = Path(__file__).parent / "shards"
"""A small part of what it was trained on."""
SETTINGS = SamplerSettings(cfg_scale=2.0, speaker_scale=2.0, cfg_min_t=0.3, noise_scale=0.9)
"""The way from noise to latents that suits these models. Their file recommends it."""
REFERENCE_LUFS = -22.5
"""Mean loudness of what espeak-ng says at a peak of 0.5, which it was trained on."""
