"""Baselines: generation with `transformers` and updates with `transformers` and `peft`, on random weights of a published shape.

    python benchmarks/peers.py generate --shape=gpt-oss-20b [--batch=128] [--prompt=512] [--new=32]
    python benchmarks/peers.py update --shape=gpt-oss-20b [--batch=2] [--tokens=4096] [--prompt=512]
        [--attention=flex_attention|sdpa|eager] [--calls=5]

Both also take --layers, --json=FILE and --record=PREFIX, and need torch and transformers, which the project does not depend on. Experts
use the grouped matrix product of transformers. All shapes of `model.shape` are supported.

generate: times two calls. One generates `--new` tokens per row, the other one token, so that prefill can be subtracted.

update (needs peft): the equivalent of update.py with `--tokens=T --rollouts=B` and `--lora=attention` (gpt-oss) or `--lora=linear` (dense
models): B sequences of T random tokens. Tokens after the prompt have the loss ratio x advantage, with alternating advantages -1 and +1. The
adapter has rank 32 on q, k, v and o of every layer, and in dense models also on gate, up and down. Base weights are bfloat16 (the project's
experts are MXFP4). The backward pass recomputes each layer, and logits exist for 1,024 tokens at a time. A step is forward, backward and
AdamW on the adapter, without a KL to the base. Compare it with update.py's `gradient`, since the optimiser takes little time for such a
small adapter. gpt-oss's router chooses on random weights; update.py replays drawn routes. Two steps warm up; the time is the median of the
others. The default attention is the fastest that the model supports: flex_attention for gpt-oss, PyTorch's sdpa for dense models.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import figures
import torch
import torch.utils.checkpoint
import transformers

from discover_jax.models.families import family_of
from discover_jax.models.synthetic import shape_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(shape: str, layers: int) -> Any:
    """A model of that shape in bfloat16, with random weights as initialised by transformers."""
    sizes = shape_of(shape, layers)
    config = transformers.AutoConfig.for_model(**family_of(sizes).to_hf(sizes))
    config.eos_token_id, config.pad_token_id = None, 0
    if sizes.num_experts:
        config.quantization_config = None
        config._experts_implementation = "grouped_mm"
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return transformers.AutoModelForCausalLM.from_config(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def generate_seconds(model: Any, tokens: torch.Tensor, new: int) -> float:
    """Seconds of one call of `generate` with exactly `new` new tokens, sampled at temperature 1."""
    if tokens.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.inference_mode():
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    assert out.shape[1] == tokens.shape[1] + new, f"{out.shape[1] - tokens.shape[1]} new tokens instead of {new}"
    return time.perf_counter() - started


# ---------------------------------------------------------------------- update

RANK, ALPHA = 32, 32
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
CHUNK = 1024
"""Tokens whose logits exist at the same time."""
WARM_UP = 2


def is_routed(model: Any) -> bool:
    """Whether the model has a mixture of experts."""
    return model.config.model_type == "gpt_oss"


def adapted(model: Any) -> Any:
    """The model with an adapter in float32 and frozen base weights. The backward pass recomputes each layer."""
    import peft

    targets = [*ATTENTION, *(() if is_routed(model) else MLP)]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)  # peft's default: a trained adapter is float32
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def loss_of(model: Any, tokens_BT: torch.Tensor, prompt: int) -> torch.Tensor:
    """Sum over the tokens after the prompts of -(ratio to the sampler's probability) x advantage."""
    causal = model.get_base_model()
    hidden_BTD = causal.model(tokens_BT, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
    targets_BT = tokens_BT[:, prompt:]
    advantages_B = torch.tensor([1.0 if row % 2 else -1.0 for row in range(len(tokens_BT))], device=tokens_BT.device)
    hidden, targets = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    advantages = advantages_B[:, None].expand(targets_BT.shape).flatten()
    sampler = -torch.log(torch.tensor(float(model.config.vocab_size)))  # roughly the log-probability of any token with random weights

    def of_chunk(hidden_td: torch.Tensor, targets_t: torch.Tensor, advantages_t: torch.Tensor) -> torch.Tensor:
        logits_tv = causal.lm_head(hidden_td).float()
        logprobs_t = -torch.nn.functional.cross_entropy(logits_tv, targets_t, reduction="none")
        return -(torch.exp(logprobs_t - sampler) * advantages_t).sum()

    total = torch.zeros((), device=tokens_BT.device)
    for start in range(0, len(targets), CHUNK):
        places = slice(start, start + CHUNK)
        total = total + torch.utils.checkpoint.checkpoint(
            of_chunk, hidden[places], targets[places], advantages[places], use_reentrant=False
        )
    return total


def experts_of(model: Any) -> str | None:
    return model.config._experts_implementation if is_routed(model) else None


def measure_generate(arguments: argparse.Namespace) -> dict[str, Any]:
    model = build(arguments.shape, arguments.layers)
    tokens = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.prompt), device=DEVICE)
    generate_seconds(model, tokens[:, :16], 2)  # warms up
    reading, whole = (generate_seconds(model, tokens, new) for new in (1, arguments.new))
    step = (whole - reading) / (arguments.new - 1)
    return {
        "experts": experts_of(model),
        "step_ms": 1e3 * step,
        "tokens_per_s": arguments.batch / step,
        "tokens_per_s_with_prompts": arguments.batch * arguments.new / whole,
    }


