"""Compares the predictions of `discover_jax.costs` with measurements.csv, and prints those for TPUs, which nothing has measured.

    python benchmarks/predictions.py    # every measurement, and the memory by tpu_memory.py; docs/scaling.md shows the summary

This runs no model. The constants in costs.py were fitted to the `fitted` measurements, so those agree by construction. No constant was
fitted to the `held out` measurements.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from discover_jax import costs, meshes
from discover_jax.config import default_config
from discover_jax.costs import MeshShape
from discover_jax.machines import Speeds, machine_of_slice, speeds_of
from discover_jax.meshes import Lengths
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.families.gpt_oss import GPT_OSS_20B, GPT_OSS_120B

sys.path.insert(0, str(Path(__file__).parent))  # for a test that loads this file by its path
import figures
import tpu_memory

FITTED, PARTLY, HELD_OUT = "fitted", "its prompts fitted", "held out"
LORA = LoraConfig()
ADAPTER = {1: 2.25e9, 2: 1.13e9, 4: 0.57e9}
"""Bytes of the 120b's adapter on a device, by size of the axis `expert`."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A speed in tokens/s.

    Attributes:
      what: the measurement.
      predicted, measured: the speeds.
      use: `FITTED`, `PARTLY` or `HELD_OUT`.
      devices: number of GPUs.
      kernels: false for plain-JAX references.
    """

    what: str
    predicted: float
    measured: float
    use: str
    devices: int = 1
    kernels: bool = True

    @property
    def error(self) -> float:
        """Error of the prediction, relative to the measurement."""
        return self.predicted / self.measured - 1

    @property
    def group(self) -> str:
        """The line of the summary."""
        if not self.kernels:
            return "without kernels"
        activity = "sampling" if self.what.startswith(("decoding", "sampling")) else "update"
        return f"{activity}, {'one GPU' if self.devices == 1 else 'several GPUs'}"


def _speeds(name: str) -> Speeds:
    found = speeds_of(name)
    assert found is not None
    return found


def _decode(
    what: str,
    measured: float,
    use: str,
    rows: int,
    context: float,
    device: str = "h200",
    *,
    of: ModelConfig = GPT_OSS_120B,
    mesh: MeshShape = costs.ONE,
) -> Row:
    step = costs.decode_step(of, LORA, _speeds(device), rows, context, mesh)
    return Row(f"decoding, {what}", rows / sum(step.values()), measured, use, mesh.size)


def _sampling(what: str, measured: float, use: str, prompts: int, prompt: int, rows: int, new: float) -> Row:
    """A call of the sampler in which all rows start and end together."""
    speeds = _speeds("h200")
    step = costs.decode_step(GPT_OSS_120B, LORA, speeds, rows, prompt + new / 2)
    seconds = new * sum(step.values()) + prompts * costs.prefill(GPT_OSS_120B, LORA, speeds, prompt)
    return Row(f"sampling, {what}", rows * new / seconds, measured, use)


def _reference_sampling(what: str, measured: float, use: str, of: ModelConfig, prompts: int, prompt: int, rows: int, new: int) -> Row:
    speeds = _speeds("h200")
    step = costs.decode_step(of, LORA, speeds, rows, prompt + new / 2, kernels=False)
    seconds = new * sum(step.values()) + prompts * costs.prefill(of, LORA, speeds, prompt, kernels=False)
    return Row(f"references: sampling, {what}", rows * new / seconds, measured, use, kernels=False)


def _gradient(
    what: str,
    measured: float,
    use: str,
    tokens: int,
    rollout: int,
    *,
    of: ModelConfig = GPT_OSS_120B,
    lora: LoraConfig = LORA,
    mesh: MeshShape = costs.ONE,
) -> Row:
    cost = costs.microbatch(of, lora, _speeds("h200"), tokens, rollout, mesh, gradient=True, adapter=ADAPTER[mesh.expert])
    return Row(f"gradient, {what}", mesh.size * tokens / sum(cost.values()), measured, use, mesh.size)


def _update(
    what: str,
    measured: float,
    use: str,
    tokens: float,
    rollout: int,
    *,
    of: ModelConfig = GPT_OSS_120B,
    mesh: MeshShape = costs.ONE,
    kernels: bool = True,
    microbatches: int = 1,
    filled: float = 1.0,
) -> Row:
    """A whole update, with the KL and the optimiser; `tokens` is the size of a microbatch per device."""
    speeds, adapter = _speeds("h200"), ADAPTER[mesh.expert]
    options = {"kernels": kernels, "adapter": adapter}
    passes = [costs.microbatch(of, LORA, speeds, tokens, rollout, mesh, gradient=gradient, **options) for gradient in (False, True)]
    seconds = microbatches * sum(sum(one.values()) for one in passes) + costs.apply(speeds, adapter)
    speed = microbatches * filled * mesh.size * tokens / seconds
    return Row(f"{'' if kernels else 'references: '}update, {what}", speed, measured, use, mesh.size, kernels)


def rows() -> Iterator[Row]:
    """All rows, in the order of the table."""
    measured = {id: float(figure.value) for id, figure in figures.read().items()}
    two, four, by_data = MeshShape(1, 2), MeshShape(1, 4), MeshShape(2, 1)

    def decode(what: str, id: str, *arguments: Any, **options: Any) -> Row:
        return _decode(what, measured[f"decode_{id}_tokens_per_s"], *arguments, **options)

    def gradient(what: str, id: str, *arguments: Any, **options: Any) -> Row:
        return _gradient(what, measured[f"{id}_tokens_per_s"], *arguments, **options)

    def update(what: str, id: str, *arguments: Any, **options: Any) -> Row:
        return _update(what, measured[f"{id}_tokens_per_s"], *arguments, **options)

    yield decode("120b, 1 row, context 208", "120b_b1_ctx208", FITTED, 1, 208)
    yield decode("120b, 128 rows, context 208", "120b_b128_ctx208", FITTED, 128, 208)
    yield decode("120b, 128 rows, context 4,096", "120b_b128_ctx4096", HELD_OUT, 128, 4096)
    yield decode("120b, 128 rows, context 8,192", "120b_b128_ctx8192", HELD_OUT, 128, 8192)
    yield decode("20b, 128 rows, context 640", "20b_b128_ctx640", HELD_OUT, 128, 640, of=GPT_OSS_20B)
    yield decode("120b on an H100, 1 row, context 208", "120b_h100_b1_ctx208", HELD_OUT, 1, 208, "h100")
    yield decode("120b on an H100, 128 rows, context 208", "120b_h100_b128_ctx208", HELD_OUT, 128, 208, "h100")
    whole = measured["sampling_120b_128x8192_tokens_per_s"]
    yield _sampling("120b, 128 x (1,024 in, 8,192 out), prompts included", whole, PARTLY, 128, 1024, 128, 8192)
    whole = measured["whole_step_120b_sampling_tokens_per_s"]
    yield _sampling("120b, in a whole step: 16 prompts of 2,700, 128 x 2,034", whole, HELD_OUT, 16, 2700, 128, 2034)
    yield gradient("120b, 4 x 8,192 tokens", "gradient_120b_4x8192", FITTED, 32_768, 8192)
    yield update("120b, 4 x 8,192 tokens", "update_120b_4x8192", HELD_OUT, 32_768, 8192)
    yield gradient("120b, 1 x 26,000 tokens", "gradient_120b_1x26000", HELD_OUT, 26_000, 26_000)
    attention = LoraConfig(expert_rank=0, head_rank=0)
    options: dict[str, Any] = {"of": GPT_OSS_20B, "lora": attention}
    yield gradient("20b, 2 x 4,096 tokens, adapter on attention", "gradient_20b_2x4096", HELD_OUT, 8192, 4096, **options)
    options = {"microbatches": 22, "filled": 0.92}
    yield update("120b, in a whole step: 22 rows, 92% filled", "whole_step_120b_update", HELD_OUT, 32_768, 4750, **options)
    for name, mesh in (("expert", two), ("data", by_data)):
        yield gradient(f"120b, {_axes(mesh)}", f"gradient_120b_{name}2", HELD_OUT, 32_768, 8192, mesh=mesh)
        yield update(f"120b, {_axes(mesh)}", f"update_120b_{name}2", HELD_OUT, 32_768, 8192, mesh=mesh)
    references = {of: measured[f"references_{of}_tokens_per_s"] for of in ("120b_sampling", "20b_sampling")}
    yield _reference_sampling("120b, 4 rows", references["120b_sampling"], FITTED, GPT_OSS_120B, 1, 200, 4, 16)
    yield _reference_sampling("20b, 8 rows", references["20b_sampling"], HELD_OUT, GPT_OSS_20B, 2, 500, 8, 64)
    options = {"kernels": False, "microbatches": 4}
    yield update("120b, rows of 216 tokens", "references_120b_update", FITTED, 216, 216, **options)
    options = {"kernels": False, "microbatches": 8, "of": GPT_OSS_20B}
    yield update("20b, rows of 564 tokens", "references_20b_update", FITTED, 564, 564, **options)
    yield decode("120b, `expert` = 2, 128 rows, context 208", "120b_expert2_b128_ctx208", HELD_OUT, 128, 208, mesh=two)
    for mesh in (two, by_data, four, MeshShape(2, 2)):
        for count in (128, 512):
            speed = measured.get(f"scaling_120b_{mesh.data}x{mesh.expert}_decode_b{count}_tokens_per_s")
            if speed is not None:  # with `data` = 2, 512 rows of this context do not fit on two GPUs
                yield _decode(f"120b, {_axes(mesh)}, {count} rows, context 8,112", speed, HELD_OUT, count, 8112, mesh=mesh)
    for mesh in (four, MeshShape(2, 2)):
        id = f"scaling_120b_{mesh.data}x{mesh.expert}"
        yield gradient(f"120b, {_axes(mesh)}", f"{id}_gradient", HELD_OUT, 32_768, 8192, mesh=mesh)
        yield update(f"120b, {_axes(mesh)}", f"{id}_update", HELD_OUT, 32_768, 8192, mesh=mesh)


def _axes(mesh: MeshShape) -> str:
    return ", ".join(f"`{name}` = {size}" for name, size in mesh._asdict().items() if size > 1)


def comparison() -> str:
    """A table with a line for each measurement."""
    lines = ["| tokens/s | predicted | measured | difference | |", "|---|---|---|---|---|"]
    for row in rows():
        predicted, measured = (f"{x:,.0f}" if x >= 100 else f"{x:.1f}" for x in (row.predicted, row.measured))
        lines.append(f"| {row.what} | {predicted} | {measured} | {row.error:+.1%} | {row.use} |")
    return "\n".join(lines)


def summary() -> str:
    """The table of docs/scaling.md: a line for each group of measurements, with the range of the errors."""
    groups: dict[str, list[Row]] = {}
    for row in rows():
        groups.setdefault(row.group, []).append(row)
    lines = ["| speed | held out: measurements | prediction error | fitted: measurements | prediction error |", "|---|---|---|---|---|"]
    for name, members in sorted(groups.items()):
        held_out = sorted(row.error for row in members if row.use == HELD_OUT)
        fitted = sorted(row.error for row in members if row.use != HELD_OUT)
        cells = [f"{len(errors)} | {_interval(errors)}" for errors in (held_out, fitted)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(errors: list[float]) -> str:
    return " to ".join(f"{error:+.1%}" for error in dict.fromkeys((*errors[:1], *errors[-1:])))


TPUS = ("v5p-16", "v6e-16", "v6e-64", "tpu7x-8", "v5p-128")
"""Slices in docs/scaling.md."""
RUN3_LENGTHS = Lengths(1_500, 8_000)


def tpus() -> str:
    """The table of docs/scaling.md: run 3 on the recommended mesh of each slice, and the roofline's share of the predicted time."""
    lines = ["| `--machine` | data x expert | sampling, tokens/s | roofline; limit | update, tokens/s | roofline; limit | a step, s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in TPUS:
        one = _run3_on(name)
        predicted = {"decoding": sum(one.sampling.values()) - one.sampling["prompts"], "update": sum(one.update.values())}
        limits = {phase: max(least.items(), key=lambda item: item[1]) for phase, least in one.rooflines.items()}
        shares = [f"{limits[phase][1] / predicted[phase]:.0%}; {limits[phase][0]}" for phase in ("decoding", "update")]
        speeds = [one.sampled / sum(one.sampling.values()), one.learned / sum(one.update.values())]
        cells = [f"{float(f'{speed:.3g}'):,.0f} | {share}" for speed, share in zip(speeds, shares, strict=True)]
        lines.append(f"| `{name}` | {one.mesh.data} x {one.mesh.expert} | {' | '.join(cells)} | {one.seconds:.0f} |")
    return "\n".join(lines)


def _run3_on(name: str) -> meshes.Prediction:
    """The fastest mesh for the report's run 3 with the 120b, by formulas only: no compiler is asked."""
    config = default_config()
    config.groups, config.group_size = 16, 8
    config.sampling.max_new_tokens, config.lora.attention_rank = 26_000, 32
    config.model.remat = "pairs" if name.startswith("v6e") else "layers"
    return meshes.recommend(config, GPT_OSS_120B, machine_of_slice(name), RUN3_LENGTHS)[0]


TABLES = {"predictions": summary, "predictions_tpu": tpus, "tpu_memory": tpu_memory.table}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    print(comparison())
    print(f"\nMemory on TPUs, GB\n\n{tpu_memory.table()}")


if __name__ == "__main__":
    main()
