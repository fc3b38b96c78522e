"""Compiles jitted functions of a step of a small number of layers for a TPU slice that this machine does not have.

Prints the kernels, and a line for each function: its name, GB on a device, and the compiler's complaint if it rejects the function.

Usage: JAX_PLATFORMS=cpu python tpu_whole_program.py v6e:4x4 gpt-oss-120b 1 16 prefill decode
"""

import dataclasses
import sys

from absl import logging

from discover_jax.config import default_config
from discover_jax.dry_run import each_need
from discover_jax.kernels.kernel_set import kernel_set
from discover_jax.machines import find_machine
from discover_jax.models.families import SHAPES
from discover_jax.models.sharding import make_mesh


def main(name, shape, data, expert, functions):
    config = default_config()
    config.model.weights, config.model.shape, config.model.remat = "random", shape, "pairs"
    config.mesh.data, config.mesh.expert, config.train.rows = data, expert, data * expert
    machine = find_machine(name, data * expert)
    sizes = dataclasses.replace(SHAPES[shape], num_layers=len(SHAPES[shape].pattern))
    logging.info = lambda text, *values: print(text % values, flush=True)
    kernel_set("tpu", make_mesh(data, expert, 1, machine.devices))
    for need in each_need(config, sizes, machine, functions=functions, on_compile=lambda _: None):
        print(f"compiled {need.function}: {need.total / 1e9:.2f} GB {need.complaint}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]), sys.argv[5:])
