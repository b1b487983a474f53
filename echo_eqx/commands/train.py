"""Train EchoDiT on tar shards of latents, on one device or a pod.

    echo-eqx train
    echo-eqx train --model tiny --data shards/ --run_dir runs/mine
    echo-eqx train --data hf://datasets/OWNER/NAME --run_dir /mnt/runs/big --mesh fsdp=32

Repeat the command to resume the run. On SIGTERM, or when the terminal closes, the run saves and
exits with code 76; code 75 means that another process of the run died. All output is in --run_dir.
Without --data or --config, a model like the small voice is trained on the shards in the package.
"""

from echo_eqx.train.config import TRAIN_PRESETS, TrainConfig
from echo_eqx.train.distributed import run_training
from echo_eqx.train.settings import parse_settings
from echo_eqx.train.train_dit import train


def main() -> None:
    def default_model(flags: TrainConfig) -> str:
        return "voice" if flags.data is None and flags.config is None else TrainConfig.model

    run_training(parse_settings(TRAIN_PRESETS, __doc__, default=default_model), train)
