"""Train a DACVAE, the codec between audio and latents, on recordings.

    echo-eqx train_codec --data recordings/ --run_dir runs/codec
    echo-eqx train_codec --model 48khz --data clips.jsonl --mesh data=8 --batch_size 64
    echo-eqx train_codec --init_from runs/codec --freeze_encoder --loss.adversarial 1 \\
        --data recordings/ --run_dir runs/sharper

Repeat the command to resume the run. Checkpoints, exit codes, metrics and multi-host runs work as
in train. Use the result in other commands with `--codec runs/codec`.
"""

from echo_eqx.train.codec.config import CODEC_TRAIN_PRESETS, CodecTrainConfig
from echo_eqx.train.codec.train_codec import train_codec
from echo_eqx.train.distributed import run_training
from echo_eqx.train.settings import parse_settings


def main() -> None:
    settings = parse_settings(
        CODEC_TRAIN_PRESETS, __doc__, default=lambda _: CodecTrainConfig.model
    )
    run_training(settings, train_codec)
