"""The peer of benchmarks/decode.py: tokens a second of `transformers`' `generate` on random weights of a published shape, in bfloat16.

    python benchmarks/peer_generate.py --shape=gpt-oss-20b [--batch=128] [--prompt=512] [--new=32] [--json=FILE]

Needs torch and transformers, which are no dependencies of the project. Two runs are made: the one that counts generates `--new` tokens, the
other one token, so that reading the prompts can be taken off. Experts are computed by the grouped matrix product of transformers.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from discover_jax.models.synthetic import shape_of


def build(shape: str, layers: int, device: str) -> Any:
    """A model of that shape with random weights, as transformers initialises them."""
    sizes = shape_of(shape, layers)
    known = {field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
    config = transformers.GptOssConfig(
        num_hidden_layers=known["num_layers"],
        hidden_size=known["width"],
        intermediate_size=known["expert_width"],
        num_local_experts=known["num_experts"],
        num_experts_per_tok=known["experts_per_token"],
        num_attention_heads=known["num_heads"],
        num_key_value_heads=known["num_kv_heads"],
        head_dim=known["head_size"],
        vocab_size=known["vocab_size"],
        sliding_window=known["sliding_window"],
        eos_token_id=None,
        pad_token_id=0,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return transformers.GptOssForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def seconds_of(model: Any, tokens: torch.Tensor, new: int) -> float:
    """Of one call of `generate` with exactly so many new tokens, sampled at temperature 1."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens generated a row")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = build(arguments.shape, arguments.layers, device)
    tokens = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.prompt), device=device)
    seconds_of(model, tokens[:, :16], 2)  # warms up
    reading = seconds_of(model, tokens, 1)
    whole = seconds_of(model, tokens, arguments.new)
    step = (whole - reading) / (arguments.new - 1)
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "shape": arguments.shape,
        "batch": arguments.batch,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "experts": model.config._experts_implementation,
        "step_ms": 1e3 * step,
        "tokens_per_s": arguments.batch / step,
        "tokens_per_s_with_prompts": arguments.batch * arguments.new / whole,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }
    print(json.dumps(result), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
