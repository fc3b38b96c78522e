"""The time of each part of a step: runs `discover_jax.main.run` on random weights of a published shape.

    python benchmarks/whole_step.py --shape=gpt-oss-120b [--layers=0] [--groups=16] [--group_size=8] [--prompt=3072] [--new=2048]
        [--row_tokens=0] [--rows=1] [--waves=1] [--steps=2] [--until=0] [--data=1] [--expert=1] [--competition=digits-parity] [--raw=FILE]
        [--workdir=DIR [--resume]] [--json=FILE]

The loop, the kernels and the model's sizes are real: parents, prompts, sampling, sandboxed programs and their grades, advantages,
packing, the update with routing replay and KL to the base, journal, archive, best/, rollouts/, metrics and checkpoint. These are not
real:

- The weights are random, so every rollout spends its budget of `--new` tokens.
- The tokenizer is the apprentice's, since gpt-oss's is not in the repository. A prompt has more tokens than with gpt-oss's tokenizer.
- The programs come from the apprentice's grammar, because random weights write none. The reply's tokens seed each program, so programs
  differ and score, and nearly all rollouts take part in the update. They take seconds, where gpt-oss's programs may take minutes.

Times are the run's own metrics where they exist. The first step compiles; the table of the last one is the result. The peak of device
memory never falls, so the peak after sampling is valid only in the first step. Programs need the sandbox (docs/security.md); `--unsafe`
runs them without isolation, which is faster.
"""

import argparse
import contextlib
import json
import random
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figures
import jax
from measuring import add_mesh, peak_bytes, set_mesh

from discover_jax import config as settings
from discover_jax import main as loop
from discover_jax import stages
from discover_jax.apprentice import programs
from discover_jax.machines import device_memory, take_gpu_memory
from discover_jax.models.families import SHAPES
from discover_jax.models.synthetic import shape_of
from discover_jax.policy import APPRENTICE
from discover_jax.runs.console import Improvement, PlainConsole
from discover_jax.text.chat import ChatFormat
from discover_jax.text.reply import Extracted, extracted
from discover_jax.types import Rollout


def recorded_program(rollout: Rollout, chat: ChatFormat, edits_of: str = "", entries: Sequence[str] = ("run",)) -> Extracted:
    """A program that runs, determined by the rollout's tokens. The reply is still parsed, so that parsing costs its time."""
    extracted(rollout, chat, edits_of, entries)
    return Extracted(programs.render(programs.sample(random.Random(zlib.crc32(rollout.tokens_T.tobytes())))))


class _LeftError(Exception):
    """Ends the run after `--until` steps."""


class Clock(PlainConsole):
    """Shows a run as lines, and takes the times and the peak of memory that the metrics lack, at the boundaries of phases."""

    def __init__(self, until: int):
        super().__init__()
        self._until = until
        self.started = time.monotonic()
        self.setup_s = 0.0
        self.steps: list[dict[str, Any]] = []
        self._at: dict[str, float] = {}
        self._peaks: dict[str, int | None] = {}

    def step(self, step: int, steps: int) -> None:
        if self._until and step >= self._until:
            raise _LeftError
        super().step(step, steps)
        self._at, self._peaks = {"step": time.monotonic()}, {}
        if not self.steps:
            self.setup_s = self._at["step"] - self.started

    def phase(self, name: str, detail: str = "") -> None:
        super().phase(name, detail)
        self._at[name], self._peaks[name] = time.monotonic(), peak_bytes()

    def step_done(self, row: dict[str, Any], bests: Sequence[Improvement]) -> None:
        now, prompts = time.monotonic(), self._at["sampling"] - self._at["step"]
        super().step_done(row, bests)
        whole = now - self._at["step"]
        parts = {
            "prompts": prompts,
            "sampling": row["time/sample_s"] - prompts,
            "waiting for programs": row["time/execute_s"],
            "waiting for the checkpoint": row["time/checkpoint_wait_s"],
            "update": row["time/update_s"],
            "journal, rollouts, best": row["time/save_s"],
            "checkpoint": now - self._at["saving"] - row["time/save_s"],
        }
        parts["everything else"] = whole - sum(parts.values())
        tokens = row["tokens/mean"] * row["rollouts/count"]
        self.steps.append(
            {
                "seconds": whole,
                "parts_s": parts,
                "tokens": tokens,
                "tokens_per_s": tokens / whole,
                "sampling_tokens_per_s": tokens / parts["sampling"],
                "update_tokens_per_s": row["tokens"] / parts["update"],  # only tokens in the loss; the update also reads the prompts
                "peak_bytes_after_sampling": self._peaks["running programs"],
                "peak_bytes_after_update": self._peaks["saving"],
                "metrics": row,
            }
        )


