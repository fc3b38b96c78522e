"""What the engine refuses before anything is compiled."""

import pytest

from discover_jax.config import default_config
from discover_jax.engine import build_model
from discover_jax.exceptions import ConfigError
from discover_jax.models.families import SHAPES


@pytest.mark.parametrize(("shape", "only", "remedy"), [("gpt-oss-20b", "mlp_rank", "expert_rank"), ("qwen3-8b", "expert_rank", "mlp_rank")])
def test_an_adapter_only_on_matrices_that_the_model_lacks_is_refused(shape, only, remedy):
    config = default_config()
    for name in ("attention_rank", "expert_rank", "mlp_rank", "head_rank"):
        config.lora[name] = 8 if name == only else 0
    with pytest.raises(ConfigError, match=rf"config\.lora\.attention_rank, {remedy} or"):
        build_model(config, SHAPES[shape])
    config.lora[remedy] = 4
    assert getattr(build_model(config, SHAPES[shape]).lora, remedy) == 4
