"""The evaluation's statistics, on replies from the corpus that the real executor runs."""

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest

from discover_jax.apprentice import corpus, evaluate, programs
from discover_jax.execution.executor import Executor
from discover_jax.execution.limits import ResourceLimits
from discover_jax.tasks.prepare import prepare_task
from discover_jax.text.harmony import Harmony
from discover_jax.text.tokenizer import SentencePieceTokenizer
from discover_jax.types import Rollout, StopReason

SHIPPED = Path(corpus.__file__).parent / "weights" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(SHIPPED)


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=folder / "task")
    with Executor([task], ResourceLimits(seconds=60.0), workers=1, cache_dir=folder / "cache") as executor:
        yield executor


def _rollout(plan, code, group, index, tokenizer, cut=0):
    ids, prompt_length = corpus.encode(corpus.Document("p", plan, code), tokenizer)
    tokens = np.asarray(ids[prompt_length : len(ids) - cut], np.int32)
    stop = StopReason.MAX_TOKENS if cut else StopReason.STOP_TOKEN
    chosen = np.ones(len(tokens), bool)
    return Rollout(group, index, np.asarray(ids[:prompt_length], np.int32), tokens, np.zeros(len(tokens), np.float32), chosen, stop)


def _corpus_policy(tokenizer, seed):
    """Samples like a perfect apprentice: fresh programs first, then edits of each parent."""
    rng = random.Random(seed)
    drawn = {}

    def sample(parents, samples, step):
        pairs = []
        for group, parent in enumerate(parents):
            for index in range(max(1, samples // len(parents))):
                program = programs.sample(rng) if parent.is_seed else programs.mutate(drawn[parent.code], rng)[0]
                code = programs.render(program)
                drawn[code] = program
                pairs.append((parent, _rollout("plan", code, group, index, tokenizer)))
        return pairs

    return sample


@pytest.mark.slow  # a development tool
def test_the_statistics_of_a_perfect_apprentice(tokenizer, executor, capsys):
    fresh, edits = evaluate.measure(_corpus_policy(tokenizer, seed=4), Harmony(tokenizer), executor, samples=8)
    assert len(fresh) == len(edits) == 4
    assert all(s.score is not None for s in [*fresh, *edits])
    assert {s.parent.code for s in edits} == {s.code for s in fresh}
    output = capsys.readouterr().out
    assert re.search(r"\b4 samples\b.*\b100\.0%.*\b4 distinct\b", output)
    assert re.search(r"\b8 samples\b.*\b100\.0%", output)
    assert re.search(r"\b100\.0%[^\n]*\bparent\b", output)
    assert re.search(r"\b0\b[^\n%]*\bcop(?:y|ies)\b", output)


def test_failures_are_counted_and_their_reasons_printed(tokenizer, executor, capsys):
    code = "def run():\n    raise ValueError('no such luck')"

    def sample(parents, samples, step):
        return [(parents[0], _rollout("plan", code, 0, 0, tokenizer)), (parents[0], _rollout("plan", code, 0, 1, tokenizer, cut=12))]

    fresh, edits = evaluate.measure(sample, Harmony(tokenizer), executor, samples=4)
    assert [s.score for s in fresh] == [None, None]
    assert edits == []
    output = capsys.readouterr().out
    assert re.search(r"\b0\.0%", output)
    assert "exception" in output
    assert "no such luck" in output


def test_edits_are_near_their_parent_and_other_programs_are_not():
    rng = random.Random(1)
    drawn = [programs.sample(rng) for _ in range(200)]
    codes = [programs.render(p) for p in drawn]
    edits = [evaluate.similarity(code, programs.render(programs.mutate(p, rng)[0])) for p, code in zip(drawn, codes, strict=True)]
    unrelated = [evaluate.similarity(a, b) for a, b in itertools.pairwise(codes)]
    assert min(edits) >= evaluate.NEAR > max(unrelated)


@pytest.mark.slow
def test_parents_are_distinct_valid_programs(tokenizer, executor):
    fresh = evaluate.run_programs(
        [
            (evaluate.SEED, _rollout("plan", code, 0, i, tokenizer))
            for i, code in enumerate(["def run():\n    return 1", *[programs.render(programs.sample(random.Random(s))) for s in (5, 5, 6)]])
        ],
        Harmony(tokenizer),
        executor,
    )
    parents = evaluate.choose_parents(fresh, 5)
    assert [p.code for p in parents] == [fresh[1].code, fresh[3].code]
    assert [p.score for p in parents] == [fresh[1].score, fresh[3].score]
    assert all(not p.is_seed for p in parents)
    assert len(evaluate.choose_parents(fresh, 1)) == 1
