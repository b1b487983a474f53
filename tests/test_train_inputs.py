"""Settings of a run: where they come from, and what is rejected before anything is compiled."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import pytest
from conftest import GOLDEN, random_model
from processes import call
from shards import make_dataset
from test_sharding import CONFIG as SMALL
from test_sharding import mesh_of

import echo_eqx
from echo_eqx.config import DIT_PRESETS
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.json_data import to_json
from echo_eqx.model.dit import EchoDiT
from echo_eqx.sharding.hosts import Heartbeat, start_processes
from echo_eqx.sharding.mesh import make_mesh, mesh_shape
from echo_eqx.train import train_dit
from echo_eqx.train.config import (
    TRAIN_PRESETS,
    ObjectiveConfig,
    TrainConfig,
)
from echo_eqx.train.data import TrainData
from echo_eqx.train.flops import peak_flops
from echo_eqx.train.plan import lower_step
from echo_eqx.train.restore import check_same_run, newest_restorable
from echo_eqx.train.settings import parse_settings, settings_from_json
from echo_eqx.train.setup import compile_step
from echo_eqx.train.state import init_state
from echo_eqx.train.step import abstract_batch
from echo_eqx.train.train_dit import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), shards=4, per_shard=4, latent_dim=128)
    np.save(folder / "silence.npy", np.zeros((4, 128), np.float16))
    return folder


@pytest.fixture
def config(data, tmp_path, monkeypatch):
    def nothing(*_):
        raise AssertionError("it went on to compile")

    monkeypatch.setattr(train_dit, "compile_step", nothing)
    return dataclasses.replace(
        TRAIN_PRESETS["tiny"], data=str(data), run_dir=tmp_path / "run", cache_dir=tmp_path / "c"
    )


def refusal(config: TrainConfig, **changes) -> str:
    changed = dataclasses.replace(config, **changes)
    with pytest.raises(EchoError) as caught:
        changed.check()
        train(changed, Heartbeat(None))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_valid_inputs_reach_compilation(config):
    with pytest.raises(AssertionError, match="it went on to compile"):
        train(config, Heartbeat(None))


def test_unusable_data_is_rejected_by_name(config, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty: expected at least one shard, got no *.tar" in refusal(
        config, data=str(tmp_path / "empty")
    )
    assert "gone does not exist" in refusal(config, data=str(tmp_path / "gone"))
    assert "no *.tar" in refusal(config, data=str(tmp_path / "*.zip"))
    narrow = make_dataset(tmp_path / "narrow", shards=1, latent_dim=8)
    message = refusal(config, data=str(narrow))
    assert "expected latents of 128 channels, got 8 in " in message and "(--latent_dim)" in message
    message = refusal(config, data=str(narrow), latent_dim=8)
    assert "expected silence.safetensors or silence.npy next to the shards" in message
    assert "--silence zeros" in message
    np.save(tmp_path / "other.npy", np.zeros((4, 6), np.float16))
    assert "other.npy" in refusal(config, silence=str(tmp_path / "other.npy"))
    assert "4 shards" in refusal(config, num_streams=8)
    assert "hf://datasets" in refusal(config, data="hf://models/a/b")


def test_meshes_and_batches_that_do_not_divide_are_rejected(config):
    message = refusal(config, batch_size=12)
    assert "batch_size: expected a multiple of data x fsdp = 8" in message and "got 12" in message
    assert "expected a mesh of 8 devices" in refusal(config, mesh="fsdp=4")
    assert "expected tensor to divide the" in refusal(config, mesh="tensor=8")


def test_streams_that_do_not_divide_over_hosts_are_rejected(monkeypatch):
    from echo_eqx.train import device_loader

    mesh = make_mesh(mesh_shape("fsdp=8", 8))
    monkeypatch.setattr(device_loader, "owned_rows", lambda mesh, size: np.arange(0, 4))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UsageError, match="expected a multiple of the 4 hosts, got 2"):
        device_loader.owned_streams(mesh, 16, 2)
    assert device_loader.owned_streams(mesh, 16, 4) == [0]
    assert device_loader.owned_streams(mesh, 16, 8) == [0, 1]


def test_flags_out_of_range_are_rejected(config):
    cases = {
        "num_steps: expected at least 1, got 0": {"num_steps": 0},
        "max_speaker_frames: expected a multiple of 4, got 10": {"max_speaker_frames": 10},
        "got '3B'": {"model": "3B"},
        "--data is missing": {"data": None},
        "--sample_every needs --codec": {"sample_every": 5},
        "max_broken: expected 0 to 1, got 2.0": {"max_broken": 2.0},
        "seed: expected at least 0, got -1": {"seed": -1},
        "text_dropout: expected 0 to 1, got -0.1": {
            "objective": ObjectiveConfig(text_dropout=-0.1)
        },
        "timestep_logit_mean: expected -10 to 10, got nan": {
            "objective": ObjectiveConfig(timestep_logit_mean=float("nan"))
        },
        "--resume_from": {"init_from": "a", "resume_from": "b"},
    }
    for message, changes in cases.items():
        assert message in refusal(config, **changes)
    optimizer = {
        "max_grad_norm: expected a positive number, got 0.0": {"max_grad_norm": 0.0},
        "learning_rate: expected a positive number, got nan": {"learning_rate": float("nan")},
        "b2: expected less than 1, got 1.0": {"b2": 1.0},
        "at most 1, got 1.1": {"schedule": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6},
    }
    for message, changes in optimizer.items():
        changed = dataclasses.replace(config.optimizer, **changes)
        assert message in refusal(config, optimizer=changed)


def test_incomplete_process_flags_are_rejected():
    for arguments in [("h:1", None, None), (None, 2, 0), ("h:1", 2, 2), ("nowhere", 2, 0)]:
        with pytest.raises(UsageError, match=r"expected|needs?"):
            start_processes(*arguments, 1)


def test_an_unwritable_run_folder_is_reported(config, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to " in refusal(config, run_dir=tmp_path / "file" / "run")


def test_another_run_in_the_folder_is_rejected(config, tmp_path):
    from test_checkpoint import make_state, save

    save(config.run_dir, 1, make_state())
    assert "has another architecture: expected model_dim 192, got 32" in refusal(config)


def test_weights_of_other_sizes_are_rejected(config, tmp_path):
    model = random_model(EchoDiT, dataclasses.replace(DIT_PRESETS["tiny"], mlp_dim=64))
    echo_eqx.save(model, tmp_path / "m.safetensors")
    message = refusal(config, init_from=str(tmp_path / "m.safetensors"))
    assert "expected mlp_dim 512, as in this run, got 64" in message
    assert "does not exist" in refusal(config, init_from=str(tmp_path / "none.safetensors"))
    assert "does not exist" in refusal(config, resume_from=str(tmp_path / "none.pkl"))


def test_settings_round_trip_through_json(tmp_path):
    config = dataclasses.replace(TRAIN_PRESETS["tiny"], data="a", run_dir=tmp_path, num_streams=4)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(config)))

    def base_config(source: Path) -> TrainConfig:
        arguments = ["--config", str(source)]
        config = parse_settings(TRAIN_PRESETS, None, default=lambda _: "1.3B", arguments=arguments)
        assert config.config == source
        return dataclasses.replace(config, config=None, cache_dir=TrainConfig.cache_dir)

    def config_from_json(data, where: str) -> TrainConfig:
        return settings_from_json(TRAIN_PRESETS, "1.3B", data, where)

    assert base_config(file) == base_config(tmp_path) == config
    assert config_from_json({"model": "tiny", "seed": 3}, "x").batch_size == 16
    assert config_from_json({"optimizer": {"max_grad_norm": 2}}, "x").optimizer.max_grad_norm == 2.0
    bad = [{"stepz": 1}, {"num_steps": "x"}, {"optimizer": 3}, {"model": []}, [], {"export": 1}]
    for data in bad:
        with pytest.raises(EchoError, match="x does not hold the settings of a run"):
            config_from_json(data, "x")
    file.write_text("{")
    with pytest.raises(EchoError, match="cannot be read as settings"):
        base_config(file)


def test_flags_override_a_file_and_errors_are_one_line(tmp_path):
    config = dataclasses.replace(TRAIN_PRESETS["tiny"], data=str(tmp_path / "none"), num_steps=7)
    (tmp_path / "c.json").write_text(json.dumps(to_json(config)))
    file = ["--config", tmp_path / "c.json"]
    done = call("train", *file, "--num_steps", 9, "--help")
    assert "(default: 7)" in done.stdout and "(default: 16)" in done.stdout
    for flags, code, said in [
        ((), 1, "none does not exist"),
        (("--num_steps", "-3"), 2, "num_steps: expected at least 1, got -3"),
        (("--mesh", "rows=1"), 2, "expected mesh sizes such as"),
    ]:
        done = call("train", *file, *flags)
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith("error: ") and said in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_step_accepts_only_the_shapes_it_was_compiled_for(config, monkeypatch):
    monkeypatch.setitem(DIT_PRESETS, "small", SMALL)
    config = dataclasses.replace(
        config,
        model="small",
        batch_size=2,
        max_frames=8,
        max_text_bytes=8,
        max_speaker_frames=4,
        objective=ObjectiveConfig(dtype="float32"),
    )
    mesh = mesh_of((1, 1, 1))
    compiled = compile_step(lambda: lower_step(config, mesh))
    state = init_state(config.dit_config(), config.optimizer, mesh, 0)
    longer = dataclasses.replace(config, max_frames=9).dit_config()
    batch = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
        abstract_batch(mesh, config.batch_size, longer),
    )
    with pytest.raises(TypeError, match=r"latents.*float32\[2,8,8\].*float32\[2,9,8\]"):
        compiled(state, batch, jr.key(0))


def test_known_chips():
    assert peak_flops("TPU v4") == 275e12 and peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == 459e12 and peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("TPU v6 lite") == 918e12 and peak_flops("cpu") is None


def resume(config: TrainConfig, **changes) -> None:
    """Resume from the checkpoint of `saved_run` with other settings."""
    from test_checkpoint import CONFIG

    changed = dataclasses.replace(config, **changes)
    checkpoint = newest_restorable(config.run_dir)
    assert checkpoint is not None
    check_same_run(checkpoint, CONFIG, changed, {"digest": "same"})


@pytest.fixture
def saved_run(tmp_path) -> TrainConfig:
    """Settings of a run with an EMA and a checkpoint after step 4 of 10."""
    from test_checkpoint import CONFIG, make_state, writer_in

    optimizer = dataclasses.replace(TRAIN_PRESETS["tiny"].optimizer, ema_decay=0.9)
    config = dataclasses.replace(
        TRAIN_PRESETS["tiny"], data="a", run_dir=tmp_path / "run", num_steps=10, optimizer=optimizer
    )
    settings = to_json(config)
    del settings["skip_longer"]  # as from an earlier version without this setting
    manifest = {"step": 4, "samples_seen": 8, "model": dataclasses.asdict(CONFIG), "seed": 0}
    manifest |= {"settings": settings, "data": {"digest": "same"}}
    writer = writer_in(config.run_dir)
    writer.save(make_state(), manifest, {"0": [0, 0, 0]})
    writer.wait()
    return config


def test_changed_settings_of_a_resumed_run_are_reported_one_per_line(saved_run, capsys):
    elsewhere = {"data": "b", "checkpoint_every": 7, "mesh": "fsdp=8", "log_every": 1}
    resume(saved_run, **elsewhere)
    assert capsys.readouterr().err == "", "the same run, started again"
    cases = {
        "--batch_size was 16 until step 4 and is 32 from now on": {"batch_size": 32},
        "--skip_longer was False until step 4 and is True": {"skip_longer": True},
        "--text_dropout was 0.1 until": {"objective": ObjectiveConfig(text_dropout=0.2)},
        "--eval_data was None until": {"eval_data": "c"},
        "--silence was None until": {"silence": "zeros"},
        "--init_from other.pkl is ignored: the run resumes from its own step 4": {
            "init_from": "other.pkl"
        },
        "the run has done 4 steps and --num_steps is 3: nothing to do": {"num_steps": 3},
    }
    for message, changed in cases.items():
        resume(saved_run, **changed)
        said = capsys.readouterr().err
        assert said.startswith("warning: ") and message in said and said.count("\n") == 1
    optimizer = dataclasses.replace(saved_run.optimizer, learning_rate=1e-2, ema_decay=0.99)
    resume(saved_run, optimizer=optimizer)
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["--learning_rate", "--ema_decay"]


def test_a_stretched_schedule_is_reported_with_its_rates(saved_run, capsys):
    resume(saved_run, num_steps=1000)
    said = capsys.readouterr().err
    # After step 4 of 10 the cosine is at 0.4; of 1000 the warm-up of 50 steps is at 4.
    assert "--num_steps was 10 until step 4 and is 1000" in said
    assert "step 5 has rate 8e-05 instead of 0.000655" in said and said.count("\n") == 1


def test_an_ema_is_not_dropped(saved_run):
    optimizer = dataclasses.replace(saved_run.optimizer, ema_decay=0.0)
    with pytest.raises(
        EchoError, match=r"--ema_decay is 0; continue with --ema_decay 0.9, or start another"
    ):
        resume(saved_run, optimizer=optimizer)


def test_a_codec_of_another_latent_width_is_rejected(config):
    codec = str(GOLDEN / "dacvae_tiny" / "weights.pth")
    said = refusal(config, codec=codec, sample_every=4)
    assert "expected a codec with 128 channels, as in the data, got 12" in said


def test_another_latent_width_names_the_models_that_fit(config, tmp_path):
    narrow = make_dataset(tmp_path / "narrow", shards=1, latent_dim=32)
    assert "(--latent_dim); --model voice fits" in refusal(config, data=str(narrow))
    odd = make_dataset(tmp_path / "odd", shards=1, latent_dim=7)
    assert "no --model fits; --latent_dim 7 makes" in refusal(config, data=str(odd))


def test_the_frame_rate_comes_from_the_codec_json_next_to_the_shards(config, data, tmp_path):
    mesh = make_mesh(mesh_shape("fsdp=8", 8))

    def rate(source: Path) -> float:
        return TrainData(str(source), config, config.dit_config(), mesh).frame_rate

    assert rate(data) == 25
    other = make_dataset(tmp_path / "data", shards=4, per_shard=1, latent_dim=128)
    np.save(other / "silence.npy", np.zeros((4, 128), np.float16))
    (other / "codec.json").write_text('{"id": "x", "sample_rate": 44100, "hop": 512}')
    assert rate(other) == pytest.approx(86.13, abs=0.01)
    for damaged in ('{"sample_rate": 1, "hop": 0}', '{"sample_rate": "1"}', "[", '{"hop": 1e400}'):
        (other / "codec.json").write_text(damaged)
        assert rate(other) == 25
