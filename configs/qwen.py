"""Qwen2.5-Coder on one GPU: a bundled competition, or Kaggle's Spaceship Titanic.

  python -m discover_jax.main --config=configs/qwen.py:1.5b --config.model.weights=/path/to/Qwen2.5-Coder-1.5B-Instruct
  python -m discover_jax.main --config=configs/qwen.py:1.5b --config.model.weights=/path/to/Qwen2.5-Coder-1.5B-Instruct \
    --config.task.competition=spaceship-titanic --config.task.raw=train.csv

| argument | model                       | groups x size | steps |
|----------|-----------------------------|---------------|-------|
| `0.5b`   | Qwen2.5-Coder-0.5B-Instruct | 4 x 16        | 10    |
| `1.5b`   | Qwen2.5-Coder-1.5B-Instruct | 8 x 16        | 10    |
| `7b`     | Qwen2.5-Coder-7B-Instruct   | 8 x 16        | 10    |

The weights are a Hugging Face folder; `python -m discover_jax.models.import_gguf` makes one from a GGUF file. The default competition is
`digits-parity`. These models think little, so rollouts are short. Measured: on Spaceship Titanic, the 1.5B learns to write valid programs
at this learning rate, with groups of 8 (docs/results.md). The other sizes, and groups of 16, have not been measured.
"""

from discover_jax.config import default_config
from discover_jax.exceptions import ConfigError

# groups, group_size
_SIZES = {"0.5b": (4, 16), "1.5b": (8, 16), "7b": (8, 16)}


def get_config(size="1.5b"):
    """The config for the model of this size."""
    if size not in _SIZES:
        raise ConfigError(f"The argument of configs/qwen.py must be one of {', '.join(_SIZES)}; got {size!r}.")
    config = default_config()
    config.name = f"qwen-{size}"
    config.model.weights = f"qwen2.5-coder-{size}"
    config.task.competition = "digits-parity"
    config.groups, config.group_size = _SIZES[size]
    config.train.steps = 10
    config.train.learning_rate = 1e-4
    config.sampling.max_prompt_tokens = 2_048
    config.sampling.max_new_tokens = 1_536
    config.sampling.temperature = 0.8  # at 1.0 these models rarely write a program that runs
    config.execution.seconds = 120.0
    config.execution.cores = 1
    return config
