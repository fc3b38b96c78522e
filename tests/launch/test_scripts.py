"""The scripts of launch/ with imitations of srun, scontrol, ssh, gcloud and systemd."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fakes

_LAUNCH = Path(__file__).parents[2] / "launch"
_SCRIPTS = sorted([*_LAUNCH.glob("*.sh"), *_LAUNCH.glob("*.sbatch")])


def test_there_is_a_script_for_each_kind_of_cluster():
    assert [script.name for script in _SCRIPTS] == ["entrypoint.sh", "hosts.sh", "slurm.sbatch", "tpu-pod.sh", "tpu-worker.sh"]


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_bash_and_pass_shellcheck(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, "--shell=bash", script], check=True)


@pytest.mark.parametrize("script", ["hosts.sh", "tpu-pod.sh", "tpu-worker.sh"])
def test_scripts_without_arguments_print_their_usage(script):
    done = subprocess.run([_LAUNCH / script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: launch/{script} ")


# The entrypoint.


def _entrypoint(folder, *flags, **environment):
    given = fakes.install(folder, {"python": fakes.PYTHON, "ray": "record()\nsys.exit(int(os.environ.get('RAY', 0)))"})
    done = subprocess.run(
        [_LAUNCH / "entrypoint.sh", *flags], env=given | environment, capture_output=True, text=True, check=False, timeout=60
    )
    return done, [row["argv"][1:] for row in fakes.records(folder, "python")]


def test_entrypoint_runs_the_preflight_and_the_run_with_the_same_flags(tmp_path):
    flags = ["--config=a b", "--workdir=/shared/run", "--process_id=0"]
    done, calls = _entrypoint(tmp_path, *flags, CODES="[3]")
    assert calls == [["discover_jax.doctor", *flags], ["discover_jax.main", *flags]]
    assert done.returncode == 3  # of the run
    assert not fakes.records(tmp_path, "ray")


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_failed_preflight_decides_the_exit_code(tmp_path, code):
    done, calls = _entrypoint(tmp_path, "--config=a", DOCTOR=str(code))
    assert done.returncode == code
    assert len(calls) == 1


def test_preflight_can_be_skipped_and_another_module_run(tmp_path):
    _, calls = _entrypoint(tmp_path, "--config=a", PREFLIGHT="0", MODULE="discover_jax.search")
    assert calls == [["discover_jax.search", "--config=a"]]


def test_only_the_first_pod_joins_the_ray_cluster(tmp_path):
    _entrypoint(tmp_path / "0", "--config=a", RAY_HEAD="head:6379", JOB_COMPLETION_INDEX="0")
    (call,) = fakes.records(tmp_path / "0", "ray")
    assert call["argv"][:3] == ["start", "--address=head:6379", "--num-cpus=0"]
    _entrypoint(tmp_path / "1", "--config=a", RAY_HEAD="head:6379", JOB_COMPLETION_INDEX="1")
    assert not fakes.records(tmp_path / "1", "ray")
    # The cluster may become ready: the code says that a restart may help.
    done, calls = _entrypoint(tmp_path / "2", "--config=a", RAY_HEAD="head:6379", RAY="1")
    assert (done.returncode, calls) == (3, [])
    assert "launch/gke-programs.yaml" in done.stderr


def test_network_settings_are_read_and_a_missing_file_is_an_error(tmp_path):
    # As the vendors' files: not written for `set -u`, and their last command may fail.
    (tmp_path / "nccl.sh").write_text('export CODES="${UNSET_BEFORE}[7]"\nfalse\n')
    done, _ = _entrypoint(tmp_path, "--process_id=0", NCCL_SETUP=str(tmp_path / "nccl.sh"))
    assert done.returncode == 7
    done, _ = _entrypoint(tmp_path, "--process_id=0", NCCL_SETUP=str(tmp_path / "absent.sh"))
    assert done.returncode == 2
    assert "NCCL_SETUP" in done.stderr


# Slurm.


def _job(folder: Path, codes: list[int], **environment: str) -> tuple[Path, dict[str, str]]:
    """A checkout with an entrypoint whose tasks end with the codes, and the environment of a job."""
    given = fakes.install(folder, {"srun": fakes.SRUN, "scontrol": fakes.SCONTROL, "python": fakes.PYTHON})
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    (folder / "launch").mkdir()
    for name in ("slurm.sbatch", "entrypoint.sh"):
        shutil.copy(_LAUNCH / name, folder / "launch")
    job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_CPUS_PER_TASK": "64"}
    return folder, given | job | {"TASKS": str(len(codes)), "CODES": json.dumps(codes)} | environment


def _run_job(folder, codes, **environment):
    checkout, given = _job(folder, codes, **environment)
    done = subprocess.run(
        ["bash", "launch/slurm.sbatch", "--config=a b", "--workdir=/shared/run"],
        cwd=checkout,
        env=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert not list(checkout.glob(".codes-*")), done.stderr
    return done, [row["argv"] for row in fakes.records(folder, "scontrol") if row["argv"][0] == "requeue"]


def test_slurm_gives_each_task_its_cores_and_its_process_id(tmp_path):
    done, requeued = _run_job(tmp_path, [0, 0])
    assert (done.returncode, requeued) == (0, []), done.stderr
    (srun,) = fakes.records(tmp_path, "srun")
    assert "--cpus-per-task=64" in srun["argv"]  # srun does not inherit it since 22.05
    calls = [row["argv"] for row in fakes.records(tmp_path, "python") if "discover_jax.main" in row["argv"]]
    common = ["-m", "discover_jax.main", "--config=a b", "--workdir=/shared/run", "--coordinator=node-1:20123", "--num_processes=2"]
    assert sorted(calls) == [[*common, f"--process_id={task}"] for task in range(2)]


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "requeues"),
    [
        ([2, 2], "0", 2, 0),  # a config error
        ([2, 134], "0", 2, 0),  # srun returns 134: jax aborted the other task
        ([3, 1], "0", 1, 0),  # an unexpected error
        ([3, 0], "0", 3, 1),
        ([137, 3], "19", 137, 1),
        ([137, 3], "20", 137, 0),  # the maximum
        ([130, 130], "0", 130, 0),
    ],
)
def test_slurm_requeues_after_a_loss_but_not_after_an_error(tmp_path, codes, restarts, code, requeues):
    done, requeued = _run_job(tmp_path, codes, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code
    assert requeued == [["requeue", "123"]] * requeues
    assert ("Not requeued" in done.stderr) == (restarts == "20")


def test_slurm_does_not_start_a_run_after_a_failed_preflight(tmp_path):
    done, requeued = _run_job(tmp_path, [0, 0], DOCTOR="2")
    assert (done.returncode, requeued) == (2, [])
    assert not [row for row in fakes.records(tmp_path, "python") if "discover_jax.main" in row["argv"]]


def test_slurm_requeues_at_the_time_limit(tmp_path):
    checkout, given = _job(tmp_path, [0, 0])
    # The tasks run until the requeue ends them.
    slow = '#!/usr/bin/env bash\necho > "started-$SLURM_PROCID"\nuntil [ -e ended ]; do sleep 0.1; done\nexit 137\n'
    (checkout / "launch" / "entrypoint.sh").write_text(slow)
    batch = subprocess.Popen(["bash", "launch/slurm.sbatch", "--config=a"], cwd=checkout, env=given, stderr=subprocess.PIPE, text=True)
    try:
        _wait(lambda: len(list(checkout.glob("started-*"))) == 2)
        batch.send_signal(signal.SIGUSR1)
        _wait(lambda: any(row["argv"][0] == "requeue" for row in fakes.records(tmp_path, "scontrol")))
        assert batch.poll() is None  # the script stays until Slurm ends the job
    finally:
        (checkout / "ended").touch()
    _, errors = batch.communicate(timeout=30)
    assert "time limit" in errors
    assert [row["argv"] for row in fakes.records(tmp_path, "scontrol") if row["argv"][0] == "requeue"] == [["requeue", "123"]]


def _wait(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ssh.


def test_hosts_script_strips_the_users_name_from_the_coordinator(tmp_path):
    given = fakes.install(tmp_path, {"ssh": fakes.SSH, "python": fakes.PYTHON})
    logs = {"LOGS": str(tmp_path / "logs"), "CODES": "[3, 2]"}
    done = subprocess.run(
        [_LAUNCH / "hosts.sh", "me@a,you@b", "--config=a b"], env=given | logs, capture_output=True, text=True, check=False, timeout=60
    )
    calls = [row["argv"][-2] for row in fakes.records(tmp_path, "ssh")]
    assert sorted(calls) == ["me@a", "you@b"]
    runs = sorted(row["argv"][1:] for row in fakes.records(tmp_path, "python") if "discover_jax.main" in row["argv"])
    assert runs == [
        ["discover_jax.main", "--config=a b", "--coordinator=a:47101", "--num_processes=2", f"--process_id={i}"] for i in (0, 1)
    ]
    assert done.returncode == 2  # something to change, although the first host reports only a loss
    assert "process 1 (you@b) ended with code 2" in done.stderr
    assert "discover_jax.main" in (tmp_path / "logs" / "process-1.txt").read_text()


# TPU VMs.


@pytest.fixture
def pod(tmp_path):
    """A function that runs tpu-pod.sh in a repository, with two workers."""
    programs = {"gcloud": fakes.GCLOUD, "systemctl": fakes.SYSTEMCTL, "python3": fakes.PYTHON, "sudo": "record()", "python": fakes.PYTHON}
    given = fakes.install(tmp_path, programs) | {"WORKERS": str(tmp_path / "workers")}
    for worker in range(2):
        (tmp_path / "workers" / str(worker)).mkdir(parents=True)
    repository = tmp_path / "repository"
    shutil.copytree(_LAUNCH, repository / "launch")
    git = ["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)

    def run(*arguments, code=0, **environment):
        done = subprocess.run(
            ["launch/tpu-pod.sh", *arguments],
            cwd=repository,
            env=given | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


def test_tpu_pod_before_the_setup(tmp_path, pod):
    assert pod("status", "slice", "zone-a", STATE="WAITING_FOR_RESOURCES") == "WAITING_FOR_RESOURCES\n"
    assert not any("ssh" in row["argv"] for row in fakes.records(tmp_path, "gcloud")), "there are no workers yet"
    assert pod("status", "slice", "zone-a") == "ACTIVE\n"
    assert pod("run", "slice", "zone-a", "--config=a", code=2).count("is not set up. Run launch/tpu-pod.sh setup first") == 2
    pod("setup", "slice", "zone-a")
    (tmp_path / "workers" / "1" / "discover_jax" / ".venv" / "bin" / "python").unlink()  # its installation failed
    assert "has no environment" in pod("run", "slice", "zone-a", "--config=a", code=2)


def test_tpu_pod_from_the_request_to_the_end(tmp_path, pod):
    pod("create", "slice", "zone-a", "v5p-16", "--spot")
    create = fakes.records(tmp_path, "gcloud")[-1]["argv"]
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", "slice"]
    assert {"--node-id=slice", "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--spot"} <= set(create)
    pod("setup", "slice", "zone-a")
    installs = [row["argv"] for row in fakes.records(tmp_path, "python3")]
    assert ["-m", "uv", "venv", "--quiet", "--clear", "--seed", "--python", "3.11", ".venv"] in installs
    assert sum("constraints/py311.txt" in argv for argv in installs) == 2  # both workers
    pod("run", "slice", "zone-a", "--config=a b", "--workdir=/shared/run")
    flags = ["--distributed", "--config=a b", "--workdir=/shared/run"]
    for worker in range(2):
        folder = tmp_path / "workers" / str(worker) / "discover_jax"
        log = (folder / "run.log").read_text()
        assert log.index("-m discover_jax.doctor") < log.index("-m discover_jax.main")
        unit = (folder.parent / ".config/systemd/user/discover_jax.service").read_text()
        assert "Restart=on-failure\n" in unit
        assert "RestartPreventExitStatus=1 2 130\n" in unit
        assert "StartLimitBurst=21\n" in unit
    runs = [row["argv"] for row in fakes.records(tmp_path, "python") if row["argv"][1:2] == ["discover_jax.main"]]
    assert runs == [["-m", "discover_jax.main", *flags]] * 2
    assert pod("status", "slice", "zone-a").count("ActiveState=active") == 2
    pod("setup", "slice", "zone-a", code=2)  # would replace the environment of the run
    pod("stop", "slice", "zone-a")
    assert pod("status", "slice", "zone-a").count("ActiveState=inactive") == 2
    pod("delete", "slice", "zone-a")
    assert fakes.records(tmp_path, "gcloud")[-1]["argv"][2:5] == ["queued-resources", "delete", "slice"]


def test_a_command_that_gcloud_repeats_starts_one_run(tmp_path, pod):
    pod("setup", "slice", "zone-a")
    pod("run", "slice", "zone-a", "--config=a", BREAKS="1")
    started = [row["home"] for row in fakes.records(tmp_path, "systemctl") if "start" in row["argv"]]
    assert started == [str(tmp_path / "workers" / str(worker)) for worker in range(2)]
    # A second `run` ends the first one.
    pod("run", "slice", "zone-a", "--config=a", RESTARTS="5")
    verbs = [row["argv"][1] for row in fakes.records(tmp_path, "systemctl") if row["home"].endswith("/1")]
    assert verbs[-4:] == ["stop", "reset-failed", "daemon-reload", "start"]
    unit = tmp_path / "workers" / "1" / ".config/systemd/user/discover_jax.service"
    assert "StartLimitBurst=6\n" in unit.read_text()


def test_tpu_pod_through_identity_aware_proxy(tmp_path, pod):
    pod("setup", "slice", "zone-a", IAP="1")
    for row in fakes.records(tmp_path, "gcloud"):
        assert row["argv"][0] == "alpha"
        assert "--tunnel-through-iap" in row["argv"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_workers_unit_is_valid(tmp_path, pod):
    pod("setup", "slice", "zone-a")
    pod("run", "slice", "zone-a", "--config=a")
    unit = tmp_path / "workers" / "0" / ".config/systemd/user/discover_jax.service"
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False, timeout=60)
    assert "discover_jax.service" not in done.stderr, done.stderr
