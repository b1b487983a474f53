"""Train EchoDiT on tar shards of latents, on one device or a pod.

    python scripts/train.py --model tiny --data shards/ --run_dir runs/mine
    python scripts/train.py --data hf://datasets/OWNER/NAME --run_dir /mnt/runs/big --mesh fsdp=32

The same command again goes on where the run stopped. SIGTERM saves and ends with code 76; code 75
says that another process of the run is gone. Everything the run writes is in --run_dir.
"""

import argparse
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import jax
import tyro

from echo_eqx.command import run, use_compilation_cache
from echo_eqx.errors import EchoError
from echo_eqx.sharding.hosts import PeerWatch, start_processes
from echo_eqx.train.config import TRAIN_PRESETS, TrainConfig, base_config
from echo_eqx.train.loop import train


def main() -> None:
    config = tyro.cli(TrainConfig, default=base_of(sys.argv[1:]), description=__doc__)
    config.check()
    use_compilation_cache()
    start_processes(
        config.coordinator, config.num_processes, config.process_id, config.start_timeout
    )
    watch = PeerWatch(config.coordinator)
    try:
        code = train(config, watch)
    except OSError as error:
        place = error.filename or config.run_dir
        _end(watch, EchoError(f"{place} cannot be read or written: {error.strerror or error}"))
    except (Exception, KeyboardInterrupt) as error:
        _end(watch, error)
    else:
        raise SystemExit(code)


def _end(watch: PeerWatch, error: BaseException) -> NoReturn:
    """An error of one process is the end of all; of several, each says whose it is."""
    if jax.process_count() == 1:
        raise error
    who = f"process {jax.process_index()}"
    if isinstance(error, EchoError):
        watch.fail(f"{who}: {error}", error.exit_code)
    watch.wait_for_news()
    traceback.print_exception(error)
    watch.fail(f"{who}: {type(error).__name__}", 1)


def base_of(arguments: list[str]) -> TrainConfig:
    """What the flags override: --config, or else the preset of --model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--model", default=TrainConfig.model)
    known, _ = parser.parse_known_args(arguments)
    if known.config is not None:
        return base_config(known.config)
    return TRAIN_PRESETS.get(known.model, TrainConfig())


if __name__ == "__main__":
    run(main)
