"""The training loop leaves nothing open, whatever fails."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest

from echo_eqx.errors import EchoError
from echo_eqx.sharding.hosts import Heartbeat
from echo_eqx.sharding.mesh import make_mesh, mesh_shape
from echo_eqx.train import loop
from echo_eqx.train.config import TRAIN_PRESETS
from echo_eqx.train.device_loader import DeviceLoader


def test_a_checkpoint_that_fails_still_closes_the_loader_and_the_progress_line(
    tmp_path, monkeypatch
):
    closed = []

    class Source:
        def __init__(self) -> None:
            self.examples: dict[str, str] = {}

        def __next__(self) -> None: ...

        def close(self) -> None:
            closed.append("loader")

    def fail(writer) -> None:
        raise EchoError("the disk is full")

    monkeypatch.setattr(loop.ProgressLine, "close", lambda line: closed.append("progress"))
    monkeypatch.setattr(loop.CheckpointWriter, "wait", fail)
    monkeypatch.setattr(loop, "StopSignal", SimpleNamespace)  # pytest keeps its handlers
    config = dataclasses.replace(TRAIN_PRESETS["tiny"], run_dir=tmp_path, num_steps=1)
    mesh = make_mesh(mesh_shape("", 8))
    trainer = loop.Trainer(
        config=config,
        mesh=mesh,
        sizes=config.dit_config(),
        data={},
        state=cast(Any, SimpleNamespace(step=1, model=None)),  # all steps are done
        samples_seen=0,
        compiled=lambda: None,
        step_flops=1.0,
        frame_rate=25.0,
        loader=DeviceLoader(Source(), dict, mesh, 8),
        evaluate=None,
        log_samples=None,
    )
    with pytest.raises(EchoError, match="the disk is full"):
        loop.train_loop(trainer, "0" * 16, Heartbeat(None))
    assert closed == ["progress", "loader"]
