"""A small run, killed before its n-th file operation and again while it resumes; then it finishes. `killed_run.py FOLDER N [N ...]`

The run writes its files in the same order as `main`: journal, best/, rollouts, metrics, and in the background the checkpoint. Its model is
one number, which determines the scores of a step and which the step changes, so lost or repeated state shows in all later steps.
Each start is a fork of this process, which has only imported everything.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from discover_jax.archive.archive import Archive, best_of, lineage
from discover_jax.archive.journal import Journal
from discover_jax.archive.selectors import SELECTORS, step_rng
from discover_jax.learning.train_state import TrainState, adam, init_train_state
from discover_jax.runs.best import write_best
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.host_state import HostState
from discover_jax.runs.metrics import MetricsWriter
from discover_jax.runs.rollouts import COLUMNS, write_rollouts
from discover_jax.runs.summary import step_row
from discover_jax.runs.workdir import open_workdir
from discover_jax.types import Attempt, Outcome, StopReason

BESIDE = {"disclosure": b"{}\n", "rerun": "#!/bin/sh\n"}
STEPS, GROUPS, GROUP_SIZE = 3, 2, 3
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
"""File operations, by the names of Python's audit events. `os.write` and `os.fsync` have none and are wrapped."""


def attempts_of(step: int, parents: list, number: float) -> list[Attempt]:
    """Scores depend on the step, the parents and the number. Some programs fail, and some are equal."""
    rng = np.random.default_rng([step, *number.hex().encode(), *"".join(p.id for p in parents).encode()])
    rows = []
    for group, parent in enumerate(parents):
        for index in range(GROUP_SIZE):
            score = round(float(rng.random()) / 2 + step / 10, 3)
            failed = rng.random() < 0.2
            rows.append(
                Attempt(
                    id=f"{step:04d}-{group:03d}-{index:03d}",
                    parent_id=parent.id,
                    task="boats",
                    step=step,
                    group=group,
                    index=index,
                    code=f"# {parent.id} -> {score}\n" * 20,
                    outcome=Outcome.TIMEOUT if failed else Outcome.OK,
                    detail="",
                    stdout="",
                    score=None if failed else score,
                    private_score=None,
                    reward=0.0 if failed else score,
                    adapter_step=step,
                    tokens=5,
                    stop=StopReason.STOP_TOKEN,
                )
            )
    return rows


def run(folder: Path) -> None:
    """Starts or resumes the run."""
    with open_workdir(folder, {"seed": 5}, "train") as workdir:
        journal, metrics = Journal(workdir.journal_path), MetricsWriter(workdir.metrics_path)
        checkpoints = Checkpoints(workdir.checkpoints_dir, keep=2, every=0)
        state = init_train_state({"number": jnp.zeros(3)}, adam())
        first, archive = 0, Archive((), 4)
        if (found := checkpoints.resume(state, sys.exit)) is not None:  # kills damage no checkpoint
            latest, restored, row = found
            assert restored is not None
            host = HostState.from_json(row, latest)
            state, first, archive = restored, latest + 1, Archive.from_json(host.archive, 4)
            journal.resume(host.journal_position, host.journal_sha256)
        else:
            journal.truncate(0)
        metrics.truncate(first)
        best = best_of([s for a in journal.read() if (s := a.state()) is not None])
        for step in range(first, STEPS):
            parents = SELECTORS["greedy"](archive, GROUPS, step_rng(5, step), epsilon=0.5)
            attempts = attempts_of(step, parents, float(state.lora["number"][0]))
            mean = float(np.mean([a.reward for a in attempts]))
            state = TrainState({"number": state.lora["number"] * 0.5 + mean}, state.opt_state, state.step + 1)
            states = [s for a in attempts if (s := a.state()) is not None]
            archive = archive.add(states)
            previous, best = best, best_of([best, *states] if best is not None else states)
            checkpoints.finish()  # of the step before
            journal.append(attempts)
            if best is not None and best != previous:
                grade = {"score": best.score, "step": step}
                write_best(workdir.best_dir, lineage=lineage(journal.read(), best.id), submission=b"id,y\n", grade=grade, **BESIDE)
            blank = dict.fromkeys(COLUMNS) | dict.fromkeys(("step", "group", "index", "prompt_tokens", "tokens"), 0) | {"cached": False}
            write_rollouts(workdir.rollouts_dir, step, [{**blank, "id": a.id, "reply": a.code, "score": a.score} for a in attempts])
            metrics.write(step_row(step, attempts, best={"boats": best}, timings={}, learning_metrics={}))
            checkpoints.begin(step, state, HostState.of(0, archive.to_json(), [], journal).to_json())
        checkpoints.close()


def count_operations(kill_at: int) -> list[int]:
    """Counts file operations in the only element of the returned list. Dies before number `kill_at`, or midway if it is a write."""
    count = [0]
    write, fsync = os.write, os.fsync

    def due() -> bool:
        count[0] += 1
        return count[0] == kill_at

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killing_write(descriptor, data):
        if due():
            write(descriptor, bytes(data)[: len(data) // 2])
            die()
        return write(descriptor, data)

    def killing_fsync(descriptor):
        if due():
            die()
        fsync(descriptor)

    def hook(event, args):
        if event in OPERATIONS and due():
            die()

    os.write, os.fsync = killing_write, killing_fsync
    sys.addaudithook(hook)
    return count


def start(folder: Path, kill_at: int = 0) -> int | None:
    """Starts the run in a new process. Returns its number of file operations; None if it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            count = count_operations(kill_at)
            run(folder)
            done = count[0]
            os.write(writer, str(done).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status != 0:
        sys.exit(f"The run in {folder}, to be killed at operation {kill_at}, failed; see above.")
    return int(answer)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    print("unbroken", start(root / "unbroken"), flush=True)
    for n in map(int, sys.argv[2:]):
        killed = [start(root / str(n), moment) is None for moment in (n, n // 3 + 1)]
        print(n, *killed, start(root / str(n)) is not None, flush=True)
