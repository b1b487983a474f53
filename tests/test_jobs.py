"""Job files for SkyPilot, Kubernetes and SLURM, each checked by the scheduler's own rules."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import DATA

from echo_eqx.cli import run
from echo_eqx.commands import tpu

SCRIPT = Path(__file__).parents[1] / "scripts" / "tpu.py"
TRAIN_FLAGS = ["--data", "a b", "--run_dir", "/mnt/echo/run"]
TPU = "kubernetes --image i:1 --nodes 8 --tpu tpu-v4-podslice --topology 2x4x4 --claim runs --spot"
GPUS = "kubernetes --image i:1 --nodes 4 --chips 8 --max_restarts 3 --max_hours 2"


@pytest.fixture
def tpu_py(monkeypatch, capsys):
    """Exit code, stdout and stderr of `tpu.py` with these arguments."""

    def call(text: str, flags: list[str] = TRAIN_FLAGS) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *text.split(), "--", *flags])
        code = 0
        try:
            run(tpu.main)
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return call


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with unknown fields forbidden, as `kubectl apply` forbids them."""
    out = dict(schema)
    if "properties" in schema:
        out["properties"] = {name: closed(part) for name, part in schema["properties"].items()}
        out.setdefault("additionalProperties", False)
    if isinstance(schema.get("items"), dict):
        out["items"] = closed(schema["items"])
    return out


@pytest.mark.parametrize("flags", [TPU, GPUS])
def test_a_jobset_matches_the_kubernetes_schema(tpu_py, flags):
    code, out, err = tpu_py(flags)
    assert code == 0, err
    schema = closed(json.loads((DATA / "jobset.schema.json").read_text()))
    jobset = yaml.safe_load(out)
    jsonschema.validate(jobset, schema)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(jobset, schema)


def test_a_jobset_restarts_for_lost_peers_and_preemption_but_not_for_errors(tpu_py):
    jobset = yaml.safe_load(tpu_py(GPUS)[1])["spec"]
    job = jobset["replicatedJobs"][0]["template"]["spec"]
    preempted, failed = job["podFailurePolicy"]["rules"]
    assert preempted["action"] == "Count" and job["backoffLimit"] == 0
    assert failed["action"] == "FailJob" and failed["onExitCodes"]["values"] == [1, 2]
    (rule,) = jobset["failurePolicy"]["rules"]  # everything else restarts the JobSet
    assert rule["action"] == "FailJobSet" and "PodFailurePolicy" in rule["onJobFailureReasons"]
    assert jobset["failurePolicy"]["maxRestarts"] == 3
    assert job["activeDeadlineSeconds"] == 7200


def test_pods_of_a_jobset_find_each_other(tpu_py):
    for flags, together in ((TPU, False), (GPUS, True)):
        jobset = yaml.safe_load(tpu_py(flags)[1])
        pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        *_, command = pod["containers"][0]["command"]
        assert command.startswith("exec python -m echo_eqx train --data 'a b' --run_dir /mnt")
        # DNS name of the first pod: JobSet, replicated job, job index, pod index, subdomain.
        assert ("--coordinator echo-train-0-0.echo:8476 --num_processes 4" in command) == together


def test_a_slurm_job_is_requeued_unless_it_finished_or_failed(tpu_py, tmp_path, monkeypatch):
    code, script, err = tpu_py("slurm --nodes 2 --gpus 4 --max_restarts 3 --sbatch_flags=-pgpu")
    assert code == 0, err
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "-pgpu"):
        assert f"#SBATCH {line}\n" in script
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >argv\nexit $SRUN\n')
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >>requeued\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    outcomes = {}
    for ended, count in [(0, 0), (1, 0), (2, 0), (75, 0), (76, 2), (137, 0), (76, 3)]:
        environment = {**os.environ, "SRUN": str(ended), "SLURM_RESTART_COUNT": str(count)}
        done = subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == ended
        outcomes[ended, count] = (tmp_path / "requeued").exists()
        (tmp_path / "requeued").unlink(missing_ok=True)
    assert [key for key, requeued in outcomes.items() if requeued] == [(75, 0), (76, 2), (137, 0)]
    assert (tmp_path / "argv").read_text().splitlines()[-4:] == TRAIN_FLAGS


def test_a_skypilot_job_restarts_for_lost_peers_and_preemption(tpu_py):
    flags = "skypilot --accelerators tpu-v4-64 --spot --bucket gs://mine --max_hourly_cost 90"
    task = yaml.safe_load(tpu_py(flags)[1])
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [75, 76] and task["resources"]["use_spot"]
    assert task["file_mounts"] == {"/mnt/echo": {"source": "gs://mine", "mode": "MOUNT"}}
    assert "coordinator" not in task["run"] and "[tpu]" in task["setup"]
    nodes = yaml.safe_load(tpu_py("skypilot --accelerators H100:8 --nodes 2")[1])
    together = nodes["run"].partition("/mnt/echo/run")[2].replace("exec ", "")
    environment = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    said = subprocess.check_output(["bash", "-c", f"echo {together}"], env=environment, text=True)
    assert said == "--coordinator 10.0.0.1:8476 --num_processes 2 --process_id 1\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "skypilot --accelerators tpu-v4-64 --spot --max_hourly_cost 90",
        "skypilot --accelerators H100:8 --nodes 4",
    ],
)
def test_skypilots_own_parser_accepts_the_job(tpu_py, tmp_path_factory, tmp_path, flags):
    home = tmp_path_factory.getbasetemp() / "skypilot"
    if not home.exists():
        venv.create(home, with_pip=True)
        subprocess.run([home / "bin" / "pip", "install", "-q", "skypilot"], check=True)
    (tmp_path / "job.yaml").write_text(tpu_py(flags)[1])
    read = """
import sky
task = sky.Task.from_yaml("job.yaml")
(resources,) = task.resources
print(task.num_nodes, resources.job_recovery)
"""
    done = subprocess.run(
        [home / "bin" / "python", "-c", read],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'recover_on_exit_codes': [75, 76]" in done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("skypilot --accelerators tpu-v4-8 --max_hourly_cost 0", "--max_hourly_cost: expected"),
        ("kubernetes --image i --tpu tpu-v4-podslice", "expected --tpu and --topology together"),
        ("kubernetes --image i --nodes 0", "--nodes: expected at least 1, got 0"),
        ("slurm --name Echo", "--name: expected a letter"),
        ("slurm --sbatch_flags='", "cannot split --sbatch_flags"),
    ],
)
def test_bad_input_gives_one_line_errors(tpu_py, text, said):
    code, out, err = tpu_py(text)
    assert (code, out) == (2, "") and err.startswith(f"error: {said}") and err.count("\n") == 1


def test_a_volume_is_not_mounted_over_system_folders(tpu_py):
    flags = ["--data", "d", "--run_dir", "/echo"]
    code, _, err = tpu_py("kubernetes --image i --claim runs", flags)
    assert code == 2 and "--run_dir: expected a path such as /mnt/echo/run" in err
    assert "got /echo" in err
