"""Quickstart: the apprentice improves programs for a bundled competition, on a laptop's CPU, with no download.

  make quickstart
  python -m discover_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from discover_jax.config import default_config


def get_config():
    """The bundled competition `digits-parity`: is a handwritten digit even?"""
    config = default_config()
    config.name = "quickstart"
    config.task.competition = "digits-parity"
    apprentice_on_cpu(config)
    config.groups = 4
    config.group_size = 8
    config.train.steps = 8
    return config


def apprentice_on_cpu(config):
    """Sets what the small model needs: its prompt, its lengths, and a learning rate that fits its size."""
    config.model.weights = "apprentice"
    config.model.dtype = "float32"
    config.model.experts = "dense"
    config.prompt.style = "brief"
    config.sampling.max_prompt_tokens = 640
    config.sampling.max_new_tokens = 512
    config.sampling.slots = 64
    config.train.rows = 4
    config.train.learning_rate = 1e-3
    config.execution.seconds = 60.0
