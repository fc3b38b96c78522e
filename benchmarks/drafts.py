"""Drafts from a row's own text: how many tokens a pass yields on recorded rollouts, and how much time drafts save on a device.

    python benchmarks/drafts.py texts RUN_FOLDER... --tokenizer=FOLDER [--count=200] [--write=FILE]
    python benchmarks/drafts.py time --shape=qwen2.5-coder-1.5b [--rollouts=FILE] [--drafts=0,3,7,15] [--rows=8] [--new=512] [--shortest=2]

texts: of `--count` rollouts, drawn from the rollouts/ of the run folders, and for several lengths of drafts and matches: tokens per pass,
draft tokens that were accepted, and passes with a draft. Prompts and replies are tokenised by the tokenizer of the model that wrote them.
What a model samples does not depend on drafts, so the recorded tokens suffice. `--write` stores the tokens for `time`.

time: decoding of a batch with random weights of a published shape, once for each length of drafts. Random weights do not copy. So tokens
are drawn as in a run, and then replaced by those of recorded rollouts (`--rollouts`), or else of synthetic edits: copies of the prompt in
which an edit of 1 to 8 new tokens begins with probability 1 / `--unedited` at each token. The time is from the first launch to the last
token. So it includes the tail, in which fewer rows are live. Both take --record=PREFIX; `time` also takes --layers, --dtype, --no_adapter.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import figures
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from measuring import add_mesh, mesh_of, set_mesh

from discover_jax.config import default_config
from discover_jax.engine import build_model, build_sampler
from discover_jax.machines import take_gpu_memory
from discover_jax.models.synthetic import shape_of
from discover_jax.sampling import decoding, drafts
from discover_jax.sampling.schedule import Progress
from discover_jax.text.folder_tokenizer import FolderTokenizer
from discover_jax.types import Prompt

Pair = tuple[np.ndarray, np.ndarray]
"""The tokens of a prompt and of its reply."""
LENGTHS = (3, 7, 15)
MATCHES = ((8, 1), (8, 2), (8, 3), (4, 2), (16, 2))
"""Most and fewest tokens of a match."""

# ---------------------------------------------------------------------- texts


def read_rollouts(folders: list[Path], tokenizer: Path, count: int) -> list[Pair]:
    """Up to `count` rollouts of these run folders, drawn evenly."""
    encode = FolderTokenizer(tokenizer).encode  # markup of the chat template becomes ordinary text, which changes a few tokens
    pairs = []
    for folder in folders:
        for path in sorted((folder / "rollouts").glob("step-*.parquet")):
            table = pd.read_parquet(path, engine="fastparquet", columns=["prompt", "reply"])
            pairs += zip(table["prompt"].ffill(), table["reply"], strict=True)
    pairs = [(prompt, reply) for prompt, reply in pairs if isinstance(prompt, str) and isinstance(reply, str) and reply]
    if not pairs:
        sys.exit(f"{', '.join(map(str, folders))}: no rollouts. Name run folders that have rollouts/step-*.parquet.")
    chosen = np.random.default_rng(0).permutation(len(pairs))[:count]
    return [(np.array(encode(pairs[i][0]), np.int32), np.array(encode(pairs[i][1]), np.int32)) for i in sorted(chosen)]


def sums_of(pairs: list[Pair], longest: int, shortest: int) -> dict[int, np.ndarray]:
    """For each length of drafts: tokens, passes, passes with a draft, draft tokens, and accepted ones. Matches are those of `propose`."""
    sums = {length: np.zeros(5, np.int64) for length in LENGTHS}
    for prompt, reply in pairs:
        tokens, begin, end = np.concatenate([prompt, reply]), len(prompt), len(prompt) + len(reply)
        ends = np.arange(end)
        # For each last token: where its longest match ends, or -1. A match that ends at `last` is that of the token before, and one more.
        matched, found = np.zeros(end, np.int64), np.full(end, -1)
        for last in range(end):
            matched = np.where((tokens == tokens[last]) & (ends < last), np.concatenate([[0], matched[:-1]]) + 1, 0)
            clipped = np.minimum(matched, longest)
            if (best := int((clipped * end + ends).argmax())) < last and clipped[best] >= shortest:
                found[last] = best
        for length in LENGTHS:
            at, passes, with_draft, offered, accepted = begin, 0, 0, 0, 0
            while at < end:
                passes, at = passes + 1, at + 1  # the token that was drawn in the pass before
                if at == end or (match := found[at - 1]) < 0:
                    continue
                draft = tokens[match + 1 + np.arange(min(length, end - at)) % (at - 1 - match)]
                same = int(np.cumprod(draft == tokens[at : at + len(draft)]).sum())
                with_draft, offered, accepted, at = with_draft + 1, offered + len(draft), accepted + same, at + same
            sums[length] += (len(reply), passes, with_draft, offered, accepted)
    return sums


def measure_texts(arguments: argparse.Namespace) -> None:
    pairs = read_rollouts(arguments.runs, arguments.tokenizer, arguments.count)
    prompt, reply = (np.mean([len(pair[i]) for pair in pairs]) for i in range(2))
    print(f"{len(pairs)} rollouts; tokens of a prompt {prompt:.0f}, of a reply {reply:.0f}")
    if arguments.write:
        arrays = {f"{name}_{i}": tokens for i, pair in enumerate(pairs) for name, tokens in zip(("prompt", "reply"), pair, strict=True)}
        np.savez_compressed(arguments.write, **arrays)
    values: dict[str, tuple[float, str]] = {}
    print("match  draft | tokens a pass  accepted  passes with a draft")
    for longest, shortest in MATCHES:
        for length, (tokens, passes, with_draft, offered, accepted) in sums_of(pairs, longest, shortest).items():
            of_pass, share = tokens / passes, accepted / max(offered, 1)
            print(f"{shortest} to {longest:2d} {length:4d} | {of_pass:8.2f} {share:14.0%} {with_draft / passes:12.0%}", flush=True)
            name = f"match{shortest}to{longest}_draft{length}"
            values |= {f"{name}_tokens_per_pass": (of_pass, "tokens"), f"{name}_accepted": (share, "fraction")}
    figures.record(arguments.record, values)


# ---------------------------------------------------------------------- time


def load_rollouts(path: Path, rows: int, new: int) -> list[Pair]:
    """The first rollouts of a file that `texts` wrote, with replies of at most `new` tokens."""
    with np.load(path) as file:
        pairs = [(file[f"prompt_{i}"], file[f"reply_{i}"][:new]) for i in range(len(file.files) // 2)]
    if len(pairs) < rows:
        sys.exit(f"{path} has {len(pairs)} rollouts, but --rows={rows}. Write a file of at least as many by `texts --count`.")
    return pairs[:rows]


def synthetic_rollouts(rows: int, vocab: int, prompt: int, new: int, unedited: float) -> list[Pair]:
    """Copies of the prompt's end with edits: replaced, added and removed tokens."""
    pairs = []
    for row in range(rows):
        rng = np.random.default_rng(row)
        tokens = rng.integers(0, vocab, prompt).astype(np.int32)
        reply: list[int] = []
        at = max(0, prompt - new)
        while len(reply) < new:
            if rng.random() < 1 / unedited:
                reply += rng.integers(0, vocab, rng.integers(1, 9)).tolist()
                at += int(rng.integers(0, 9))
            reply.append(int(tokens[at % prompt]))
            at += 1
        pairs.append((tokens, np.array(reply[:new], np.int32)))
    return pairs


