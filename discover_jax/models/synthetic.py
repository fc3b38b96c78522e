"""Random checkpoints of any shape and layout, for tests, benchmarks and rehearsals without published weights.

    python -m discover_jax.models.synthetic --shape=gpt-oss-20b --out=DIR [--layout=original] [--layers=4] [--seed=0]

Activations neither vanish nor overflow. Norms, biases and sinks are not neutral, so that omitting one changes the logits. A parameter's
values depend only on the seed and its path, so that both layouts of one seed are the same model.
"""

import argparse
import dataclasses
import math
import sys
import time
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from discover_jax.exceptions import ConfigError, DiscoverError
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.families import SHAPES
from discover_jax.models.folder_writer import write_folder
from discover_jax.models.layouts import HF_NAME, ParamPath, paths_of
from discover_jax.models.progress import OnProgress

_MEAN_SQUARE = 7.33 * 1.75
"""Mean square of a random nibble's 16 values (0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives), times that of its relative scale (1/2, 1 or
2)."""


def shape_of(name: str, layers: int = 0) -> ModelConfig:
    """The sizes of a published model, with `layers` layers if that is above 0.

    Raises:
      ConfigError: the name is unknown, or the number of layers is odd or negative.
    """
    if name not in SHAPES:
        raise ConfigError(f"Unknown shape {name!r}; allowed: {', '.join(SHAPES)}.")
    return dataclasses.replace(SHAPES[name], num_layers=layers) if layers else SHAPES[name]


def write_synthetic(
    path: str | Path, config: ModelConfig, *, seed: int = 0, layout: str = HF_NAME, on_progress: OnProgress | None = None
) -> None:
    """Writes a random checkpoint. The host needs memory for the tensors of one file.

    Raises:
      WeightsError: see `write_folder`.
    """
    abstract = Model(config, LoraConfig(0, 0, 0), dtype="bfloat16", experts="packed").abstract_frozen()
    structs = paths_of(abstract, config)

    def tensor(param: ParamPath, layer: int | None) -> np.ndarray:
        shape = structs[param].shape if layer is None else structs[param].shape[1:]
        return _random_values(
            np.random.default_rng([seed, zlib.crc32("/".join(param).encode()), 0 if layer is None else layer + 1]), param, shape
        )

    write_folder(path, config, tensor, layout=layout, on_progress=on_progress)


def _random_values(rng: np.random.Generator, param: ParamPath, shape: tuple[int, ...]) -> np.ndarray:
    if param[-1] == "blocks":
        return np.frombuffer(rng.bytes(math.prod(shape)), np.uint8).reshape(shape)
    if param[-1] == "scales":
        # Products have about unit gain. Neighbouring scales differ, so that a wrong order changes the result.
        middle = 127 + round(math.log2((shape[-1] * 32 * _MEAN_SQUARE) ** -0.5))
        return rng.integers(middle - 1, middle + 1, shape, np.uint8, endpoint=True)
    values = rng.standard_normal(shape, np.float32)
    if param[-1] in ("norm", "q_norm", "k_norm"):
        values = 1 + 0.1 * values
    elif param[-1] == "bias":
        values *= 0.1
    elif param == ("embedding",):
        values *= 0.02
    elif param[-1] == "weight":
        values *= shape[-1] ** -0.5
    return values.astype(ml_dtypes.bfloat16)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", required=True, help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--layout", default=HF_NAME, help=f"{HF_NAME} (the default), or original for gpt-oss")
    parser.add_argument("--layers", type=int, default=0, help="number of layers; must be even (default: the shape's)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    started = time.monotonic()

    def show(done: int, total: int) -> None:
        seconds = max(time.monotonic() - started, 1e-9)
        print(f"{done / 1e9:6.1f} of {total / 1e9:.1f} GB, {done / 1e9 / seconds:.2f} GB/s", flush=True)

    try:
        config = shape_of(arguments.shape, arguments.layers)
        write_synthetic(arguments.out, config, seed=arguments.seed, layout=arguments.layout, on_progress=show)
    except DiscoverError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"Wrote {arguments.shape} with {config.num_layers} layers in the {arguments.layout} layout to {arguments.out}.")


if __name__ == "__main__":
    main()
