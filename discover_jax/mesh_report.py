"""The lines of `--dry_run` that compare meshes.

They come before it compiles the config's own mesh. For that mesh, the compiler reports the exact memory.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from discover_jax import costs, costs_tpu
from discover_jax.costs import MeshShape
from discover_jax.engine import microbatch_rows
from discover_jax.kernels.kernel_set import PLATFORMS
from discover_jax.machines import Machine
from discover_jax.meshes import MEASURED, Lengths, Prediction, predict, recommend
from discover_jax.models.config import ModelConfig
from discover_jax.models.sharding import MESH_AXES

SHOWN = 5
"""Usable meshes in the report, besides the config's own."""


def report(config: Any, sizes: ModelConfig, machine: Machine, lengths: Lengths, *, learn: bool = True) -> Iterator[str]:
    """Lines with the best meshes and the config's own, or the reason why there is no prediction."""
    if machine.speeds is None:
        yield f"No prediction of speed: the speeds of {machine.name} are unknown."
        return
    if (config.model.dtype, config.model.experts) != MEASURED:
        yield "No prediction of speed: it requires config.model.dtype='bfloat16' and config.model.experts='packed'."
        return
    own = predict(config, sizes, machine, MeshShape(config.mesh.data, config.mesh.expert, config.mesh.tensor), lengths, learn=learn)
    found = recommend(config, sizes, machine, lengths, learn=learn)
    usable = [one for one in found if not one.obstacle]
    devices = len(machine.devices)
    yield (
        f"Predicted speed of a step with {config.groups} x {config.group_size} rollouts of {lengths.rollout:,} tokens after prompts of"
        f" {lengths.prompt:,} (set the mean lengths with --lengths), on meshes of {devices} device{'s' * (devices > 1)}"
    )
    yield f"    {'data expert tensor   rows   live':<34}{'GB':>6}{'sampling, tokens/s':>20}{'update, tokens/s':>18}{'step, s':>9}"
    shown = usable[:SHOWN]
    shown += [] if own.mesh in (each.mesh for each in shown) else [own]
    for one in shown:
        yield _row(one, recommended=bool(usable) and one is usable[0], own=one.mesh == own.mesh)
    yield (
        "    ->: recommended; *: this config; rows: packed rows per microbatch (config.train.rows); live: rollouts decoded at the same"
        " time; GB: approximate peak of the update on a device"
        + ("; references: plain JAX instead of kernels" if any(not one.kernels and not one.obstacle for one in shown) else "")
        + (f". {len(found) - len(usable)} of {len(found)} meshes cannot be used" if len(usable) < len(found) else "")
    )
    if (given := microbatch_rows(config)) != own.rows:
        yield (
            f"The line with * is for config.train.rows = {own.rows}. This config has {given}, which the devices along `data` and `expert`"
            " cannot share evenly, so its update is slower."
        )
    if usable:
        yield f"Recommended: {_settings(usable[0])}. Time of a step: {_parts(usable[0])}"
        yield from _roofline_lines(usable[0])
    else:
        least = min(found, key=lambda one: one.bytes or math.inf)
        yield (
            f"No mesh of these devices can be used. The closest is {_settings(least)}: {least.obstacle}. Lower"
            " config.sampling.max_new_tokens or config.train.row_tokens."
        )
    yield from _remarks(machine, [own, *usable[:1]], dense=not sizes.num_experts)


def _row(one: Prediction, *, recommended: bool, own: bool) -> str:
    mark = f"{'->' if recommended else '  '}{'*' if own else ' '} "
    start = f"{mark}{one.mesh.data:4}{one.mesh.expert:7}{one.mesh.tensor:7}{one.rows:7}{one.live or '-':>7}  "
    if one.obstacle:
        return f"{start:<38}{one.bytes / 1e9:6.0f}  {one.obstacle}" if one.bytes else f"{start:<44}  {one.obstacle}"
    speeds = (tokens / sum(spent.values()) for tokens, spent in ((one.sampled, one.sampling), (one.learned, one.update)))
    sampling, update = (f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}" for speed in speeds)
    return f"{start:<38}{one.bytes / 1e9:6.0f}{sampling:>20}{update:>18}{one.seconds:>9,.0f}{'' if one.kernels else '  references'}"


def _settings(one: Prediction) -> str:
    named = zip(MESH_AXES, one.mesh, strict=True)
    return " ".join(f"--config.mesh.{axis}={size}" for axis, size in named) + f" --config.train.rows={one.rows}"


def _parts(one: Prediction) -> str:
    def line(phase: str, parts: costs.Cost) -> str:
        total = sum(parts.values())
        shares = [
            f"{part} {parts[part] / total:.0%}" for part in sorted(parts, key=lambda part: -parts[part]) if parts[part] > 0.01 * total
        ]
        return f"{phase} {total:,.0f} s ({', '.join(shares)})"

    return f"{line('sampling', one.sampling)}, {line('update', one.update)}"


def _roofline_lines(one: Prediction) -> Iterator[str]:
    """A table of the phases: predicted seconds, those of the roofline, and the resource that limits it."""
    if not one.rooflines:
        return
    predicted = {"decoding": sum(one.sampling.values()) - one.sampling["prompts"], "prompts": one.sampling["prompts"]}
    predicted["update"] = sum(one.update.values())
    yield "Roofline of its phases: what a device needs at least at the vendor's peak, in seconds. The longest is the limit"
    yield f"    {'phase':<10}{'bytes':>9}{'operations':>12}{'exchange':>10}{'predicted':>11}{'roofline / predicted':>22}  limit"
    for phase, least in one.rooflines.items():
        limit = max(least, key=lambda resource: least[resource])
        cells = f"{least['bytes']:>9,.1f}{least['operations']:>12,.1f}{least['exchange']:>10,.1f}{predicted[phase]:>11,.1f}"
        yield f"    {phase:<10}{cells}{least[limit] / predicted[phase]:>22.0%}  {limit}"


def _remarks(machine: Machine, shown: Sequence[Prediction], *, dense: bool) -> Iterator[str]:
    """Lines on what the predictions exclude or assume."""
    assert machine.speeds is not None
    yield (
        "Not included: programs and grading, checkpoints, unequal lengths of rollouts (the last ones decode with few rows), unequal load of"
        " experts."
    )
    if dense:
        yield (
            "Dense models: updates measured on H100 and H200 took 0.9 (7B) to 1.4 (1.5B) times the prediction, and decoding steps 0.94 to"
            " 1.01 times."
        )
    if machine.speeds.assumed:
        assumed = ", ".join(sorted(machine.speeds.assumed)).replace("_", " ")
        yield f"Assumed for this machine, not measured: {assumed} (discover_jax/machines.py)."
    if (without := [one for one in shown if not one.kernels]) and not dense:
        why = "with tensor above 1" if all(one.mesh.tensor > 1 for one in without) else "for experts of these sizes"
        if machine.platform not in PLATFORMS:
            why = f"on a {machine.platform.upper()}"
        yield (
            f"references: {why} there are no kernels of experts. Plain JAX then computes every expert for every row. Its speed was measured"
            " only on one GPU with few tokens, so these figures are only an order of magnitude."
        )
    if any(one.rooflines for one in shown):
        yield from costs_tpu.assumptions(machine.speeds)
    if any(one.kernels for one in shown) and len(machine.devices) > 1 and not dense and machine.platform == "gpu":
        yield (
            "Kernels: their efficiency was measured on one H200. On 2 and 4 H200s of one node, sampling and update were within 10% of the"
            " prediction (docs/scaling.md)."
        )
