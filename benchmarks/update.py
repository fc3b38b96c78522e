"""Tokens per second of the update on random weights of a published shape, with the device's matrix product and the dry run's memory.

    python benchmarks/update.py --shape=gpt-oss-120b [--layers=0] [--tokens=8192] [--prompt=512] [--rollouts=4] [--row_tokens=0] [--rows=1]
        [--lora=report|linear|attention] [--data=1] [--expert=1] [--gradient_only] [--calls=5] [--no_prediction] [--json=FILE]
        [--profile=DIR]

Model and update are built from a config as in a run. The rollouts are synthetic: random tokens, alternating advantages -1 and +1, and, for
the replay of routing, distinct random experts for each layer and token. So the load of the experts is as even as chance makes it. Two
functions are timed: the gradient (`Update.gradient`: packed batches from the host, forward, backward, sums over microbatches), and the
whole update, which adds the KL to the base (one more forward pass, as in the default config) and the optimiser. Each runs once to compile;
the time is the median of `--calls` more. Tokens include prompts. As in peers.py, `--lora=attention` is rank 32 on only q, k, v and o, and
`--lora=linear` on all matrices of the layers, but not on the head.

Operations: N is the number of weights that a token uses (each layer's q, k, v, o and router, and its chosen experts' three matrices), and
V D that of the head. a is 4 x heads x head size for each pair of a token and a key that it attends to. A rollout of S tokens has
S (S + 1) / 2 pairs in a full layer and w (w + 1) / 2 + (S - w) w, w = min(S, window), in a sliding one:

    needed       4 N S + 3 a + 4 V D (tokens in the loss): each product once forward, and once backward to its input, since base
                 weights have no gradient (for attention: twice, to queries, keys, scores and values). Recomputation does not count.
    full remat   6 (N + V D) S + 4.5 a: the whole forward pass recomputed, attention's backward recomputed in its kernel, and the
                 head at every token. For the 120b at 8,192 tokens: 36.4 GFLOP per token, an often quoted figure.

Both exclude the adapter's products (1.4% for the report's ranks, including gradients of its matrices). The pass for the KL adds
2 N S + a + 2 V D (tokens in the loss) to what the whole update needs.

`--profile=DIR` traces another gradient of the first microbatch. It writes DIR/top.json (milliseconds by function and by kernel), the trace
and the compiled function.
"""

import argparse
import dataclasses
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import figures
import jax
import numpy as np
from absl import logging as absl_logging
from kernels_update import pairs
from measuring import SHOWN, add_mesh, matmul_flops_per_s, mesh_of, peak_bytes, set_mesh, trace

from discover_jax import config as settings
from discover_jax.dry_run import needs
from discover_jax.engine import build_model, build_optimizer, build_update, row_tokens
from discover_jax.learning.packing import Batch, pack
from discover_jax.learning.train_state import abstract_train_state, init_train_state
from discover_jax.learning.update import Update
from discover_jax.machines import device_memory, find_machine, take_gpu_memory
from discover_jax.models.config import ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.sharding import local_bytes
from discover_jax.models.synthetic import shape_of
from discover_jax.runs.compilations import cache_compilations
from discover_jax.sampling.sampler import most_pages
from discover_jax.sampling.schedule import PAGE
from discover_jax.types import Rollout, StopReason

# ---------------------------------------------------------------------- what is updated


def configured(arguments: argparse.Namespace) -> Any:
    """The config of a run with these arguments, validated as for a dry run."""
    config = settings.default_config()
    config.model.weights, config.model.shape, config.model.dtype = "random", arguments.shape, arguments.dtype
    prompt, new = arguments.prompt, arguments.tokens - arguments.prompt
    config.groups, config.group_size = 1, max(2, arguments.rollouts)  # groups of one are refused; the update does not use groups
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = prompt, new
    # The dry run also compiles a sampler, here for a single rollout, which fits next to any update.
    config.sampling.slots, config.sampling.cache_tokens = 1, most_pages(1, prompt, new) * PAGE
    config.train.row_tokens, config.train.rows = arguments.row_tokens, arguments.rows
    set_mesh(config, arguments)
    config.model.remat = arguments.remat or config.model.remat
    if arguments.lora != "report":
        config.lora.head_rank = 0
    if arguments.lora == "attention":
        config.lora.expert_rank = config.lora.mlp_rank = 0
    return settings.validate(config, for_run=False)


