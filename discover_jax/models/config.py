"""The architecture of a model as data: sizes, and which options each of its layers has. Also the ranks of an adapter."""

import dataclasses

from discover_jax.exceptions import ConfigError

REMAT = ("none", "layers", "pairs")
"""Rematerialisation policies of the update, see `Model.remat`."""
PATTERNS = (("sliding", "full"), ("full",))
"""Kinds of layers that repeat through a model."""
ROPE_KINDS = ("plain", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Defaults are the constants of gpt-oss; `models.families` makes the configs of other families.

    Attributes:
      num_experts: 0 for a dense feed-forward layer: down(silu(gate x) * up x). Otherwise experts with gpt-oss's activation.
      experts_per_token: 0 for a dense model.
      mlp_width: width of the hidden layer of the feed-forward, or of each expert.
      sliding_window: keys that a sliding layer sees, including the query's own; ignored if no layer slides.
      rope_kind: one of ROPE_KINDS. "plain" has only `rope_theta`. "llama3" has a factor, the original length, `rope_low_factor` and
        `rope_high_factor`. "yarn" has a factor, the original length, two betas and `rope_truncate`, which rounds the bounds of the ramp
        (the published gpt-oss models do not round).
      rms_eps: added to the mean square in norms.
      swiglu_limit, swiglu_alpha: clamp and slope of the experts' activation.
      eos_id, pad_id: ids of the end and of padding.
      family: the name in `models.families.FAMILIES` that reads and writes this model.
      pattern: kinds of the layers that repeat, one of PATTERNS.
      sinks: whether each head has a learned sink in the softmax.
      qk_norm: whether queries and keys are normed before their rotary positions.
      qkv_bias, o_bias: whether the attention's projections have biases.
      tied: whether the head is the embedding.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_experts: int
    experts_per_token: int
    mlp_width: int
    vocab_size: int
    sliding_window: int = 128
    rope_theta: float = 150_000.0
    rope_factor: float = 32.0
    rope_original_length: int = 4096
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = False
    rms_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    eos_id: int = 200_002
    pad_id: int = 199_999
    family: str = "gpt_oss"
    pattern: tuple[str, ...] = PATTERNS[0]
    sinks: bool = True
    qk_norm: bool = False
    qkv_bias: bool = True
    o_bias: bool = True
    rope_kind: str = "yarn"
    rope_low_factor: float = 1.0
    rope_high_factor: float = 4.0
    tied: bool = False

    def __post_init__(self):
        problems = []
        if self.pattern not in PATTERNS:
            problems.append(f"pattern = {self.pattern!r}; allowed: {', '.join(map(repr, PATTERNS))}")
        elif self.num_layers < 1 or self.num_layers % len(self.pattern):
            problems.append(
                f"num_layers = {self.num_layers}, but must be at least {len(self.pattern)} and a multiple of it, because layers repeat as"
                f" {', '.join(self.pattern)}"
            )
        if self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads = {self.num_heads}, but must be a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_size % 2:
            problems.append(f"head_size = {self.head_size}, but must be even, because rotary embedding pairs its halves")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            problems.append(f"experts_per_token = {self.experts_per_token}, but must be between 1 and num_experts = {self.num_experts}")
        if not self.num_experts and self.experts_per_token:
            problems.append(f"experts_per_token = {self.experts_per_token}, but must be 0, because num_experts is 0")
        if self.rope_kind not in ROPE_KINDS:
            problems.append(f"rope_kind = {self.rope_kind!r}; allowed: {', '.join(ROPE_KINDS)}")
        if problems:
            raise ConfigError("This model cannot be built: " + "; ".join(problems) + ".")

    @property
    def num_repeats(self) -> int:
        """Number of times that the pattern of layers repeats."""
        return self.num_layers // len(self.pattern)

    @property
    def stack(self) -> str:
        """Key of the stacked layers in the trees of parameters."""
        return "pairs" if len(self.pattern) == 2 else "layers"

    @property
    def num_sliding(self) -> int:
        """Number of sliding layers."""
        return self.num_repeats * self.pattern.count("sliding")

    @property
    def num_full(self) -> int:
        """Number of layers that see all keys."""
        return self.num_repeats * self.pattern.count("full")

    def describe(self) -> str:
        """One line for people: family, layers, width, and experts if there are any."""
        experts = f", {self.num_experts} experts" if self.num_experts else ""
        return f"{self.family}, {self.num_layers} layers, width {self.width}{experts}"

    def position(self, layer: int) -> tuple[str, int]:
        """The kind of a layer, and its index in the stack of that kind."""
        return self.pattern[layer % len(self.pattern)], layer // len(self.pattern)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Ranks of the adapter. Targets of rank 0 have no adapter. Each product B A is scaled by alpha / rank.

    `expert_rank` is of the experts' matrices, `mlp_rank` of a dense model's gate, up and down projections.
    """

    attention_rank: int = 32
    expert_rank: int = 8
    head_rank: int = 32
    alpha: float = 32.0
    mlp_rank: int = 0

    def of_model(self, config: ModelConfig) -> "LoraConfig":
        """The ranks that a model has: rank 0 for the experts of a dense model, and for the dense layers of a model with experts."""
        return dataclasses.replace(self, **({"mlp_rank": 0} if config.num_experts else {"expert_rank": 0}))
