"""The voice that comes with the package: small models, recordings of its voices, and shards.

It was trained on speech of espeak-ng alone, by `scripts/build_voice.py`.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
CHECKPOINT = WEIGHTS / "dit.safetensors"
CODEC = WEIGHTS / "codec.safetensors"
REFERENCES = Path(__file__).parent / "references"
"""A recording of each voice, `NAME.flac`."""
SHARDS = Path(__file__).parent / "shards"
"""A small part of what it was trained on."""
