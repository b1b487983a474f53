"""Train EchoDiT on tar shards of latents, on one device or a pod.

    echo-eqx train
    echo-eqx train --model tiny --data shards/ --run_dir runs/mine
    echo-eqx train --data hf://datasets/OWNER/NAME --run_dir /mnt/runs/big --mesh fsdp=32

The same command again goes on where the run stopped. SIGTERM or a closed
terminal saves and ends with code 76; code 75
says that another process of the run is gone. Everything the run writes is in --run_dir. Without
--data or --config a model like the small voice's trains on the shards in the package.
"""

import sys

from echo_eqx.cli import parse
from echo_eqx.train.config import TRAIN_PRESETS, TrainConfig
from echo_eqx.train.distributed import run_training
from echo_eqx.train.settings import base_of
from echo_eqx.train.train_dit import train


def main() -> None:
    given = any(word.startswith(("--data", "--config")) for word in sys.argv[1:])
    default = base_of(sys.argv[1:], TRAIN_PRESETS, TrainConfig.model if given else "voice")
    run_training(parse(TrainConfig, __doc__, default=default), train)
