"""Settings of sampling: temperature, token budgets, and the KV cache."""

from typing import Any

from discover_jax.config.setting import Rule, Setting

FORCED_TOKENS = 2
"""Fewest tokens of `ChatFormat.answer_forced` without the closing words: a line break and </think>. Harmony needs at least 6."""

_CLOSING = "\n\nThe time to think is over; I write the program now."

SAMPLING: dict[str, Any] = {
    "temperature": Setting(1.0, "sampling temperature; the update divides the logits by it, too", low=0.01, high=10.0),
    "temperature_spread": Setting(
        0.0, "temperatures in a group range from (1 - spread) to (1 + spread) times `temperature`", low=0.0, high=0.95
    ),
    "max_new_tokens": Setting(26_000, "token budget of a rollout", tier=1, unit="tokens", low=1, high=131_072),
    "thinking_tokens": Setting(
        0,
        "after this number of tokens, a rollout that has not started its answer is forced to start it; 0: no limit",
        unit="tokens",
        low=0,
        high=131_072,
        rules=(
            Rule(
                f"`thinking_tokens` + {FORCED_TOKENS + 1} must be at most `sampling.max_new_tokens`, since ending the thinking phase takes"
                f" at least {FORCED_TOKENS} tokens and the answer at least one. The tokens of `thinking_closing` are needed in addition",
                lambda config: (
                    not config.sampling.thinking_tokens
                    or config.sampling.thinking_tokens + FORCED_TOKENS + 1 <= config.sampling.max_new_tokens
                ),
                uses=("sampling.max_new_tokens",),
                fix="Raise config.sampling.max_new_tokens, or lower config.sampling.thinking_tokens.",
            ),
        ),
    ),
    "thinking_closing": Setting(
        _CLOSING,
        "text inserted to end the thinking phase; excluded from the loss",
        rules=(
            Rule(
                "has an effect only with `sampling.thinking_tokens` > 0",
                lambda config: config.sampling.thinking_tokens > 0 or config.sampling.thinking_closing == _CLOSING,
                uses=("sampling.thinking_tokens",),
                fix="Remove it, or set config.sampling.thinking_tokens.",
            ),
        ),
    ),
    "max_prompt_tokens": Setting(8_192, "maximum length of a prompt", tier=1, unit="tokens", low=1, high=131_072),
    "slots": Setting(
        128, "maximum number of rollouts decoded at the same time; a waiting rollout takes the slot of a finished one", low=1, high=4096
    ),
    "draft_tokens": Setting(
        0,
        "tokens copied from an earlier place of the rollout or its prompt, as a draft of the next ones that one pass checks; 0: no drafts."
        " Drafts are used while a pass reads at most 128 tokens with them. They do not change the distribution",
        unit="tokens",
        low=0,
        high=15,
    ),
    "cache_tokens": Setting(
        0,
        "capacity of the KV cache, for all slots together; 0: derived, what the slots can use, limited by the device's memory. When the"
        " cache is full, the rollouts that started last wait in host memory",
        unit="tokens",
        low=0,
        high=2**31 - 1,
    ),
}
