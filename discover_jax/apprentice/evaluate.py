"""Measures an apprentice: its fraction of valid programs, their diversity, and the similarity of edits to their parents.

    python -m discover_jax.apprentice.evaluate [--weights=DIR] [--competition=spaceship-titanic --raw=train.csv] [--samples=256] [--seed=0]

Half of the samples are first attempts. The other half are edits of parents: valid programs from the first half. No weights change.
"""

import argparse
import dataclasses
import difflib
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from discover_jax.execution.executor import Executor
from discover_jax.execution.limits import ResourceLimits
from discover_jax.kernels.kernel_set import kernel_set
from discover_jax.models.decoder import Model
from discover_jax.models.folder import load_folder
from discover_jax.sampling.sampler import Sampler
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.task import Task
from discover_jax.text.chat import ChatFormat
from discover_jax.text.harmony import Harmony
from discover_jax.text.prompts import PromptSettings, build_prompt
from discover_jax.text.reply import program_of
from discover_jax.text.tokenizer import load_tokenizer
from discover_jax.types import SEED, Outcome, Rollout, State, Verdict

WEIGHTS = Path(__file__).parent / "weights"
MAX_PROMPT_TOKENS = 640
MAX_NEW_TOKENS = 512
PARENTS = 16
NEAR = 0.85
"""Two programs are near each other if their `similarity` is at least this."""


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A program and its verdict; `code` is None if the rollout has no program."""

    parent: State
    code: str | None
    verdict: Verdict | None
    tokens: int

    @property
    def score(self) -> float | None:
        return self.verdict.grade.score if self.verdict is not None and self.verdict.outcome is Outcome.OK else None


def similarity(first: str, second: str) -> float:
    """Fraction of the lines of two programs that match in order (`difflib` ratio), from 0 to 1."""
    return difflib.SequenceMatcher(None, first.split("\n"), second.split("\n"), autojunk=False).ratio()


def report(sampled: Sequence[Sampled]) -> str:
    """One line of statistics."""
    scores = [s.score for s in sampled if s.score is not None]
    codes = [s.code for s in sampled if s.code is not None]
    line = (
        f"{len(sampled)} samples: {len(scores) / len(sampled):.1%} valid, {len(set(codes))} distinct programs,"
        f" {np.mean([s.tokens for s in sampled]):.0f} tokens each"
    )
    if not scores:
        return line
    quartiles = ", ".join(f"{q:.4f}" for q in np.percentile(scores, (25, 50, 75)))
    return f"{line}; score mean {np.mean(scores):.4f}, quartiles {quartiles}, best {max(scores):.4f}, worst {min(scores):.4f}"


Sample = Callable[[Sequence[State], int, int], Sequence[tuple[State, Rollout]]]
"""(parents, samples, step) -> rollouts in equal groups, one for each parent."""


def policy(model: Model, frozen: object, chat: ChatFormat, task: Task, *, slots: int, seed: int) -> Sample:
    """Samples from the apprentice at temperature 1."""
    sampler = Sampler(
        model,
        slots=slots,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        stop_ids=chat.stop_ids,
    )
    settings = PromptSettings(style="brief", max_tokens=MAX_PROMPT_TOKENS)

    def sample(parents: Sequence[State], samples: int, step: int) -> list[tuple[State, Rollout]]:
        prompts = [build_prompt(task, parent, (), settings, chat, group, step) for group, parent in enumerate(parents)]
        rollouts = sampler.sample(frozen, None, prompts, max(1, samples // len(parents)), seed=seed, step=step)
        return [(parents[rollout.group], rollout) for rollout in rollouts]

    return sample


def run_programs(pairs: Sequence[tuple[State, Rollout]], chat: ChatFormat, executor: Executor) -> list[Sampled]:
    """Runs and grades the programs of rollouts, in the given order."""
    codes = [program_of(rollout, chat) for _, rollout in pairs]
    futures = [None if code is None else executor.submit(code) for code in codes]
    return [
        Sampled(parent, code, None if future is None else future.result(), len(rollout.tokens_T))
        for (parent, rollout), code, future in zip(pairs, codes, futures, strict=True)
    ]


def choose_parents(fresh: Sequence[Sampled], count: int) -> list[State]:
    """The first `count` distinct valid programs, as states."""
    scores = {s.code: s.score for s in fresh if s.code is not None and s.score is not None}
    return [
        State(f"parent-{i}", SEED.id, code, score, score, stdout="", step=0, adapter_step=0)
        for i, (code, score) in enumerate(itertools.islice(scores.items(), count))
    ]


def measure(sample: Sample, chat: ChatFormat, executor: Executor, samples: int) -> tuple[list[Sampled], list[Sampled]]:
    """Samples, runs and grades first attempts and edits of them, and prints statistics.

    Returns:
      First attempts, and edits. There are no edits if no first attempt is valid.
    """
    half = max(1, samples // 2)
    started = time.monotonic()
    pairs = sample([SEED], half, 0)
    sampled = time.monotonic()
    fresh = run_programs(pairs, chat, executor)
    print(f"first attempts: {report(fresh)}")
    print(f"  sampled in {sampled - started:.0f} s, run in {time.monotonic() - sampled:.0f} s")
    edits: list[Sampled] = []
    if parents := choose_parents(fresh, min(PARENTS, half)):
        edits = run_programs(sample(parents, half, 1), chat, executor)
        print(f"edits of {len(parents)} parents: {report(edits)}")
        _print_nearness(edits, parents)
        print(f"all: {report([*fresh, *edits])}")
    _print_failures([*fresh, *edits])
    return fresh, edits


def _print_nearness(edits: Sequence[Sampled], parents: Sequence[State]) -> None:
    nearness = [similarity(s.parent.code, s.code) for s in edits if s.code is not None]
    near = sum(r >= NEAR for r in nearness) / len(edits)
    copies = sum(s.code == s.parent.code for s in edits)
    mean = np.mean(nearness) if nearness else 0.0
    print(f"  {near:.1%} near their parent (similarity of at least {NEAR}), mean similarity {mean:.3f}; {copies} copies")
    unrelated = [similarity(a.code, b.code) for a, b in itertools.pairwise(parents)]
    if unrelated:
        fraction = np.mean([r >= NEAR for r in unrelated])
        print(f"  for comparison, pairs of parents: {fraction:.1%} near each other, mean similarity {np.mean(unrelated):.3f}")


def _print_failures(sampled: Sequence[Sampled], shown: int = 8) -> None:
    for failure in [s for s in sampled if s.score is None][:shown]:
        if failure.verdict is None:
            print("  failed: no program in the reply")
        else:
            lines = (failure.verdict.grade.reason or failure.verdict.execution.detail).strip().splitlines()
            print(f"  failed: {failure.verdict.outcome.value}: {lines[-1][:200] if lines else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the apprentice's folder (default: the one in this package)")
    parser.add_argument("--competition", default="digits-parity", help="a built-in id or a .py file (default: digits-parity)")
    parser.add_argument("--raw", help="the competition's raw data, if it needs any")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chat = Harmony(load_tokenizer(arguments.weights))
    config, frozen = load_folder(arguments.weights)
    with tempfile.TemporaryDirectory() as name:
        task = prepare_task(arguments.competition, raw=arguments.raw, reward="grade", folder=Path(name) / "task")
        if not isinstance(task, Task):
            parser.error(f"--competition={arguments.competition}: the apprentice knows only competitions, and this is a problem.")
        model = Model(config, kernels=kernel_set(jax.default_backend()))
        sample = policy(model, frozen, chat, task, slots=min(64, arguments.samples), seed=arguments.seed)
        with Executor([task], ResourceLimits(seconds=60.0), cache_dir=Path(name) / "cache") as executor:
            measure(sample, chat, executor, arguments.samples)


if __name__ == "__main__":
    main()
