"""One step of a run without a task, on weights of a published shape: sampling and one update. Or only the loading of a checkpoint.

    python benchmarks/rehearsal.py --shape=gpt-oss-120b                     # random weights, drawn on the device
    python benchmarks/rehearsal.py --folder=DIR [--load_only]               # a published or synthetic checkpoint
    python benchmarks/rehearsal.py --shape=gpt-oss-20b --layers=2 ...       # a rehearsal of the rehearsal

`python -m discover_jax.models.synthetic --shape=gpt-oss-20b --out=DIR` writes a synthetic checkpoint.

Prints one JSON object: the dry run's prediction; bytes of weights, adapter and optimiser; seconds and peak device memory after each phase;
tokens per second; and the log-probability gap between sampler and update, which shows whether both compute the same model. The peak never
falls, so a phase that needs less than an earlier one shows the earlier peak. Advantages alternate between +1 and -1.

With --folder, it also prints by how much loading raised the host's peak memory, and the rate of a plain read of the same files from the
page cache afterwards. On a CPU, this peak includes the weights; `above_weights_bytes` excludes them.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import figures
import jax
import numpy as np

from discover_jax.config import default_config
from discover_jax.dry_run import needs
from discover_jax.engine import build_model, build_optimizer, build_sampler, build_update, row_tokens
from discover_jax.learning.packing import pack
from discover_jax.learning.train_state import init_train_state
from discover_jax.machines import find_machine, take_gpu_memory
from discover_jax.models.folder import find_folder, load_folder, read_config
from discover_jax.models.sharding import local_bytes
from discover_jax.models.synthetic import shape_of
from discover_jax.types import Prompt


class _Clock:
    """Seconds since the last reading, and the device's peak memory so far (None if the backend does not report it)."""

    def __init__(self):
        self._started = time.monotonic()

    def look(self, tree: Any) -> dict[str, Any]:
        jax.block_until_ready(tree)
        seconds, self._started = time.monotonic() - self._started, time.monotonic()
        stats = jax.local_devices()[0].memory_stats() or {}
        return {"seconds": round(seconds, 2), "peak_bytes": stats.get("peak_bytes_in_use"), "in_use_bytes": stats.get("bytes_in_use")}


def _host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plain_read(path: Path) -> dict[str, float]:
    """Bytes and seconds of reading all files with a buffer of 16 MiB."""
    buffer, total, started = bytearray(16 << 20), 0, time.monotonic()
    for file in sorted(find_folder(path).glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return {"bytes": total, "seconds": round(time.monotonic() - started, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="gpt-oss-20b")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=500, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a rollout")
    parser.add_argument("--rows", type=int, default=1, help="rows of a microbatch, each of one prompt and its rollout")
    parser.add_argument("--load_only", action="store_true", help="stop once --folder has been read")
    figures.add_record(parser)
    arguments = parser.parse_args()
    if arguments.load_only and not arguments.folder:
        parser.error("--load_only needs --folder")
    take_gpu_memory()
    config = default_config()
    config.model.dtype = arguments.dtype
    config.groups, config.group_size = arguments.groups, arguments.group_size
    config.sampling.slots = total = arguments.groups * arguments.group_size
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = arguments.prompt, arguments.new
    config.train.rows = arguments.rows
    sizes = read_config(arguments.folder) if arguments.folder else shape_of(arguments.shape, arguments.layers)
    out: dict[str, Any] = vars(arguments) | {
        "folder": str(arguments.folder),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    model = build_model(config, sizes)
    clock, before = _Clock(), _host_peak()
    if arguments.folder:
        frozen = load_folder(arguments.folder, dtype=arguments.dtype, experts=model.experts)[1]
    else:
        frozen = model.init_frozen(jax.random.key(0))
    out["weights"] = clock.look(frozen) | {"bytes": local_bytes(frozen)}
    if arguments.folder:
        peak = _host_peak() - before
        in_host = out["weights"]["bytes"] if jax.default_backend() == "cpu" else 0
        out["load"] = {"host_peak_bytes": peak, "above_weights_bytes": peak - in_host, "plain_read": _plain_read(arguments.folder)}
        values = {"seconds": (out["weights"]["seconds"], "s"), "host_peak_above_weights": ((peak - in_host) / 1e9, "GB")}
        figures.record(arguments.record, {f"load_{name}": value for name, value in values.items()})
    if arguments.load_only:
        print(json.dumps(out))
        return
    found = needs(config, sizes, find_machine("", 1), on_compile=lambda _: None)
    predicted = {phase: max(need.total for need in found if need.phase == phase) for phase in ("sampling", "update")}
    out["predicted"] = {f"{need.phase}/{need.function}": need.parts | {"total": need.total} for need in found}
    clock = _Clock()

    optimizer = build_optimizer(config)
    state = init_train_state(model.init_lora(jax.random.key(1)), optimizer)
    out["adapter"] = clock.look(state) | {"bytes": local_bytes(state.lora), "optimiser_bytes": local_bytes(state.opt_state)}

    # Only the last id stops, so almost every rollout spends its budget.
    sampler = build_sampler(config, model, stop_ids=(sizes.vocab_size - 1,))
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(group, "seed", "", rng.integers(0, sizes.vocab_size - 1, arguments.prompt).astype(np.int32))
        for group in range(arguments.groups)
    ]
    for name in ("sample_with_compilation", "sample"):
        rollouts = list(sampler.sample(frozen, state.lora, prompts, arguments.group_size, seed=0, step=0))
        out[name] = clock.look(()) | {"tokens": sum(len(r.tokens_T) for r in rollouts)}
    out["sample"]["tokens_per_s"] = round(out["sample"]["tokens"] / out["sample"]["seconds"], 2)

    update = build_update(config, model, optimizer)
    advantages = [1.0 if i % 2 else -1.0 for i in range(total)]
    batches = pack(rollouts, advantages, row_tokens=row_tokens(config), rows=arguments.rows)
    for name in ("update_with_compilation", "update"):
        state, metrics = update.update(frozen, state, batches)
        out[name] = clock.look(state) | {"tokens": sum(r.prompt_tokens_P.size + r.tokens_T.size for r in rollouts)}
        # Of the first update: before the second one, the adapter already differs from the sampler's.
        out.setdefault("logprob_gap", {key: value for key, value in metrics.items() if key.startswith("logprob_gap")})
    out["update"]["tokens_per_s"] = round(out["update"]["tokens"] / out["update"]["seconds"], 2)
    for phase, name in (("sampling", "sample"), ("update", "update")):
        if peak := out[name]["peak_bytes"]:
            out[name]["predicted_of_peak"] = round(predicted[phase] / peak, 4)
    print(json.dumps(out))
    values = {
        f"{phase}_tokens_per_s": (out[name]["tokens_per_s"], "tokens/s") for phase, name in (("sampling", "sample"), ("update", "update"))
    }
    figures.record(arguments.record, values)


if __name__ == "__main__":
    main()