def drawn(model: Model, number: int, prompt: int, new: int, *, replay: bool) -> Rollout:
    """A rollout of random tokens, determined by its number. Its log-probabilities are roughly those of any token with random weights."""
    rng, c = np.random.default_rng(number), model.config
    tokens, routes_SLX = rng.integers(0, c.vocab_size, prompt + new).astype(np.int32), None
    if replay:
        order_SLE = rng.random((prompt + new - 1, c.num_layers, c.num_experts), np.float32)
        routes_SLX = np.argpartition(order_SLE, c.experts_per_token - 1)[..., : c.experts_per_token].astype(model.routes.dtype)
    logprobs_T = np.full(new, -np.log(c.vocab_size), np.float32)
    chosen_T = np.ones(new, np.bool_)
    return Rollout(0, number, tokens[:prompt], tokens[prompt:], logprobs_T, chosen_T, StopReason.MAX_TOKENS, routes_SLX=routes_SLX)


# ---------------------------------------------------------------------- what it needs


@dataclasses.dataclass(frozen=True)
class Operations:
    """Floating-point operations of an update of some rollouts; see the module's docstring."""

    needed: float
    full_remat: float
    base: float


def operations(sizes: ModelConfig, places: Sequence[int], bearing: int) -> Operations:
    """The operations of rollouts with `places` tokens each; `bearing` tokens of each are in the loss."""
    attention = sizes.width * sizes.head_size * 2 * (sizes.num_heads + sizes.num_kv_heads)
    experts = max(sizes.experts_per_token, 1) * 3 * sizes.width * sizes.mlp_width
    layers = sizes.num_layers * (attention + experts + sizes.width * sizes.num_experts) * sum(places)
    head = sizes.vocab_size * sizes.width
    seen = sizes.num_full * pairs(places, None)
    if sizes.num_sliding:
        seen += sizes.num_sliding * pairs(places, sizes.sliding_window)
    scores = 4 * sizes.num_heads * sizes.head_size * seen
    return Operations(
        needed=4 * layers + 3 * scores + 4 * head * bearing,
        full_remat=6 * (layers + head * sum(places)) + 4.5 * scores,
        base=2 * layers + scores + 2 * head * bearing,
    )


def predicted(config: Any, sizes: ModelConfig, *, gradient_only: bool) -> dict[str, dict[str, Any]]:
    """The dry run's bytes for each function of the update on this machine; without those of the optimiser if it does not run."""
    found = {}
    machine = find_machine("", config.mesh.data * config.mesh.expert)
    for need in needs(config, sizes, machine, on_compile=lambda line: print(line, flush=True)):
        if need.phase == "update":
            parts = need.parts | ({"optimiser": 0} if gradient_only else {})
            found[need.function] = parts | {"total": sum(parts.values())} | ({"complaint": need.complaint} if need.complaint else {})
    return found


def _gb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.2f} GB"


