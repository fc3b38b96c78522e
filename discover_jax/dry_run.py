"""Reports the memory per device and the speed of a run: `python -m discover_jax.main --config=... --dry_run`.

A dry run loads and computes nothing. First `meshes` predicts the speed on each mesh of the machine's devices by formulas. Then the run's
jitted functions are lowered on abstract arrays and compiled for the machine, and the compiler reports the memory of each.
`--machine=h200`, or a TPU slice such as `--machine=v5e:4x4`, selects a machine other than this one. If its compiler or kernels are missing
here, memory comes from `formulas`.
"""

import dataclasses
import math
import re
import types
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax

from discover_jax import config as settings
from discover_jax import formulas, mesh_report, meshes
from discover_jax.engine import build_model, build_optimizer, build_sampler, build_update, microbatch_rows, row_tokens, unused_drafts
from discover_jax.extras import install_command
from discover_jax.learning.train_state import abstract_train_state
from discover_jax.machines import Machine, find_machine
from discover_jax.models.config import REMAT, ModelConfig
from discover_jax.models.families import SHAPES
from discover_jax.models.folder import read_config
from discover_jax.models.sharding import local_bytes, make_mesh
from discover_jax.policy import weights_folder
from discover_jax.types import LoweredFunction

PARTS = ("weights", "adapter", "optimiser", "gradient", "cache", "activations")
_BAR = 60


@dataclasses.dataclass(frozen=True)
class Need:
    """The memory of one jitted function on one device.

    Attributes:
      phase: "sampling", "update" or "measuring".
      function: name of the jitted function.
      parts: bytes of each of `PARTS`. Activations are the memory that the compiler adds to the arguments.
      complaint: the compiler's error if it rejected the function for its size; activations are then the size in that error, or 0.
    """

    phase: str
    function: str
    parts: dict[str, int]
    complaint: str = ""

    @property
    def total(self) -> int:
        """Sum of all parts in bytes."""
        return sum(self.parts.values())


def needs(
    config: Any, sizes: ModelConfig, machine: Machine, *, learn: bool = True, on_compile: Callable[[str], None] = print
) -> list[Need]:
    """The memory of every jitted function of a step on one device, in the order of the step.

    Args:
      config: validated.
      sizes: the model's sizes.
      machine: the machine to compile for.
      learn: False for a search run, which has no adapter and measures instead of updating.
      on_compile: called with a line of text before each compilation, which may take a minute.

    Raises:
      ShardingError: a size is not divisible by its axis of the mesh.
    """
    return list(each_need(config, sizes, machine, learn=learn, on_compile=on_compile))


def each_need(
    config: Any,
    sizes: ModelConfig,
    machine: Machine,
    *,
    learn: bool = True,
    functions: Container[str] = (),
    on_compile: Callable[[str], None] = print,
) -> Iterator[Need]:
    """`needs`, one after another. `functions`: names of those to compile; by default all."""
    mesh = make_mesh(config.mesh.data, config.mesh.expert, config.mesh.tensor, machine.devices)
    model = build_model(config, sizes, mesh, machine.platform)
    optimizer = build_optimizer(config)
    # Stop tokens do not affect the memory.
    memory = machine.memory if machine.platform != "cpu" else None
    sampler = build_sampler(config, model, stop_ids=(0,), memory=memory, learn=learn, large_tiles=machine.large_tiles)
    update = build_update(config, model, optimizer)
    frozen = model.abstract_frozen()
    state = abstract_train_state(model.abstract_lora(), optimizer) if learn else None
    lora = state.lora if state is not None else None
    resident = {
        "weights": local_bytes(frozen),
        "adapter": local_bytes(lora),
        "optimiser": local_bytes(state.opt_state) if state is not None else 0,
    }
    rows, length = microbatch_rows(config), row_tokens(config)

    def lowered() -> Iterator[tuple[str, LoweredFunction]]:
        for function in sampler.lowered_functions(frozen, lora, config.groups, config.groups * config.group_size):
            yield "sampling", function
        if state is not None:
            for function in update.lowered_functions(frozen, state, rows, length):
                yield "update", function
        else:
            for function in update.lowered_measuring_functions(frozen, lora, rows, length):
                yield "measuring", function

    for phase, function in lowered():
        if functions and function.name not in functions:
            continue
        on_compile(f"compiling {phase}: {function.name}")
        live = {name: local_bytes(arrays) for name, arrays in function.live.items()}
        activations, complaint = _compile(function, machine)
        parts = dict.fromkeys(PARTS, 0) | resident | live | {"activations": activations}
        yield Need(phase, function.name, parts, complaint)


