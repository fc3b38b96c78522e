"""The first run on a TPU (or another new device): compares its kernels with the references, and measures decoding, the update and a step.

    python benchmarks/tpu_check.py --out=tpu_check.json [--shape=gpt-oss-20b] [--data=1] [--expert=1] [--only=parity,decode] [--limit=300]
    python benchmarks/tpu_check.py --out=parity.json --part=parity [--shape=...] [--layers=2] [--dtype=bfloat16]

Each part runs in a process of its own, so that one that fails or hangs does not lose the others. It writes one JSON file with what every
part printed or returned, and exits with 1 if a part failed. Weights are random, so no download is needed.

parity: a model with the shape's sizes and two layers, with the kernels of this device and with the references, on the same weights and a
random adapter. Decoding: rows of different lengths read a prompt and some tokens; errors are of the hidden states, relative to their root
mean square, for tokens that both route to the same experts. Update: the gradient of the adapter on packed rows with fixed routing; errors
are relative to the norm of each matrix's gradient. float32 uses full precision in products. `kernels` says which operations have a kernel;
where none has one, references are compared with themselves.
decode: benchmarks/sampling.py steps. update: benchmarks/update.py. step: benchmarks/whole_step.py, with its programs not isolated.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import add_mesh

from discover_jax.config import default_config
from discover_jax.engine import build_model
from discover_jax.kernels.kernel_set import OPERATIONS, find_kernel, reference_set
from discover_jax.machines import take_gpu_memory
from discover_jax.models.config import ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.synthetic import shape_of

BOUNDS = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest error that passes. In bfloat16, a rounding error of one layer is about 0.4%, and kernels sum in another order."""
PAGE = 128
FOLDER = Path(__file__).parent

# ---------------------------------------------------------------------- parity


