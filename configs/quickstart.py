"""Quickstart: the apprentice improves programs for a bundled competition, on a laptop's CPU, with no download.

make quickstart
python -m discover_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from discover_jax.apprentice.preset import apprentice_on_cpu
from discover_jax.config import default_config


def get_config():
    """The bundled competition `digits-parity`: is a handwritten digit even?"""
    config = default_config()
    config.name = "quickstart"
    config.task.competition = "digits-parity"
    apprentice_on_cpu(config)
    config.groups = 4
    config.group_size = 8
    config.train.steps = 6
    return config