def table(step: dict[str, Any]) -> list[str]:
    """A step's parts as lines."""
    lines = [f"{name:24s} {spent:9.2f} s {spent / step['seconds']:6.1%}" for name, spent in step["parts_s"].items()]
    peaks = [step[f"peak_bytes_after_{phase}"] for phase in ("sampling", "update")]
    shown = ", ".join("unknown" if peak is None else f"{peak / 1e9:.2f} GB" for peak in peaks)
    lines.append(
        f"{'step':24s} {step['seconds']:9.2f} s, {step['tokens']:,.0f} tokens, {step['tokens_per_s']:,.0f} tokens/s; sampling"
        f" {step['sampling_tokens_per_s']:,.0f}, update {step['update_tokens_per_s']:,.0f} tokens/s"
    )
    return [*lines, f"peak memory after sampling and after the update: {shown}"]


def configured(arguments: argparse.Namespace) -> Any:
    """The config of the run, validated."""
    config = settings.default_config()
    config.name = "whole-step"
    config.model.weights, config.model.shape, config.model.dtype = "random", arguments.shape, arguments.dtype
    config.model.tokenizer = str(APPRENTICE)
    config.task.competition, config.task.raw = arguments.competition, arguments.raw
    config.groups, config.group_size, config.train.steps = arguments.groups, arguments.group_size, arguments.steps
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = arguments.prompt, arguments.new
    config.train.row_tokens, config.train.rows, config.train.waves = arguments.row_tokens, arguments.rows, arguments.waves
    config.execution.cores = arguments.cores
    set_mesh(config, arguments)
    if arguments.unsafe:
        config.execution.backend, config.execution.allow_weaker = "unsafe-subprocess", True
    return settings.validate(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="gpt-oss-120b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=3072, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=2048, help="tokens of a rollout")
    parser.add_argument("--row_tokens", type=int, default=0, help="length of a packed row of the update; 0: longest prompt + rollout")
    parser.add_argument("--rows", type=int, default=1, help="packed rows in a microbatch")
    parser.add_argument("--waves", type=int, default=1, help="waves of the update (config.train.waves)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--until", type=int, default=0, help="stop after this many steps, so that --resume can continue")
    add_mesh(parser)
    parser.add_argument("--competition", default="digits-parity", help="a competition that the apprentice's grammar can solve")
    parser.add_argument("--raw", default="", help="the competition's raw data, unless it includes them")
    parser.add_argument("--cores", type=int, default=2, help="cores of each program")
    parser.add_argument(
        "--unsafe", action="store_true", help="run the programs without isolation: they are the apprentice's, not a model's"
    )
    parser.add_argument("--workdir", type=Path, help="run directory, which must be new; default: a temporary one")
    parser.add_argument("--resume", action="store_true", help="resume the run in --workdir, also on another mesh")
    parser.add_argument("--json", type=Path)
    figures.add_record(parser)
    arguments = parser.parse_args()
    exists = arguments.workdir is not None and arguments.workdir.exists()
    if exists != arguments.resume:
        parser.error(
            f"--workdir={arguments.workdir} "
            + ("exists: name a new folder, or --resume." if exists else "does not exist, so there is no run to resume.")
        )
    take_gpu_memory()
    if arguments.layers:
        SHAPES[arguments.shape] = shape_of(arguments.shape, arguments.layers)  # where the run looks the name up
    config = configured(arguments)
    # `stages.sample_and_submit` looks this name up for each finished rollout.
    stages.extracted = recorded_program
    clock = Clock(arguments.until)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_LeftError):
        loop.run(config, arguments.workdir or Path(folder) / "run", console=clock)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "mesh": dict(config.mesh),
        "jax": jax.__version__,
        "memory_bytes": device_memory(),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "setup_s": clock.setup_s,
        "steps": clock.steps,
    }
    for step in clock.steps:
        print("\n".join(["", f"step {step['metrics']['step'] + 1}", *table(step)]))
    print(json.dumps(result), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    last = clock.steps[-1]
    values = {"seconds": (last["seconds"], "s")} | {
        f"{name.split(',')[0].replace(' ', '_')}_s": (spent, "s") for name, spent in last["parts_s"].items()
    }
    values |= {f"{phase}_tokens_per_s": (last[f"{phase}_tokens_per_s"], "tokens/s") for phase in ("sampling", "update")}
    figures.record(arguments.record, values, devices=arguments.data * arguments.expert)


if __name__ == "__main__":
    main()
