"""The small voice in the package: models, recordings and shards, made by `echo-eqx build_voice`.

It was trained on the speech of espeak-ng alone.
"""

from pathlib import Path

from echo_eqx.flow.sampler import SamplerSettings
from echo_eqx.speech.voices import BUILT_IN
from echo_eqx.weights.find import SHIPPED

CHECKPOINT, CODEC = SHIPPED["voice"]["dit"], SHIPPED["voice"]["codec"]
"""The files that `load_dit("voice")` and `load_codec("voice")` read."""
WEIGHTS = CHECKPOINT.parent
REFERENCES = BUILT_IN
"""A recording of each voice, `NAME.flac`."""
SHARDS = Path(__file__).parent / "shards"
"""A small part of its training data."""
SETTINGS = SamplerSettings(
    steps=16,
    cfg_scale=2.0,
    speaker_scale=2.0,
    cfg_min_t=0.3,
    guidance_every=2,
    noise_scale=0.9,
    sway=-1.0,
)
"""Sampler settings that suit these models; their checkpoint recommends them. See the curve of
`eval_voice --curve` in the README."""
REFERENCE_LUFS = -22.5
"""Mean loudness of its training data: speech of espeak-ng at a peak of 0.5."""