def remat_totals(
    config: Any, sizes: ModelConfig, machine: Machine, found: Sequence[Need], *, on_compile: Callable[[str], None] = print
) -> dict[str, int | None]:
    """Bytes on one device while the gradient runs, for each value of `config.model.remat`; None if the compiler rejects the function.

    Args:
      config, sizes, machine, on_compile: as for `needs`.
      found: result of `needs`. Its functions are not compiled again.
    """
    totals: dict[str, int | None] = {}
    mesh = make_mesh(config.mesh.data, config.mesh.expert, config.mesh.tensor, machine.devices)
    optimizer = build_optimizer(config)
    for remat in REMAT:
        if remat == config.model.remat:
            (need,) = (need for need in found if need.function == "gradient")
            totals[remat] = None if need.complaint else need.total
            continue
        on_compile(f"compiling update: gradient with config.model.remat={remat!r}")
        model = dataclasses.replace(build_model(config, sizes, mesh, machine.platform), remat=remat)
        state, frozen = abstract_train_state(model.abstract_lora(), optimizer), model.abstract_frozen()
        update = build_update(config, model, optimizer)
        functions = update.lowered_functions(frozen, state, microbatch_rows(config), row_tokens(config))
        function = next(function for function in functions if function.name == "gradient")
        activations, complaint = _compile(function, machine)
        totals[remat] = None if complaint else activations + local_bytes((frozen, state, function.live))
    return totals


