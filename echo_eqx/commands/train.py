"""Train EchoDiT on tar shards of latents, on one device or a pod.

    echo-eqx train
    echo-eqx train --model tiny --data shards/ --run_dir runs/mine
    echo-eqx train --data hf://datasets/OWNER/NAME --run_dir /mnt/runs/big --mesh fsdp=32

The same command again goes on where the run stopped. SIGTERM or a closed
terminal saves and ends with code 76; code 75
says that another process of the run is gone. Everything the run writes is in --run_dir. Without
--data or --config a model like the small voice's trains on the shards in the package.
"""

from echo_eqx.train.config import TRAIN_PRESETS, TrainConfig
from echo_eqx.train.distributed import run_training
from echo_eqx.train.settings import parse_settings
from echo_eqx.train.train_dit import train


def main() -> None:
    def default_model(flags: TrainConfig) -> str:
        return "voice" if flags.data is None and flags.config is None else TrainConfig.model

    run_training(parse_settings(TRAIN_PRESETS, __doc__, default=default_model), train)
