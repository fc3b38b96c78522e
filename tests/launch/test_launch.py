"""The scripts that start runs on several hosts are well formed and complete. hosts.sh really starts two local processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

_LAUNCH = Path(__file__).parents[2] / "launch"
_SCRIPTS = sorted([*_LAUNCH.glob("*.sh"), *_LAUNCH.glob("*.sbatch")])
_FAULTS = Path(__file__).parents[1] / "faults"


def test_there_is_a_script_for_each_kind_of_cluster():
    assert [script.name for script in _SCRIPTS] == ["hosts.sh", "slurm.sbatch", "tpu-pod.sh"]


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_bash_and_pass_shellcheck(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, "--shell=bash", script], check=True)


@pytest.mark.parametrize("script", ["hosts.sh", "tpu-pod.sh"])
def test_scripts_without_arguments_print_their_usage(script):
    done = subprocess.run([_LAUNCH / script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: launch/{script} ")


def _pod(name: str) -> tuple[dict, dict, dict]:
    """The JobSet, its only job and its only container."""
    (jobset,) = yaml.safe_load_all((_LAUNCH / name).read_text())
    assert jobset["apiVersion"].startswith("jobset.x-k8s.io/")
    assert jobset["kind"] == "JobSet"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return jobset, job, container


@pytest.mark.parametrize(("name", "device", "each"), [("gke-gpu.yaml", "nvidia.com/gpu", 8), ("gke-tpu.yaml", "google.com/tpu", 4)])
def test_jobset_has_one_process_per_host_with_all_its_devices(name, device, each):
    jobset, job, container = _pod(name)
    hosts = job["parallelism"]
    assert job["completions"] == hosts > 1
    assert job["completionMode"] == "Indexed"
    # A single restarted pod could not join the others, so JobSet restarts all.
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert container["resources"]["limits"][device] == each
    (command,) = container["args"]
    flags = dict(part.removeprefix("--").split("=", 1) for part in command.split() if part.startswith("--") and "=" in part)
    assert int(flags["config.mesh.expert"]) == hosts * each
    assert flags["workdir"].startswith(container["volumeMounts"][0]["mountPath"] + "/")
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    if "--distributed" not in command:
        name, job_name = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["name"]
        host, port = flags["coordinator"].split(":")
        assert host == f"{name}-{job_name}-0-0.{name}"
        assert int(port) in [entry["containerPort"] for entry in container["ports"]]
        assert int(flags["num_processes"]) == hosts
        assert flags["process_id"] == "${JOB_COMPLETION_INDEX}"


def test_all_flags_of_the_scripts_exist():
    done = subprocess.run(
        [sys.executable, "-m", "discover_jax.main", "--helpfull"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    for flag in ("coordinator", "num_processes", "process_id", "distributed", "workdir"):
        assert re.search(rf"^  --{flag}\b", done.stdout, re.MULTILINE), flag


@pytest.mark.slow
def test_hosts_script_runs_two_local_processes(tmp_path):
    sys.path.insert(0, str(_FAULTS))
    from phrase_model import write_phrase_model

    write_phrase_model(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = [f"--config={_FAULTS / 'phrase_config.py'}:{tmp_path / 'model'}", "--config.train.steps=1", f"--workdir={tmp_path / 'run'}"]
    mesh = ["--config.mesh.data=2", "--config.train.rows=2"]
    variables = {"COORDINATOR": f"127.0.0.1:{port}", "PYTHON": sys.executable, "LOGS": str(tmp_path / "logs"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [_LAUNCH / "hosts.sh", "localhost,localhost", *config, *mesh],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b2 processes\b", done.stdout)
    assert (tmp_path / "run" / "journal.jsonl").read_bytes().count(b"\n") == 6
    assert [log.name for log in (tmp_path / "logs").iterdir()] == ["process-1.txt"]
    # The script exits with the code of a failing process.
    done = subprocess.run(
        [_LAUNCH / "hosts.sh", "localhost,localhost", *config, "--config.mesh.data=4", "--config.train.rows=4"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 2
    assert re.search(r"config\.mesh\b.*\b4 x 1 x 1 = 4\b", done.stderr)