def draw_recorded(pairs: list[Pair], new: int, stop: int) -> None:
    """Makes the sampler draw the tokens of these rollouts, one per group. It computes what a run computes, and replaces the result."""
    recorded = np.full((len(pairs), new + 1), stop, np.int32)
    for row, (_, reply) in enumerate(pairs):
        recorded[row, : len(reply)] = reply
    draw = decoding.draw_tokens

    def keys_of(seed: jax.Array, step: jax.Array, groups_B: jax.Array, indices_B: jax.Array) -> jax.Array:
        del seed, step
        return jax.random.wrap_key_data(jnp.stack([groups_B, indices_B], axis=1).astype(jnp.uint32))

    def draw_tokens(keys_B: jax.Array, counts_B: jax.Array, logits_BV: jax.Array, temperatures_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens_B, logprobs_B = draw(keys_B, counts_B, logits_BV, temperatures_B)
        groups_B = jax.random.key_data(keys_B)[:, 0].astype(jnp.int32)
        replaced_B = jnp.asarray(recorded)[groups_B, jnp.minimum(counts_B, new)]
        return jnp.where(tokens_B < 0, tokens_B, replaced_B), logprobs_B  # keeps the draw

    for module in (decoding, drafts):
        module.rollout_keys, module.draw_tokens = keys_of, draw_tokens


def measured(sampler: Any, model_weights: tuple[Any, Any], pairs: list[Pair]) -> dict[str, Any]:
    """The second of two calls. The first one compiles."""
    prompts = [Prompt(group, "seed", "", prompt) for group, (prompt, _) in enumerate(pairs)]
    seen: list[Progress] = []
    began = [0.0]

    def timed(launch: Any) -> Any:
        def run(*arguments: Any) -> Any:
            if not began[0]:
                jax.block_until_ready(arguments[2])  # prompts are read
                began[0] = time.perf_counter()
            return launch(*arguments)

        return run

    sampler._launch, sampler._draft_launch = timed(sampler._launch), timed(sampler._draft_launch)
    rollouts: list[Any] = []
    for step in range(2):
        began[0] = 0.0
        seen.clear()
        rollouts = list(sampler.sample(*model_weights, prompts, 1, seed=0, step=step, on_progress=seen.append))
    seconds, last = time.perf_counter() - began[0], seen[-1]
    for rollout in rollouts:
        reply = pairs[rollout.group][1]
        if not np.array_equal(rollout.tokens_T[: len(reply)], reply):
            sys.exit(f"The rollout of group {rollout.group} is not the recorded one.")
    return {
        "seconds": seconds,
        "tokens": last.tokens,
        "tokens_per_s": last.tokens / seconds,
        "tokens_per_pass": (last.passes + last.accepted) / last.passes if last.passes else 1.0,
        "accepted": last.accepted / last.drafted if last.drafted else 0.0,
    }


def measure_time(arguments: argparse.Namespace) -> None:
    drafts.propose = functools.partial(drafts.propose, shortest=arguments.shortest)
    sizes = shape_of(arguments.shape, arguments.layers)
    stop = sizes.vocab_size - 1
    if arguments.rollouts:
        pairs = load_rollouts(arguments.rollouts, arguments.rows, arguments.new)
    else:
        pairs = synthetic_rollouts(arguments.rows, stop, arguments.prompt, arguments.new, arguments.unedited)
    if (largest := max(int(tokens.max()) for pair in pairs for tokens in pair)) >= stop:
        sys.exit(f"The rollouts have token {largest}, but {arguments.shape} has only {sizes.vocab_size} tokens.")
    new = max(len(reply) for _, reply in pairs)
    draw_recorded(pairs, new, stop)
    config = default_config()
    config.model.dtype = arguments.dtype
    config.groups, config.group_size, config.sampling.slots = len(pairs), 1, arguments.slots or len(pairs)
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = max(len(prompt) for prompt, _ in pairs), new + 1
    set_mesh(config, arguments)
    model = build_model(config, sizes, mesh_of(config))
    frozen = model.init_frozen(jax.random.key(0))
    lora = None if arguments.no_adapter else model.init_lora(jax.random.key(1))
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    values: dict[str, tuple[float, str]] = {}
    print(f"{result['device']}, {arguments.shape}, {len(pairs)} rows", flush=True)
    for length in map(int, arguments.drafts.split(",")):
        config.sampling.draft_tokens = length
        row = measured(build_sampler(config, model, stop_ids=(stop,)), (frozen, lora), pairs)
        result[f"draft{length}"] = row
        print(
            f"draft of {length:2d}: {row['tokens']} tokens in {row['seconds']:.2f} s, {row['tokens_per_s']:.0f} tokens/s;"
            f" {row['tokens_per_pass']:.2f} tokens a pass, {row['accepted']:.0%} accepted",
            flush=True,
        )
        values[f"draft{length}_tokens_per_s"] = row["tokens_per_s"], "tokens/s"
        values[f"draft{length}_tokens_per_pass"] = row["tokens_per_pass"], "tokens"
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    figures.record(arguments.record, values, devices=arguments.data * arguments.expert)


# ---------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    texts, timed = (commands.add_parser(name) for name in ("texts", "time"))
    texts.add_argument("runs", nargs="+", type=Path, help="run folders")
    texts.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    texts.add_argument("--count", type=int, default=200, help="rollouts")
    texts.add_argument("--write", type=Path, help="file for the tokens, .npz")
    timed.add_argument("--shape", default="qwen2.5-coder-1.5b")
    timed.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    timed.add_argument("--dtype", default="bfloat16")
    timed.add_argument("--no_adapter", action="store_true")
    timed.add_argument("--rollouts", type=Path, help="file that `texts` wrote")
    timed.add_argument("--drafts", default="0,3,7,15", help="lengths of drafts, measured one after another")
    timed.add_argument("--rows", type=int, default=8, help="rollouts")
    timed.add_argument("--slots", type=int, default=0, help="rows of the batch at the start; 0: the number of rollouts")
    timed.add_argument("--new", type=int, default=512, help="most tokens of a reply")
    timed.add_argument("--prompt", type=int, default=1331, help="tokens of a synthetic prompt")
    timed.add_argument("--unedited", type=float, default=12.0, help="mean tokens between synthetic edits")
    timed.add_argument("--shortest", type=int, default=drafts.SHORTEST, help="fewest tokens of a match")
    timed.add_argument("--json", type=Path)
    add_mesh(timed)
    for command in (texts, timed):
        figures.add_record(command)
    arguments = parser.parse_args()
    if arguments.what == "texts":
        measure_texts(arguments)
    else:
        take_gpu_memory()
        measure_time(arguments)


if __name__ == "__main__":
    main()
