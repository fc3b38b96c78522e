"""The peer of benchmarks/update.py: tokens a second of a LoRA update by `transformers` and `peft` on random weights of a published shape.

    python benchmarks/peer_update.py --shape=gpt-oss-20b [--batch=2] [--tokens=4096] [--prompt=512] [--attention=flex_attention|eager]
        [--calls=5] [--json=FILE]

Needs torch, transformers and peft, which are no dependencies of the project. It is what update.py does with `--lora=attention --tokens=T
--rollouts=B`: as many sequences of as many random tokens, of which those after the prompt bear the loss ratio x advantage, advantages -1
and +1 in turn; rank 32 on q, k, v and o of every layer; base weights in bfloat16 (the project's experts are in MXFP4), experts by
transformers' grouped matrix product, each layer computed again in the backward pass, and logits for 1,024 tokens at a time, so that those
of all tokens never exist at once. A step is forward, backward, and AdamW on the adapter, without a KL to the base: compare it with
update.py's `gradient`, whose optimiser takes little with so small an adapter. Routing is the router's own, on random weights, where
update.py replays routes that were drawn. Two steps warm up; the time is the median of the others.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import torch.utils.checkpoint
import transformers
from peer_generate import build

RANK, ALPHA, TARGETS = 32, 32, ("q_proj", "k_proj", "v_proj", "o_proj")
CHUNK = 1024
"""Tokens whose logits exist at once."""
WARM_UP = 2


def adapted(model: Any) -> Any:
    """The model with an adapter in float32 and everything else frozen, that computes each layer again in its backward pass."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)  # the adapter in float32: peft's own default for one that is trained
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
    sampler = -torch.log(torch.tensor(float(model.config.vocab_size)))  # what random weights give about all tokens

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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a sequence that bear no loss")
    parser.add_argument("--attention", choices=("flex_attention", "eager"), default="flex_attention")
    parser.add_argument("--calls", type=int, default=5, help=f"timed, after {WARM_UP} that warm up")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not 0 < arguments.prompt < arguments.tokens:
        parser.error(f"--tokens={arguments.tokens} includes --prompt={arguments.prompt}: it must be more, and both above 0.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32 for the adapter's products, which is to the peer's advantage
    base = build(arguments.shape, arguments.layers, device)
    base.set_attn_implementation(arguments.attention)
    if base.config._attn_implementation != arguments.attention:
        sys.exit(f"transformers took attention {base.config._attn_implementation!r} instead of {arguments.attention!r}.")
    model = adapted(base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-5, betas=(0.9, 0.95), weight_decay=0.0)
    tokens_BT = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.tokens), device=device)

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
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
        print(f"step {number}: {spent[-1]:.3f} s, loss {seen[-1][0]:.4f}, gradient {seen[-1][1]:.4g}", flush=True)
    if not all(torch.isfinite(torch.tensor(pair)).all() for pair in seen):
        sys.exit(f"Losses and gradients are not all finite: {seen}; times of such an update mean nothing.")
    seconds = statistics.median(spent[WARM_UP:])
    result = {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "shape": arguments.shape,
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "prompt": arguments.prompt,
        "attention": base.config._attn_implementation,
        "experts": base.config._experts_implementation,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "trained_type": sorted({str(parameter.dtype) for parameter in trained}),
        "loss": seen[0][0],
        "grad_norm": seen[0][1],
        "seconds": seconds,
        "seconds_all": [round(each, 4) for each in spent[WARM_UP:]],
        "tokens_per_s": arguments.batch * arguments.tokens / seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }
    print(json.dumps(result), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
