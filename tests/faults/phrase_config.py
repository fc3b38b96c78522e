"""Settings of the tiny run: `--config=tests/faults/phrase_config.py:WEIGHTS`, where WEIGHTS is a folder of `phrase_model`."""

from pathlib import Path

from discover_jax.config import default_config


def get_config(weights: str = ""):
    """Four steps of two groups with three programs each."""
    config = default_config()
    config.name = "phrases"
    config.task.competition = str(Path(__file__).with_name("remainders.py"))
    config.model.weights = weights
    config.model.dtype = "float32"
    config.model.experts = "dense"
    config.model.remat = "none"
    config.lora.attention_rank = 0
    config.lora.expert_rank = 0
    config.lora.head_rank = 4
    config.prompt.style = "brief"
    config.groups = 2
    config.group_size = 3
    config.sampling.slots = 6
    config.sampling.max_prompt_tokens = 64
    config.sampling.max_new_tokens = 16
    config.execution.seconds = 20.0
    config.execution.cores = 1
    config.execution.workers = 2
    config.execution.memory_gib = 1.0
    config.train.steps = 4
    config.train.learning_rate = 4e-3
    config.checkpoint.keep = 3
    return config
