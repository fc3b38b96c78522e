"""What `discover_jax.costs` predicts beside what was measured (docs/performance.md, docs/scaling.md), as the table of docs/scaling.md.

    python benchmarks/predictions.py

Nothing is run. `fitted` are the measurements that the constants of costs.py come from, so they agree by construction; the others no
constant has seen.
"""

import dataclasses
from collections.abc import Iterator

from discover_jax import costs
from discover_jax.costs import MeshShape
from discover_jax.machines import Speeds, speeds_of
from discover_jax.models.config import GPT_OSS_20B, GPT_OSS_120B, LoraConfig, ModelConfig

FITTED, PARTLY, HELD_OUT = "fitted", "its prompts fitted", "held out"
LORA = LoraConfig()
ADAPTER = {1: 2.25e9, 2: 1.13e9, 4: 0.57e9}
"""Bytes of the 120b's adapter on a device, by the size of the axis `expert`."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A speed in tokens/s."""

    what: str
    predicted: float
    measured: float
    use: str

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1


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
    return Row(f"decoding, {what}", rows / sum(step.values()), measured, use)


def _sampling(what: str, measured: float, use: str, prompts: int, prompt: int, rows: int, new: float) -> Row:
    """A call of the sampler in which all rows begin and end together."""
    speeds = _speeds("h200")
    step = costs.decode_step(GPT_OSS_120B, LORA, speeds, rows, prompt + new / 2)
    seconds = new * sum(step.values()) + prompts * costs.prefill(GPT_OSS_120B, LORA, speeds, prompt)
    return Row(f"sampling, {what}", rows * new / seconds, measured, use)


def _reference_sampling(what: str, measured: float, use: str, of: ModelConfig, prompts: int, prompt: int, rows: int, new: int) -> Row:
    speeds = _speeds("h200")
    step = costs.decode_step(of, LORA, speeds, rows, prompt + new / 2, kernels=False)
    seconds = new * sum(step.values()) + prompts * costs.prefill(of, LORA, speeds, prompt, kernels=False)
    return Row(f"references: sampling, {what}", rows * new / seconds, measured, use)


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
    return Row(f"gradient, {what}", mesh.size * tokens / sum(cost.values()), measured, use)


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
    """A whole update, with the KL and the optimiser, of microbatches of so many tokens on each device."""
    speeds, adapter = _speeds("h200"), ADAPTER[mesh.expert]
    options = {"kernels": kernels, "adapter": adapter}
    passes = [costs.microbatch(of, LORA, speeds, tokens, rollout, mesh, gradient=gradient, **options) for gradient in (False, True)]
    seconds = microbatches * sum(sum(one.values()) for one in passes) + costs.apply(speeds, adapter)
    return Row(f"{'' if kernels else 'references: '}update, {what}", microbatches * filled * mesh.size * tokens / seconds, measured, use)


def rows() -> Iterator[Row]:
    """All of them, in the order of the table."""
    two, four, by_data = MeshShape(1, 2), MeshShape(1, 4), MeshShape(2, 1)
    yield _decode("120b, 1 row, context 208", 250, FITTED, 1, 208)
    yield _decode("120b, 128 rows, context 208", 5782, FITTED, 128, 208)
    yield _decode("120b, 128 rows, context 4,096", 4853, HELD_OUT, 128, 4096)
    yield _decode("120b, 128 rows, context 8,192", 4191, HELD_OUT, 128, 8192)
    yield _decode("20b, 128 rows, context 640", 13744, HELD_OUT, 128, 640, of=GPT_OSS_20B)
    yield _decode("120b on an H100, 1 row, context 208", 225, HELD_OUT, 1, 208, "h100")
    yield _decode("120b on an H100, 128 rows, context 208", 4762, HELD_OUT, 128, 208, "h100")
    yield _sampling("120b, 128 x (1,024 in, 8,192 out), prompts included", 4444, PARTLY, 128, 1024, 128, 8192)
    yield _sampling("120b, in a whole step: 16 prompts of 2,700, 128 x 2,034", 4827, HELD_OUT, 16, 2700, 128, 2034)
    yield _gradient("120b, 4 x 8,192 tokens", 11_260, FITTED, 32_768, 8192)
    yield _update("120b, 4 x 8,192 tokens", 8490, HELD_OUT, 32_768, 8192)
    yield _gradient("120b, 1 x 26,000 tokens", 8479, HELD_OUT, 26_000, 26_000)
    attention = LoraConfig(expert_rank=0, head_rank=0)
    yield _gradient("20b, 2 x 4,096 tokens, adapter on attention", 18_199, HELD_OUT, 8192, 4096, of=GPT_OSS_20B, lora=attention)
    yield _update("120b, in a whole step: 22 rows, 92% filled", 7400, HELD_OUT, 32_768, 4750, microbatches=22, filled=0.92)
    yield _gradient("120b, `expert` = 2", 21_582, HELD_OUT, 32_768, 8192, mesh=two)
    yield _update("120b, `expert` = 2", 16_389, HELD_OUT, 32_768, 8192, mesh=two)
    yield _gradient("120b, `data` = 2", 22_461, HELD_OUT, 32_768, 8192, mesh=by_data)
    yield _update("120b, `data` = 2", 16_989, HELD_OUT, 32_768, 8192, mesh=by_data)
    yield _reference_sampling("120b, 4 rows", 4.9, FITTED, GPT_OSS_120B, 1, 200, 4, 16)
    yield _reference_sampling("20b, 8 rows", 58, HELD_OUT, GPT_OSS_20B, 2, 500, 8, 64)
    yield _update("120b, rows of 216 tokens", 77, FITTED, 216, 216, kernels=False, microbatches=4)
    yield _update("20b, rows of 564 tokens", 499, FITTED, 564, 564, of=GPT_OSS_20B, kernels=False, microbatches=8)
    yield _decode("120b, `expert` = 2, 128 rows, context 208", 8655, HELD_OUT, 128, 208, mesh=two)
    # One machine with four H200s, one session (benchmarks/scaling.py); one of them decoded 4,383 tokens/s.
    for mesh, of_128, of_512 in ((two, 6682, 12_328), (by_data, 5356, 0), (four, 9899, 19_489), (MeshShape(2, 2), 8336, 18_598)):
        for count, measured in ((128, of_128), (512, of_512)):
            if measured:  # with `data` = 2, 512 rows of this context do not fit on two
                yield _decode(f"120b, {_axes(mesh)}, {count} rows, context 8,112", measured, HELD_OUT, count, 8112, mesh=mesh)
    for mesh, gradient, whole in ((four, 38_042, 29_038), (MeshShape(2, 2), 42_404, 32_098)):
        yield _gradient(f"120b, {_axes(mesh)}", gradient, HELD_OUT, 32_768, 8192, mesh=mesh)
        yield _update(f"120b, {_axes(mesh)}", whole, HELD_OUT, 32_768, 8192, mesh=mesh)


def _axes(mesh: MeshShape) -> str:
    return ", ".join(f"`{name}` = {size}" for name, size in mesh._asdict().items() if size > 1)


def main() -> None:
    print("| tokens/s | predicted | measured | difference | |\n|---|---|---|---|---|")
    for row in rows():
        predicted, measured = (f"{x:,.0f}" if x >= 100 else f"{x:.1f}" for x in (row.predicted, row.measured))
        print(f"| {row.what} | {predicted} | {measured} | {row.error:+.1%} | {row.use} |")


if __name__ == "__main__":
    main()
