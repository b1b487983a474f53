"""The flags of `train`, checked before anything is rented or submitted."""

import logging
from collections.abc import Sequence

from echo_eqx.errors import UsageError
from echo_eqx.train.config import TRAIN_PRESETS, TrainConfig
from echo_eqx.train.settings import parse_settings

logger = logging.getLogger(__name__)

_PER_WORKER = ("--coordinator", "--num_processes", "--process_id")
_LOCAL_DISKS = ("/home/", "/root/", "/tmp/", "/dev/shm/", "~")


def check_train_flags(flags: Sequence[str]) -> str:
    """The --run_dir of a run with these flags.

    **Raises**: `UsageError` for flags that `train` would reject on every worker; tyro exits if it
    cannot parse them.
    """
    names = [flag.partition("=")[0].replace("-", "_").replace("__", "--", 1) for flag in flags]
    for name, flag in zip(names, flags, strict=True):
        if name == "--config":
            raise UsageError(f"{flag} is a file on this machine; pass its settings as flags")
        if name in _PER_WORKER:
            raise UsageError(f"{flag} is set on each worker; leave it out")
    config = parse_settings(
        TRAIN_PRESETS, None, default=lambda _: TrainConfig.model, arguments=flags
    )
    config.check()
    return str(config.run_dir)


def warn_if_local(run_dir: str) -> None:
    """Warn if checkpoints would be deleted with the pod."""
    if not run_dir.startswith("/") or run_dir.startswith(_LOCAL_DISKS):
        logger.warning(
            f"--run_dir {run_dir} looks like a worker's own disk, which is deleted with "
            "the pod; use a mounted bucket or NFS that all workers see"
        )
