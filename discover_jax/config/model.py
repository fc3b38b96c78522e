"""Settings of the model and of the adapter that is trained on it."""

from typing import Any

from discover_jax.config.setting import Rule, Setting
from discover_jax.models.config import REMAT
from discover_jax.models.families import SHAPES

MODEL: dict[str, Any] = {
    "weights": Setting(
        "apprentice",
        "path of a checkpoint folder; `apprentice`: the small model that ships with the project; `random`: random weights with the sizes"
        " of `model.shape` (rehearsals and benchmarks)",
        tier=1,
    ),
    "shape": Setting(
        "",
        "sizes of `random` weights; empty otherwise",
        choices=("", *SHAPES),
        rules=(
            Rule(
                "a shape is required with `model.weights` = `random`, and not allowed otherwise",
                lambda config: (config.model.weights == "random") == bool(config.model.shape),
                uses=("model.weights",),
                fix=f"Set config.model.weights = 'random' together with one of {', '.join(SHAPES)}, or set the shape to ''.",
            ),
        ),
    ),
    "tokenizer": Setting(
        "",
        "folder of the tokenizer's files; empty: the folder of the weights",
        rules=(
            Rule(
                "required with `model.weights` = `random`, which has no tokenizer",
                lambda config: config.model.weights != "random" or bool(config.model.tokenizer),
                uses=("model.weights",),
                fix="Set config.model.tokenizer to a folder that contains one.",
                runs_only=True,
            ),
        ),
    ),
    "dtype": Setting("bfloat16", "data type of activations and of weights that are not MXFP4", choices=("bfloat16", "float32")),
    "experts": Setting(
        "packed",
        "form of the experts on the device. `packed`: MXFP4, in the layout of the kernel if there is one; `dense`: expanded once at load"
        " (small models on a CPU)",
        choices=("packed", "dense"),
    ),
    "remat": Setting(
        "layers",
        "what the update recomputes in the backward pass. `layers`: everything in a layer except attention; `pairs`: everything in a"
        " pair of layers (least memory); `none`: nothing (most memory)",
        choices=REMAT,
    ),
}

LORA: dict[str, Any] = {
    "attention_rank": Setting(
        32,
        "rank of the adapter on the q, k, v and o matrices; 0: no adapter there",
        low=0,
        high=1024,
        rules=(
            Rule(
                "at least one rank in `lora` must be positive",
                lambda config: any(config.lora[name] for name in ("attention_rank", "expert_rank", "mlp_rank", "head_rank")),
                uses=("lora.expert_rank", "lora.mlp_rank", "lora.head_rank"),
                fix="Set one of them, or use discover_jax.search for a run without training.",
            ),
        ),
    ),
    "expert_rank": Setting(
        8,
        "rank of the adapter on each expert's two matrices; 0: no adapter there. The default is 32 divided by the 4 experts of a token",
        low=0,
        high=1024,
    ),
    "mlp_rank": Setting(
        32, "rank of the adapter on the gate, up and down projections of a dense model; 0: no adapter there", low=0, high=1024
    ),
    "head_rank": Setting(32, "rank of the adapter on the output head; 0: no adapter there", low=0, high=1024),
    "alpha": Setting(32.0, "the product of an adapter's matrices is scaled by alpha / rank", low=1e-3, high=1e4),
}