def _compile(function: LoweredFunction, machine: Machine) -> tuple[int, str]:
    """Bytes in addition to the arguments, and the compiler's error if it rejected the function for its size."""
    try:
        compiled = function.lowered.compile(compiler_options=machine.options or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        complaint = str(error).split("\n")[0]
        named = re.search(r"required[^()]*\(([\d.]+)([KMGT])\)|[Uu]sed ([\d.]+)([KMGT])", complaint)
        if named is None:
            return 0, complaint
        number, unit = (named[1], named[2]) if named[1] else (named[3], named[4])
        return int(float(number) * 1024 ** ("KMGT".index(unit) + 1)), complaint
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes, ""


def run(config: Any, machine_name: str, lengths: str = "", *, learn: bool = True) -> bool:
    """Prints the resolved config, the predictions, the memory table and the conclusion. Returns whether everything fits.

    Args:
      config: validated.
      machine_name: see `machines.find_machine`.
      lengths: see `meshes.lengths_of`.
      learn: False for a search run.

    Without the compiler or the kernels of another machine, memory comes from `formulas`. Where they do not apply, there is no verdict, and
    the result is True.

    Raises:
      DiscoverError: the config, the weights' config.json, the machine's name or the lengths are invalid.
    """
    expected = meshes.lengths_of(lengths, config)
    folder = weights_folder(config)
    sizes = SHAPES[config.model.shape] if folder is None else read_config(folder)
    mesh = (config.mesh.data, config.mesh.expert, config.mesh.tensor)
    machine = find_machine(machine_name, math.prod(mesh))
    print("\n".join(["config (* differs from the default)", *_config_lines(config), ""]))

    def show(line: str) -> None:
        print(line, flush=True)

    show("\n".join([*mesh_report.report(config, sizes, machine, expected, learn=learn), ""]))
    if warning := unused_drafts(config):
        show(f"{warning}\n")
    missing = formulas.what_is_missing(machine) if machine_name else ""
    if not missing:
        found = needs(config, sizes, machine, learn=learn, on_compile=show)
        totals = remat_totals(config, sizes, machine, found, on_compile=show) if learn else {}
    elif why := formulas.why_not(config, sizes, machine):
        show("\n".join(_no_verdict(machine, missing, why)))
        return True
    else:
        parts = formulas.parts(config, sizes, machine, learn=learn)
        found = [Need(*function, dict.fromkeys(PARTS, 0) | its) for function, its in parts.items()]
        totals = formulas.remat_totals(config, sizes, machine, REMAT) if learn else {}
    print("\n".join(["", *report(config, sizes, machine, found, totals, missing)]))
    return all(fits(need, machine) for need in found)


def _config_lines(config: Any) -> list[str]:
    rows = settings.settings()
    return [
        f"  {'*' if value != rows[name].default else ' '} {name} = {value!r}{' ' + rows[name].unit if rows[name].unit else ''}"
        for name, value in settings.flatten(config).items()
    ]


def fits(need: Need, machine: Machine) -> bool:
    """Whether a function fits into the memory of a device."""
    return not need.complaint and need.total <= machine.memory


_REMAT_COSTS = {"none": "no recomputation", "layers": "about a quarter more arithmetic", "pairs": "about a third more arithmetic"}


def _remat_lines(config: Any, machine: Machine, totals: Mapping[str, int | None]) -> Iterator[str]:
    """Memory of each rematerialisation policy; * marks the config's."""
    if totals:
        yield "Memory of the gradient by config.model.remat:"
        for remat, total in totals.items():
            needed = "more than the compiler accepts" if total is None else f"{_gb(total)} GB ({total / machine.memory:.0%})"
            yield f"  {'*' if remat == config.model.remat else ' '} {remat:<8}{needed:<34}{_REMAT_COSTS[remat]}"
        yield ""


def report(
    config: Any,
    sizes: ModelConfig,
    machine: Machine,
    found: list[Need],
    totals: Mapping[str, int | None] = types.MappingProxyType({}),
    missing: str = "",
) -> list[str]:
    """Lines of the table, the bars and the conclusion.

    Args:
      totals: from `remat_totals`; with them, also lines of the rematerialisation policies.
      missing: why the figures come from formulas; empty if they come from the machine's compiler.
    """
    mesh = f"data {config.mesh.data} x expert {config.mesh.expert} x tensor {config.mesh.tensor}"
    lines = [
        f"model    {sizes.describe()}",
        f"machine  {machine.name}; mesh {mesh}",
        f"memory   {_gb(machine.memory)} GB per device ({machine.note})",
        "figures  " + (_estimate(config, sizes, machine, missing) if missing else "from the machine's own compiler"),
        "",
        f"GB (10^9 bytes) on one device while a function runs; {_LETTERS_LEGEND}",
    ]
    width = max(10, *(len(need.function) + 2 for need in found))
    lines.append(f"{'phase':<10}{'function':<{width}}" + "".join(f"{part:>12}" for part in PARTS) + f"{'total':>10}")
    phases = list(dict.fromkeys(need.phase for need in found))
    peaks = {phase: max((n for n in found if n.phase == phase), key=lambda n: (bool(n.complaint), n.total)) for phase in phases}
    for need in found:
        parts = "".join(f"{_gb(need.parts[part]) if need.parts[part] else '-':>12}" for part in PARTS)
        mark = " <- peak" if need is peaks[need.phase] else ""
        lines.append(f"{need.phase:<10}{need.function:<{width}}{parts}{_gb(need.total):>10}{mark}")
    lines.append("")
    for phase, need in peaks.items():
        lines.append(
            f"{phase:<10}|{_bar(need, machine)}| {_gb(need.total)} of {_gb(machine.memory)} GB ({need.total / machine.memory:.0%})"
        )
    lines += ["", *_remat_lines(config, machine, totals)]
    for need in peaks.values():
        if need.complaint:
            lines.append(f"The compiler rejected {need.phase}, {need.function}: {need.complaint}")
    if all(fits(need, machine) for need in found):
        spare = min(machine.memory - need.total for need in found)
        by = " by the formulas" if missing else ""
        lines.append(f"It fits{by}, with {_gb(spare)} GB to spare on each device.")
    else:
        lines += [line for phase, need in peaks.items() if not fits(need, machine) for line in _advice(config, sizes, machine, need)]
    return lines


_LETTERS = dict(zip(PARTS, "waogc#", strict=True))
_LETTERS_LEGEND = ", ".join(f"{letter} {part}" for part, letter in _LETTERS.items())


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _bar(need: Need, machine: Machine) -> str:
    """A bar of the parts, scaled to the device's memory. Parts that do not fit extend past its end."""
    bar, end = "", 0.0
    for part in PARTS:
        end += need.parts[part] / machine.memory * _BAR
        bar += _LETTERS[part] * (round(min(end, 2 * _BAR)) - len(bar))
    return bar[:_BAR].ljust(_BAR, ".") if len(bar) <= _BAR else bar[:_BAR] + "|" + bar[_BAR:] + ("..." if end > 2 * _BAR else "")


def _estimate(config: Any, sizes: ModelConfig, machine: Machine, missing: str) -> str:
    return f"estimates by formulas, since {missing}: {formulas.accuracy(config, sizes, machine)}. {_for_exact_figures(machine)}"


def _for_exact_figures(machine: Machine) -> str:
    extra = "cuda" if machine.platform == "gpu" else "tpu"
    return f"For exact figures: {install_command(extra)}. It works without a {machine.platform.upper()}"


def _no_verdict(machine: Machine, missing: str, why: str) -> Iterator[str]:
    yield f"No prediction of memory for {machine.name}: {missing}, and {why}."
    yield f"{_for_exact_figures(machine)}. Whether the run fits is unknown."


def _advice(config: Any, sizes: ModelConfig, machine: Machine, need: Need) -> Iterator[str]:
    """Lines with the settings to change so that a phase fits, largest part first."""
    over = f": it exceeds the memory by {_gb(need.total - machine.memory)} GB" if need.total > machine.memory else ""
    yield f"The phase {need.phase} does not fit{over}. Largest parts, and the settings to change:"
    slots = min(config.sampling.slots, config.groups * config.group_size)
    length = row_tokens(config)
    prompt, new = config.sampling.max_prompt_tokens, config.sampling.max_new_tokens
    ranks = ", ".join(f"{name} = {config.lora[name]}" for name in ("expert_rank", "mlp_rank", "attention_rank", "head_rank"))
    remat = "" if config.model.remat == "pairs" else "; config.model.remat='pairs' stores less"
    activations = {
        "prefill": f"config.sampling.max_prompt_tokens = {prompt:,}",
        "gradient": f"config.train.rows = {microbatch_rows(config)}, with rows of {length:,} tokens (longest prompt and rollout){remat}",
    }
    knobs = {
        "weights": "; ".join(
            ["config.model.experts='packed'"] * (config.model.experts != "packed")
            + ["config.model.dtype='bfloat16'"] * (config.model.dtype != "bfloat16")
            + [f"config.mesh.expert = {config.mesh.expert}: with more devices, each stores fewer experts"]
        ),
        **dict.fromkeys(
            ("adapter", "optimiser", "gradient"), f"config.lora: {ranks}; expert_rank counts most, or mlp_rank in a dense model"
        ),
        "cache": f"config.sampling.slots = {slots}, with {_gb(need.parts['cache'] / slots)} GB each; or fewer tokens:"
        f" max_prompt_tokens = {prompt:,}, max_new_tokens = {new:,}, cache_tokens = {config.sampling.cache_tokens:,}",
        "activations": activations.get(
            need.function, activations["gradient"] if need.phase != "sampling" else f"config.sampling.slots = {slots}"
        ),
    }
    for part in sorted(PARTS, key=lambda part: -need.parts[part]):
        if need.parts[part] > 0.1 * need.total:
            yield f"  {part:<12}{_gb(need.parts[part]):>8} GB  {knobs[part]}"