def random_adapter(model: Model) -> Any:
    """An adapter whose products are not zero, as those of a new one are."""
    leaves, tree = jax.tree.flatten(model.init_lora(jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [leaf + more for leaf, more in zip(leaves, noise, strict=True)])


def decoded(model: Model, frozen: Any, lora: Any, tokens: int, prompts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [B, T, D] and routes [B, T, L, X] of T fixed tokens, which rows with prompts of these lengths read next."""
    rng = np.random.default_rng(0)
    batch, chunk = len(prompts), -(-max(prompts) // PAGE) * PAGE
    vocabulary = model.config.vocab_size
    prompt_BC = jnp.asarray(rng.integers(0, vocabulary, (batch, chunk)), jnp.int32)
    next_BT = jnp.asarray(rng.integers(0, vocabulary, (batch, tokens)), jnp.int32)
    cache = model.init_cache(batch, chunk + tokens, PAGE)
    # Pages in no order, as a run's are.
    order = jnp.asarray(rng.permutation(cache.pages_BM.size), jnp.int32)
    cache = dataclasses.replace(cache, pages_BM=order[cache.pages_BM])
    _, cache, _ = jax.jit(model.prefill)(frozen, lora, prompt_BC, jnp.asarray(prompts, jnp.int32), cache)
    decode, hidden, routes = jax.jit(model.decode), [], []
    for number in range(tokens):
        hidden_BD, cache, routes_BLX = decode(frozen, lora, next_BT[:, number], cache)
        hidden.append(np.asarray(hidden_BD, np.float32))
        routes.append(np.asarray(routes_BLX))
    return np.stack(hidden, 1), np.stack(routes, 1)


def gradient(model: Model, frozen: Any, lora: Any, tokens: int) -> Any:
    """The adapter's gradient of a random linear function of the hidden states of two packed rows, one with two segments and padding."""
    rng = np.random.default_rng(1)
    shape = 2, tokens
    tokens_BT = jnp.asarray(rng.integers(0, model.config.vocab_size, shape), jnp.int32)
    cut, end = tokens // 3, tokens - tokens // 7
    segments = np.ones(shape, np.int32)
    segments[1, cut:] = 2
    segments[1, end:] = 0
    positions = np.tile(np.arange(tokens), (2, 1))
    positions[1, cut:] -= cut
    routes = None
    if model.config.num_experts:
        layers, chosen = model.routes.shape
        drawn = rng.permuted(np.tile(np.arange(model.config.num_experts), (*shape, layers, 1)), axis=-1)[..., :chosen]
        routes = jnp.asarray(drawn, model.routes.dtype)
    weights = rng.normal(size=(*shape, model.config.width)) * (segments > 0)[..., None]

    @jax.jit
    def of_adapter(lora: Any) -> Any:
        def loss(lora: Any) -> jax.Array:
            hidden_BTD = model.hidden(frozen, lora, tokens_BT, jnp.asarray(positions), jnp.asarray(segments), routes)
            return (hidden_BTD.astype(jnp.float32) * jnp.asarray(weights, jnp.float32)).sum()

        return jax.grad(loss)(lora)

    return jax.tree.map(np.asarray, of_adapter(lora))


def compare(model: Model, *, tokens: int = 8, prompts: tuple[int, ...] = (300, 129, 1), packed: int = 512) -> dict[str, Any]:
    """The errors of the model's kernels against the references, and whether they pass.

    Args:
      model: with the kernels to check.
      tokens: tokens to decode after the prompts.
      prompts: lengths of the prompts, one per row.
      packed: tokens of each packed row of the update.
    """
    references = dataclasses.replace(model, kernels=reference_set(model.mesh))
    frozen, lora = model.init_frozen(jax.random.key(0)), random_adapter(model)
    bound = BOUNDS[str(model.dtype)]
    with jax.default_matmul_precision("highest" if model.dtype == jnp.float32 else "default"):
        (found, routes), (expected, expected_routes) = (decoded(one, frozen, lora, tokens, prompts) for one in (model, references))
        gradients = [gradient(one, frozen, lora, packed) for one in (model, references)]
    # The state of a token depends on its own routes and, less, on those of earlier tokens.
    same_BT = (np.sort(routes, -1) == np.sort(expected_routes, -1)).all((-1, -2)) if routes.size else np.ones(found.shape[:2], bool)
    scale = np.sqrt(np.mean(expected**2, -1))
    errors_BT = np.sqrt(np.mean((found - expected) ** 2, -1)) / scale
    by_matrix = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradients[0]), jax.tree.leaves(gradients[1]), strict=True)
    }
    decode_error = float(errors_BT[same_BT].max()) if same_BT.any() else float("inf")
    worst = max(by_matrix, key=lambda name: by_matrix[name])
    return {
        "dtype": str(model.dtype),
        "bound": bound,
        "kernels": {name: name in model.kernels.kernels for name in OPERATIONS},
        "decode_error": decode_error,
        "same_routes": float(same_BT.mean()),
        "gradient_error": by_matrix[worst],
        "gradient_error_of": worst,
        "passed": bool(max(decode_error, by_matrix[worst]) <= bound and same_BT.mean() > 0.5),
    }


