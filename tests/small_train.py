"""scripts/train.py with one more preset, `nano`, whose steps cost next to nothing."""

import dataclasses
import runpy
import sys
from pathlib import Path

from echo_eqx.config import DIT_PRESETS, EncoderConfig

TRAIN = Path(__file__).parent.parent / "scripts" / "train.py"
DIT_PRESETS["nano"] = dataclasses.replace(
    DIT_PRESETS["tiny"],
    model_dim=64,
    num_layers=2,
    mlp_dim=128,
    text=EncoderConfig(32, 2, 4, 64),
    speaker=EncoderConfig(32, 2, 4, 64),
)

if __name__ == "__main__":
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")