class _Chosen(logging.Handler):
    """Keeps the log's messages about kernels."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "kernel of" in (line := record.getMessage()):
            self.lines.append(line)


# ---------------------------------------------------------------------- measuring


def timed(call: Callable[[], dict[str, float]], calls: int) -> dict[str, Any]:
    """Seconds of the first call and the median of the others, and the metrics of the first."""
    spent, metrics = [], []
    for _ in range(1 + calls):
        started = time.perf_counter()
        metrics.append(call())
        spent.append(time.perf_counter() - started)
    median = statistics.median(spent[1:])
    return {
        "seconds": median,
        "seconds_all": [round(each, 4) for each in spent[1:]],
        "first_call_s": spent[0],
        "compile_s": spent[0] - median,
        "peak_bytes": peak_bytes(),
        **{name: metrics[0][name] for name in ("loss", "grad_norm", "entropy", "kl_base/mean") if name in metrics[0]},
    }


def profile(update: Update, config: Any, model: Model, frozen: Any, lora: Any, batch: Batch, folder: Path) -> dict[str, Any]:
    """Milliseconds of one microbatch's gradient by function and by kernel, and the device's idle time."""
    state = abstract_train_state(model.abstract_lora(), build_optimizer(config))
    functions = update.lowered_functions(model.abstract_frozen(), state, *batch.tokens_BT.shape)
    text = next(function for function in functions if function.name == "gradient").lowered.compile().as_text()
    found = trace(lambda: update.gradient(frozen, lora, [batch]), text, folder, "gradient")

    def table(rows: dict[str, tuple[float, int]]) -> list[dict[str, Any]]:
        largest = list(rows.items())[:SHOWN]
        return [{"name": name, "ms": round(total / 1e6, 3), "events": count} for name, (total, count) in largest]

    top = {
        "ms": round(found.whole_ns / 1e6, 2),
        "idle_ms": round(found.idle_ns / 1e6, 2),
        "events": found.events,
        "tokens": int(np.count_nonzero(batch.segments_BT)),
        "by_function": table(found.by_function),
        "by_kernel": table(found.by_kernel),
    }
    (folder / "top.json").write_text(json.dumps(top, indent=1) + "\n")
    return top


# ---------------------------------------------------------------------- the command


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a rollout, including its prompt")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a rollout without loss")
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--row_tokens", type=int, default=0, help="tokens of a packed row; 0: those of a rollout")
    parser.add_argument("--rows", type=int, default=1, help="rows of a microbatch, a multiple of --data x --expert")
    add_mesh(parser)
    parser.add_argument("--remat", default="", help="rematerialisation policy; default: the config's")
    parser.add_argument("--lora", choices=("report", "linear", "attention"), default="report")
    parser.add_argument("--gradient_only", action="store_true", help="no optimiser, no KL, and no memory for the optimiser")
    parser.add_argument("--calls", type=int, default=5, help="timed calls after the one that compiles")
    parser.add_argument("--matmul", type=int, default=8192, help="width of the matrices of the ceiling")
    parser.add_argument("--no_prediction", action="store_true", help="skip the dry run, which compiles everything again")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    figures.add_record(parser)
    arguments = parser.parse_args()
    if not 0 < arguments.prompt < arguments.tokens:
        parser.error(f"--tokens={arguments.tokens} includes --prompt={arguments.prompt}: it must be more, and both above 0.")
    if arguments.calls < 1 or arguments.rollouts < 1:
        parser.error(f"--calls={arguments.calls} and --rollouts={arguments.rollouts} must be at least 1.")
    return arguments


def main() -> None:
    arguments = parsed()
    take_gpu_memory()
    cache_compilations()
    kernels = _Chosen()
    absl_logging.get_absl_logger().addHandler(kernels)
    absl_logging.set_verbosity(absl_logging.INFO)
    ceiling = matmul_flops_per_s(arguments.matmul)
    config, sizes = configured(arguments), shape_of(arguments.shape, arguments.layers)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_flops_per_s": ceiling,
        "memory_bytes": device_memory(),
    }

    def keep() -> None:
        """Called after each part, so that a later failure does not lose it."""
        if arguments.json:
            arguments.json.write_text(json.dumps(result | {"kernels": kernels.lines}, indent=1) + "\n")

    print(f"{result['device']}, jax {jax.__version__}: matrix product {ceiling / 1e12:.1f} TFLOP/s", flush=True)
    if not arguments.no_prediction:
        result["predicted"] = predicted(config, sizes, gradient_only=arguments.gradient_only)
        keep()

    model, optimizer = build_model(config, sizes, mesh_of(config)), build_optimizer(config)
    update = build_update(config, model, optimizer)
    frozen, lora = model.init_frozen(jax.random.key(0)), model.init_lora(jax.random.key(1))
    state = None if arguments.gradient_only else init_train_state(lora, optimizer)
    jax.block_until_ready((frozen, lora, state))
    result |= {"weights_bytes": local_bytes(frozen), "adapter_bytes": local_bytes(lora), "experts": model.experts}
    result["peak_bytes_before"] = peak_bytes()

    new, replay = arguments.tokens - arguments.prompt, config.train.replay_routing
    rollouts = [drawn(model, number, arguments.prompt, new, replay=replay) for number in range(arguments.rollouts)]
    advantages = [1.0 if number % 2 else -1.0 for number in range(arguments.rollouts)]
    batches = pack(rollouts, advantages, row_tokens=row_tokens(config), rows=config.train.rows)
    places, positions = [arguments.tokens - 1] * arguments.rollouts, len(batches) * batches[0].tokens_BT.size
    tokens, needed = arguments.tokens * arguments.rollouts, operations(sizes, places, new * arguments.rollouts)
    result |= {"microbatches": len(batches), "microbatch": batches[0].tokens_BT.shape, "tokens": tokens, "filled": sum(places) / positions}
    result |= {f"{name}_gflop_per_token": value / tokens / 1e9 for name, value in dataclasses.asdict(needed).items()}

    def finish(name: str, row: dict[str, Any], flops: float, programs: Sequence[str]) -> None:
        bad = [key for key in ("loss", "grad_norm") if not np.isfinite(row[key])]
        if bad:
            sys.exit(f"{name}: {', '.join(f'{key} is {row[key]}' for key in bad)}; times of such an update are meaningless.")
        row |= {"tokens_per_s": tokens / row["seconds"], "flops_per_s": flops / row["seconds"]}
        row["of_matmul"] = row["flops_per_s"] / ceiling
        if name == "gradient":
            row["full_remat_flops_per_s"] = needed.full_remat / row["seconds"]
            row["full_remat_of_matmul"] = row["full_remat_flops_per_s"] / ceiling
        if "predicted" in result:
            row["predicted_bytes"] = max(result["predicted"][program]["total"] for program in programs if program in result["predicted"])
            row["predicted_of_peak"] = row["predicted_bytes"] / row["peak_bytes"] if row["peak_bytes"] else None
        result[name] = row
        keep()
        values = {"tokens_per_s": (row["tokens_per_s"], "tokens/s")}
        values |= {"peak": (row["peak_bytes"] / 1e9, "GB")} if row["peak_bytes"] else {}
        recorded = {f"{name}_{key}": value for key, value in values.items()}
        figures.record(arguments.record, recorded, devices=arguments.data * arguments.expert)
        print(
            f"{name:8s} {row['seconds']:8.3f} s {row['tokens_per_s']:9.1f} tokens/s {row['flops_per_s'] / 1e12:7.2f} TFLOP/s needed"
            f" {row['of_matmul']:6.1%} of the matrix product; loss {row['loss']:.4f}, gradient {row['grad_norm']:.4g},"
            f" peak {_gb(row['peak_bytes'])}, predicted {_gb(row.get('predicted_bytes'))},"
            f" compiled in {row['compile_s']:.0f} s",
            flush=True,
        )

    finish("gradient", timed(lambda: update.gradient(frozen, lora, batches)[1], arguments.calls), needed.needed, ("gradient",))
    if arguments.profile:  # before the whole update, which frees the adapter's buffers
        result["profile"] = profile(update, config, model, frozen, lora, batches[0], arguments.profile)
        keep()
        for row in result["profile"]["by_function"]:
            print(f"  {row['ms']:9.2f} ms {row['events']:7d}  {row['name']}")
    if state is not None:
        current = [state]
        del state, lora  # the first update frees their buffers

        def whole() -> dict[str, float]:
            current[0], metrics = update.update(frozen, current[0], batches)
            jax.block_until_ready(current[0])
            return metrics

        with_base = needed.needed + (needed.base if config.train.measure_kl or config.train.kl_coefficient else 0.0)
        finish("update", timed(whole, arguments.calls), with_base, ("base", "gradient", "apply"))
    result["kernels"] = kernels.lines
    print("\n".join(kernels.lines))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
