"""Compiles the whole jitted sampler and update for TPU slices, without a TPU, and compares the compiler's memory with the formulas.

    python benchmarks/tpu_memory.py                                   # the table of docs/scaling.md, from measurements.csv
    python benchmarks/tpu_memory.py --compile=v6e:4x4,gpt-oss-120b    # compile one case (minutes) and record it; needs the extra `tpu`
    python benchmarks/tpu_memory.py --compile=v6e:4x4,gpt-oss-120b --functions=decode,gradient

The run is the report's third (configs/spaceship.py:run3): rows of 34,192 tokens, 128 rollouts. The 1.5B has that run's lengths, too.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from absl import logging

from discover_jax import dry_run, formulas
from discover_jax.config import default_config
from discover_jax.machines import Machine, find_machine, memory_of
from discover_jax.models.families import SHAPES

sys.path.insert(0, str(Path(__file__).parent))  # for a test that loads this file by its path
import figures

SHOWN = ("decode", "gradient")
"""The functions in the table: those that need most memory in the sampler and in the update."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a slice, with a mesh and a rematerialisation policy."""

    slice: str
    shape: str
    data: int
    expert: int
    remat: str = "layers"

    @property
    def id(self) -> str:
        words = "_".join((self.slice, self.shape))
        return "tpu_memory_" + "".join(letter if letter.isalnum() else "_" for letter in words)

    def config(self) -> Any:
        """Run 3's config. Each device has one row of the update."""
        config = default_config()
        config.model.weights, config.model.shape, config.model.remat = "random", self.shape, self.remat
        config.mesh.data, config.mesh.expert, config.train.rows = self.data, self.expert, self.data * self.expert
        config.groups, config.group_size, config.lora.attention_rank, config.sampling.max_new_tokens = 16, 8, 32, 26_000
        return config

    def formulas(self) -> dict[str, float]:
        """GB on a device by the formulas, by function; empty where they do not apply."""
        config, sizes = self.config(), SHAPES[self.shape]
        machine = Machine(self.slice, (), memory_of(self.slice), "", "tpu", exact=False)
        if formulas.why_not(config, sizes, machine):
            return {}
        parts = formulas.parts(config, sizes, machine, learn=True)
        return {function: sum(its.values()) / 1e9 for (_, function), its in parts.items()}


CASES = (
    Case("v5p:2x2x1", "gpt-oss-20b", 1, 4),
    Case("v5p:2x2x1", "gpt-oss-120b", 1, 4),
    Case("v5p:2x2x1", "qwen2.5-coder-1.5b", 4, 1),
    Case("v5p:2x2x2", "gpt-oss-20b", 1, 8),
    Case("v5p:2x2x2", "gpt-oss-120b", 1, 8),
    Case("v5p:2x2x2", "qwen2.5-coder-1.5b", 8, 1),
    Case("v6e:4x4", "gpt-oss-20b", 1, 16, "pairs"),
    Case("v6e:4x4", "gpt-oss-120b", 1, 16, "pairs"),
    Case("v6e:4x4", "qwen2.5-coder-1.5b", 16, 1),
    Case("tpu7x:2x2x1", "gpt-oss-20b", 1, 8),
    Case("tpu7x:2x2x1", "gpt-oss-120b", 1, 8),
    Case("tpu7x:2x2x1", "qwen2.5-coder-1.5b", 8, 1),
)


def compile_case(case: Case, functions: tuple[str, ...]) -> None:
    """Compiles a case's functions and records the memory of each."""
    machine, start = find_machine(case.slice, case.data * case.expert), time.perf_counter()

    def show(line: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {line}", flush=True)

    for need in dry_run.each_need(case.config(), SHAPES[case.shape], machine, functions=functions, on_compile=show):
        show(f"{need.function}: {need.total / 1e9:.2f} of {machine.memory / 1e9:.2f} GB {need.complaint or need.parts}")
        name = f"{case.id}_{need.function.replace(' ', '_')}{'_rejected' if need.complaint else ''}"
        figures.append(name, need.total / 1e9, "GB")


def table() -> str:
    """The table of docs/scaling.md: GB on a device by the compiler and by the formulas."""
    measured = {id: float(figure.value) for id, figure in figures.read().items() if id.startswith("tpu_memory_")}
    lines = [
        "| slice, GB of a device | model | data x expert | remat | decoding: compiler, formula | update: compiler, formula |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        formula = case.formulas()
        cells = [_cell(case, function, measured, formula.get(function)) for function in SHOWN]
        start = f"`{case.slice}`, {memory_of(case.slice) / 1e9:.0f} | {case.shape} | {case.data} x {case.expert} | {case.remat}"
        lines.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(case: Case, function: str, measured: dict[str, float], formula: float | None) -> str:
    compiled, rejected = (measured.get(f"{case.id}_{function}{end}") for end in ("", "_rejected"))
    if rejected is not None:
        by_compiler = f"rejected ({rejected:.1f})" if rejected else "rejected"
    else:
        by_compiler = "not compiled" if compiled is None else f"{compiled:.1f}"
    return f"{by_compiler}, {'none' if formula is None else f'{formula:.1f}'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--compile", metavar="SLICE,MODEL", help="compile a case of the table and record it")
    parser.add_argument("--functions", default=",".join(SHOWN), help="functions to compile; empty for all of a step")
    arguments = parser.parse_args()
    if not arguments.compile:
        print(table())
        return
    cases = {f"{case.slice},{case.shape}": case for case in CASES}
    if arguments.compile not in cases:
        parser.error(f"--compile must be one of {', '.join(cases)}; got {arguments.compile}")
    logging.set_verbosity(logging.INFO)  # which kernels are used
    compile_case(cases[arguments.compile], tuple(filter(None, arguments.functions.split(","))))


if __name__ == "__main__":
    main()