def check_parity(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part `parity`: both number formats, or the one of `--dtype`."""
    platform = jax.default_backend()
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "reasons": {name: reason for name in OPERATIONS if (reason := find_kernel(name, platform)[1])},
        "formats": [],
    }
    for dtype in (arguments.dtype,) if arguments.dtype else ("float32", "bfloat16"):
        result["formats"].append(compare(model_of(shape_of(arguments.shape, arguments.layers), dtype)))
    return result


def model_of(sizes: ModelConfig, dtype: str) -> Model:
    """A model on one device with this device's kernels, configured as in a run."""
    config = default_config()
    config.model.dtype = dtype
    return build_model(config, sizes)


# ---------------------------------------------------------------------- all parts


def commands(arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The command of each part, which writes PART.json in `folder`."""
    mesh, shape = [f"--data={arguments.data}", f"--expert={arguments.expert}"], f"--shape={arguments.shape}"
    layers = [f"--layers={arguments.layers}"] if arguments.layers else []
    slots = 64 * arguments.data * arguments.expert
    return {
        "parity": ["tpu_check.py", "--part=parity", f"--out={folder / 'parity.json'}", shape, f"--layers={arguments.layers or 2}"],
        "decode": ["sampling.py", "steps", shape, *layers, *mesh, f"--batch={slots}", "--new=128", f"--json={folder / 'decode.json'}"],
        "update": [
            *("update.py", shape, *layers, *mesh, "--tokens=4096", "--calls=3", "--no_prediction", f"--json={folder / 'update.json'}"),
            f"--rows={arguments.data * arguments.expert}",
        ],
        "step": [
            *("whole_step.py", shape, *layers, *mesh, "--groups=4", "--group_size=8", "--prompt=1024", "--new=512", "--unsafe"),
            *(f"--rows={arguments.data * arguments.expert}", f"--json={folder / 'step.json'}"),
        ],
    }


def run_part(command: list[str], limit: float, result: Path) -> dict[str, Any]:
    """Runs a part. Returns its JSON, its exit code (None after `limit` seconds), seconds, and the end of its output if it failed."""
    result.unlink(missing_ok=True)
    started = time.monotonic()
    part = subprocess.Popen(
        [sys.executable, str(FOLDER / command[0]), *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, code = part.communicate(timeout=limit)[0], part.returncode
    except subprocess.TimeoutExpired:
        os.killpg(part.pid, signal.SIGKILL)  # with the programs of a step
        output, code = part.communicate()[0], None
    found = {"command": " ".join(["python", f"benchmarks/{command[0]}", *command[1:]]), "code": code}
    found |= {"seconds": round(time.monotonic() - started, 1)}
    if code != 0:
        found["output"] = output[-4000:]
    return found | ({"result": json.loads(result.read_text())} if result.exists() else {})


def passed(part: str, found: dict[str, Any]) -> bool:
    """Whether a part ended without an error and, for parity, within its bounds."""
    if found["code"] != 0 or "result" not in found:
        return False
    return part != "parity" or all(row["passed"] for row in found["result"]["formats"])


def check_all(arguments: argparse.Namespace, say: Callable[[str], None]) -> bool:
    """Runs the parts and writes the file after each. Returns whether all passed."""
    folder = arguments.out.absolute().with_suffix(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    todo = {name: command for name, command in commands(arguments, folder).items() if name in arguments.only}
    report: dict[str, Any] = {}
    for number, (name, command) in enumerate(todo.items(), 1):
        say(f"{number}/{len(todo)} {name}: at most {arguments.limit:.0f} s")
        found = run_part(command, arguments.limit, folder / f"{name}.json")
        report[name] = {"passed": passed(name, found)} | found
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        say(f"    {'passed' if report[name]['passed'] else 'FAILED'} in {found['seconds']:.0f} s")
    say(f"Wrote {arguments.out}.")
    return all(found["passed"] for found in report.values())


PARTS = ("parity", "decode", "update", "step")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--shape", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has; parity uses two by default")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run")
    parser.add_argument("--limit", type=float, default=300.0, help="most seconds of a part")
    parser.add_argument("--part", choices=("parity",), help="run this part here, without the others")
    parser.add_argument("--dtype", choices=tuple(BOUNDS), default="", help="number format of --part=parity; default: both")
    add_mesh(parser)
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(PARTS):
        parser.error(f"--only has unknown parts: {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}.")
    arguments.only = arguments.only.split(",")
    if arguments.part is None:
        return 0 if check_all(arguments, lambda text: print(text, flush=True)) else 1
    take_gpu_memory()
    arguments.layers = arguments.layers or 2
    result = check_parity(arguments)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if all(row["passed"] for row in result["formats"]) else 1


if __name__ == "__main__":
    sys.exit(main())