def measure_update(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_float32_matmul_precision("high")  # TF32 for the adapter's products, which favours the baseline
    base = build(arguments.shape, arguments.layers)
    attention = arguments.attention or ("flex_attention" if is_routed(base) else "sdpa")
    base.set_attn_implementation(attention)
    if base.config._attn_implementation != attention:
        sys.exit(f"transformers took attention {base.config._attn_implementation!r} instead of {attention!r}.")
    model = adapted(base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-5, betas=(0.9, 0.95), weight_decay=0.0)
    tokens_BT = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.tokens), device=DEVICE)

    def step() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, tokens_BT, arguments.prompt)
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([parameter.grad.norm() for parameter in trained]))
        optimizer.step()
        return loss.item(), norm.item()  # waits for the device

    spent, seen = [], []
    for number in range(WARM_UP + arguments.calls):
        started = time.perf_counter()
        seen.append(step())
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
        print(f"step {number}: {spent[-1]:.3f} s, loss {seen[-1][0]:.4f}, gradient {seen[-1][1]:.4g}", flush=True)
    if not all(torch.isfinite(torch.tensor(pair)).all() for pair in seen):
        sys.exit(f"Losses and gradients are not all finite: {seen}; times of such an update are meaningless.")
    seconds = statistics.median(spent[WARM_UP:])
    return {
        "attention": base.config._attn_implementation,
        "experts": experts_of(base),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "trained_type": sorted({str(parameter.dtype) for parameter in trained}),
        "loss": seen[0][0],
        "grad_norm": seen[0][1],
        "seconds": seconds,
        "seconds_all": [round(each, 4) for each in spent[WARM_UP:]],
        "tokens_per_s": arguments.batch * arguments.tokens / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="peer", required=True)
    generate, update = (commands.add_parser(name) for name in ("generate", "update"))
    generate.add_argument("--batch", type=int, default=128)
    generate.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    generate.add_argument("--new", type=int, default=32, help="tokens generated per row")
    update.add_argument("--batch", type=int, default=2, help="sequences")
    update.add_argument("--tokens", type=int, default=4096, help="tokens of a sequence")
    update.add_argument("--prompt", type=int, default=512, help="tokens of a sequence without loss")
    update.add_argument("--attention", choices=("flex_attention", "sdpa", "eager"), help="default: the fastest for the model")
    update.add_argument("--calls", type=int, default=5, help=f"timed, after {WARM_UP} that warm up")
    for command in (generate, update):
        command.add_argument("--shape", default="gpt-oss-20b")
        command.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
        command.add_argument("--json", type=Path)
        figures.add_record(command)
    arguments = parser.parse_args()
    if arguments.peer == "update" and not 0 < arguments.prompt < arguments.tokens:
        parser.error(f"--tokens={arguments.tokens} includes --prompt={arguments.prompt}: it must be more, and both above 0.")
    torch.manual_seed(0)
    found = (measure_generate if arguments.peer == "generate" else measure_update)(arguments)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        **{name: value for name, value in vars(arguments).items() if name not in ("json", "record")},
        **found,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None,
    }
    print(json.dumps(result), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    values = {"tokens_per_s": (found["tokens_per_s"], "tokens/s")}
    figures.record(arguments.record, values | ({"peak": (result["peak_gb"], "GB")} if result["peak_gb"] else {}))


if __name__ == "__main__":
    main()
