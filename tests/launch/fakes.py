"""Imitations of the commands of clusters, for the tests of launch/. They record their arguments and fail as the real ones do."""

import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_RECORD = (
    f"#!{sys.executable} -S\n"
    """import json, os, subprocess, sys
def record(**more):
    with open(os.environ["RECORDS"], "a") as file:
        file.write(json.dumps({"name": os.path.basename(sys.argv[0]), "argv": sys.argv[1:], **more}) + "\\n")
"""
)

# Runs the command once per task, all at the same time, and returns the highest code, as Slurm does.
SRUN = """
record()
command = [part for part in sys.argv[1:]]
while command[0].startswith("--"):
    command.pop(0)
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(task), "SLURM_NTASKS": os.environ["TASKS"]})
    for task in range(int(os.environ["TASKS"]))
]
sys.exit(max(task.wait() % 256 for task in tasks))
"""

SCONTROL = """
record()
if sys.argv[1:3] == ["show", "hostnames"]:
    print("node-1\\nnode-2")
"""

# The remote shell gets the last argument as text. A command killed by the lost connection gives 255.
SSH = """
record()
sys.exit(subprocess.call(["bash", "-c", sys.argv[-1]]))
"""

# Each worker is a folder (WORKERS/0, WORKERS/1, ...). If BREAKS is set, the first connection of worker 1 breaks after the command has run,
# and gcloud repeats the command. gcloud returns the code of the first worker that failed.
GCLOUD = """
record()
argv = [part for part in sys.argv[1:] if part not in ("alpha", "--tunnel-through-iap")]
workers = sorted(os.scandir(os.environ["WORKERS"]), key=lambda entry: entry.name)
if argv[:4] == ["compute", "tpus", "tpu-vm", "scp"]:
    for worker in workers:
        subprocess.check_call(["cp", argv[4], worker.path])
elif argv[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
    (command,) = [part.removeprefix("--command=") for part in argv if part.startswith("--command=")]
    codes = []
    for number, worker in enumerate(workers):
        for attempt in range(2 if os.environ.get("BREAKS") and number == 1 else 1):
            environment = {**os.environ, "HOME": worker.path, "USER": "somebody"}
            code = subprocess.call(["bash", "-c", command], cwd=worker.path, env=environment)
        codes.append(code)
    sys.exit(next((code for code in codes if code), 0))
elif argv[:4] == ["compute", "tpus", "queued-resources", "describe"]:
    print(os.environ.get("STATE", "ACTIVE"))
"""

# `start` runs the service's command to its end; the unit counts as active after that.
SYSTEMCTL = """
record(home=os.environ["HOME"])
argv = [part for part in sys.argv[1:] if not part.startswith("-")]
state = os.path.join(os.environ["HOME"], "active")
if argv[0] == "is-active":
    sys.exit(0 if os.path.exists(state) else 3)
if argv[0] == "stop" and os.path.exists(state):
    os.remove(state)
if argv[0] == "show":
    print("ActiveState=" + ("active" if os.path.exists(state) else "inactive"))
if argv[0] == "start":
    unit = open(os.path.join(os.environ["HOME"], ".config/systemd/user", argv[1] + ".service")).read()
    fields = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    with open(fields["StandardOutput"].removeprefix("append:"), "a") as log:
        subprocess.check_call(fields["ExecStart"].split(), cwd=fields["WorkingDirectory"], stdout=log, stderr=log)
    open(state, "w").close()
"""

# Prints and records the module and its arguments; its code is CODES[process id] for the run, DOCTOR for the preflight.
PYTHON = """
record()
module = sys.argv[sys.argv.index("-m") + 1] if "-m" in sys.argv else ""
if module == "uv" and sys.argv[3] == "venv":
    os.makedirs(".venv/bin", exist_ok=True)
    subprocess.check_call(["cp", sys.argv[0], ".venv/bin/python"])
print("python", *sys.argv[1:])
if module == "discover_jax.doctor":
    sys.exit(int(os.environ.get("DOCTOR", 0)))
numbers = [int(part.split("=")[1]) for part in sys.argv if part.startswith("--process_id=")]
if numbers and "CODES" in os.environ:
    sys.exit(json.loads(os.environ["CODES"])[numbers[0]])
"""


def install(folder: Path, programs: Mapping[str, str]) -> dict[str, str]:
    """Writes the programs (name, text after the common part) and returns the environment that uses them."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name, text in programs.items():
        path = folder / "bin" / name
        path.write_text(_RECORD + text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "JAX_", "PYTHON"))}
    return {**kept, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RECORDS": str(folder / "records.jsonl")}


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the program with this name was given, in order."""
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["name"] == name]
