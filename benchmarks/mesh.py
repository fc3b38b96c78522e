"""The arguments `--data` and `--expert` of benchmarks that run on several devices."""

import argparse
from typing import Any

from jax.sharding import Mesh

from discover_jax.models.sharding import mesh_of_run


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Gives a command both arguments."""
    parser.add_argument("--data", type=int, default=1, help="of the mesh: parts of the batch")
    parser.add_argument("--expert", type=int, default=1, help="of the mesh: parts of the experts, and again of the batch")


def set_mesh(config: Any, arguments: argparse.Namespace) -> None:
    """Writes them into a run's config."""
    config.mesh.data, config.mesh.expert = arguments.data, arguments.expert


def mesh_of(config: Any) -> Mesh | None:
    """The mesh of a config on the devices here, or None for one device."""
    return mesh_of_run(config.mesh.data, config.mesh.expert, config.mesh.tensor)
