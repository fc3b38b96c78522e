"""Whole runs in this process with every option of the method: each value of each choice is in at least one run.

The runs are slow tests. By default, a test checks that each choice has a run.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("faults")))

import jax
import numpy as np
import pandas as pd
import phrase_config
import pytest
import remainders
import tiny_run
from phrase_model import EDIT_FOLLOWERS, EDIT_PHRASES, write_phrase_model
from remainders_problem import SEED_PROGRAM

from discover_jax import config as settings
from discover_jax import main, preparation, typed_settings
from discover_jax.apprentice.preset import apprentice_on_cpu
from discover_jax.archive.selectors import SELECTORS
from discover_jax.execution import sandbox_spec
from discover_jax.learning.advantages import ESTIMATORS, SCALE_FREE
from discover_jax.learning.estimates import groups_with_too_few
from discover_jax.learning.losses import LOSSES, REDUCTIONS
from discover_jax.learning.signals import COPIES, DUPLICATES, FAILURES, Signals
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.console import QuietConsole
from discover_jax.runs.summary import scale_warning
from discover_jax.tasks.configured import prepare_tasks
from discover_jax.tasks.rewards import TRANSFORMS
from discover_jax.text.harmony import Harmony
from discover_jax.text.prompts import ANSWERS, IDEAS, STYLES, build_prompt
from discover_jax.text.tokenizer import load_tokenizer
from discover_jax.types import SEED, RunKind

SEVERAL = "the paper's on several competitions"
USERS = "full prompts of a user's competitions"
PHRASES = "the paper's on several of a user's competitions"
EDITS = "answers as edits"
PAPER = {
    "reuse.sampler": "puct",
    "train.advantage": "entropic_adaptive",
    "train.kl_coefficient": 0.1,
    "train.loss": "ppo",
    "train.num_substeps": 2,
}
RUNS = {
    SEVERAL: {"task.competition": "digits-parity, breast-cancer, diabetes", "sampling.thinking_tokens": 2, "train.waves": 2, **PAPER},
    PHRASES: {"task.competition": "negated.py, inverse.py, ranked.py", **PAPER},
    USERS: {
        "task.competition": "negated.py, inverse.py, ranked.py, hopeless.py",
        "groups": 4,
        "sampling.slots": 12,
        "sampling.draft_tokens": 15,  # no batch is small enough
        "prompt.style": "full",
        "prompt.ideas": 2,
        "prompt.error_chars": 600,
        "prompt.stdout_chars": 100,
        "prompt.reasoning_effort": "low",
        "train.max_grad_norm": 1e-3,
        "train.replay_routing": False,
    },
    EDITS: {"task.competition": "remainders_problem.py", "prompt.style": "full", "prompt.answer": "edits", "prompt.inspirations": 1},
    "variety": {
        "reuse.fresh": 0.5,
        "reuse.distinct": True,
        "train.advantage": "entropic_loo",
        "train.loss": "truncated_importance_sampling",
        "train.reduction": "sequence_mean",
        "sampling.temperature_spread": 0.3,
        "sampling.draft_tokens": 3,
        "diversity.novelty_bonus": 0.1,
        "diversity.duplicates": "drop",
        "diversity.copies": "fail",
        "train.waves": 2,
    },
    "the best of k": {"train.advantage": "max_at_k", "train.max_at_k": 1, "train.max_at_k_last": 2},
    "the frontier": {"train.advantage": "frontier", "train.max_at_k": 2, "train.failures": "spread"},
    "no reuse": {
        "reuse.sampler": "fixed",
        "train.advantage": "mean_baseline",
        "train.loss": "reinforce",
        "train.reduction": "token_mean",
        "train.measure_kl": False,
        "train.failures": "spread",
        "task.reward": "holdout",
        "task.holdout_folds": 2,
        "task.stratified": False,
    },
}

# The phrase model's competition with other transforms, and one that none of its programs solves.
USERS_COMPETITIONS = {
    "negated": 'metric=ERROR, transform="negate", failure_reward=-2.0',
    "inverse": 'metric=ERROR, transform="inverse", failure_reward=0.0',
    "ranked": 'transform="rank_in_group"',
    "hopeless": 'metric=Metric("accuracy", higher_is_better=True, function=only_twos), prepare=twos, description=LONG',
}
COMPETITION_FILE = """\
import dataclasses

{remainders}

ERROR = Metric("error", higher_is_better=False, function=lambda answers_R, predictions_R: 1.0 - _accuracy(answers_R, predictions_R))


LONG = "Predict `y` from `id`." + " It is as long as what others say of their last program." * 8


def only_twos(answers_R, predictions_R):
    if not (predictions_R == 2).all():
        raise ValueError("predictions must be 2" + ", and nothing but 2" * 20)
    return 0.5


def twos(raw, public, private):
    prepare(raw, public, private)
    path = public / "sample_submission.csv"
    pd.read_csv(path).assign(y=2).to_csv(path, index=False)


COMPETITION = dataclasses.replace(COMPETITION, id="{id}", {changes})
"""


class Notes(QuietConsole):
    """Records notes."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def apprentice_config():
    config = settings.default_config()
    config.task.competition = "digits-parity"
    apprentice_on_cpu(config)
    config.groups, config.group_size, config.train.steps = 2, 3, 2
    config.sampling.slots, config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = 6, 512, 384
    return config


def phrases_config(root):
    """Brief prompts and three of the competition files."""
    users_config(root)  # writes them and the model
    config = phrase_config.get_config(str(root / "model"))
    config.train.steps = 2
    config.update_from_flattened_dict(PAPER)
    config.task.competition = ", ".join(str(root / path) for path in RUNS[PHRASES]["task.competition"].split(", "))
    return config


def users_config(root):
    """Four competition files, and a prompt budget that fits all but the prompts of `hopeless`, with their long errors."""
    if not (root / "model").exists():
        write_phrase_model(root / "model")
        for id, changes in USERS_COMPETITIONS.items():
            text = COMPETITION_FILE.format(remainders=Path(remainders.__file__).read_text(), id=id, changes=changes)
            (root / f"{id}.py").write_text(text)
    config = phrase_config.get_config(str(root / "model"))
    config.train.steps = 2
    config.update_from_flattened_dict(RUNS[USERS])
    config.task.competition = ", ".join(str(root / f"{id}.py") for id in USERS_COMPETITIONS)
    tasks = prepare_tasks(config.task, folder=root / "tasks", seed=0)
    chat = Harmony(load_tokenizer(root / "model"), config.prompt.reasoning_effort)
    config.sampling.max_prompt_tokens = 100_000
    first = [build_prompt(task, SEED, (), typed_settings.prompt_settings(config), chat, group=0, step=0) for task in tasks]
    config.sampling.max_prompt_tokens = max(len(prompt.tokens_P) for prompt in first) + 350
    return config


def edits_config(root):
    """A problem with a seed program, and a phrase model that edits it."""
    write_phrase_model(root / "edits", phrases=EDIT_PHRASES, followers_of=EDIT_FOLLOWERS)
    config = phrase_config.get_config(str(root / "edits"))
    config.train.steps = 2
    config.update_from_flattened_dict(RUNS[EDITS])
    config.task.competition = str(Path(remainders.__file__).with_name(RUNS[EDITS]["task.competition"]))
    config.sampling.max_prompt_tokens = 8192  # the tokenizer has no words of prompts
    return config


def run(folder, config, kind=RunKind.TRAIN, **changes):
    config.name = "options"
    with config.unlocked():
        for name, value in changes.items():
            assert name in settings.settings()
            config.update_from_flattened_dict({name: value})
    console = Notes()
    main.run(settings.validate(config), folder, console=console, kind=kind)
    return rows(folder / "journal.jsonl"), rows(folder / "metrics.jsonl"), console.notes


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setattr(sandbox_spec, "PRELOAD", ())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def results(root):
    """Runs by name, each started when it is first requested."""
    done = {}

    def result(name):
        if name not in done:
            own = {USERS: users_config, PHRASES: phrases_config, EDITS: edits_config}
            config = own.get(name, lambda _: apprentice_config())(root)
            changes = {} if name in own else RUNS[name]
            done[name] = (root / name, *run(root / name, config, **changes))
        return done[name]

    return result


def test_runs_use_every_choice():
    """Settings that a run does not set have their defaults, which count as used."""
    known = settings.settings()
    tables = {
        "reuse.sampler": SELECTORS,
        "train.advantage": ESTIMATORS,
        "train.loss": LOSSES,
        "train.reduction": REDUCTIONS,
        "train.failures": FAILURES,
        "diversity.duplicates": DUPLICATES,
        "diversity.copies": COPIES,
        "task.reward": ("grade", "holdout"),
        "prompt.style": STYLES,
        "prompt.answer": ANSWERS,
    }
    brief = {"prompt.style": "brief"}  # needed by the apprentice
    for name, table in tables.items():
        assert set(known[name].choices) == set(table)
        assert {(brief | changes).get(name, known[name].default) for changes in RUNS.values()} == set(table)
    bundled = {"identity", "log"}  # the transforms in SEVERAL
    assert bundled | {name for name in TRANSFORMS if any(f'"{name}"' in changes for changes in USERS_COMPETITIONS.values())} == set(
        TRANSFORMS
    )
    off_by_default = ("sampling.thinking_tokens", "sampling.temperature_spread", "prompt.ideas", "reuse.fresh", "reuse.distinct")
    off_by_default += ("train.kl_coefficient", "train.max_grad_norm", "diversity.novelty_bonus", "prompt.inspirations")
    off_by_default += ("sampling.draft_tokens",)
    for name in off_by_default:
        assert not known[name].default
        assert any(changes.get(name) for changes in RUNS.values())
    assert any(changes.get("train.waves", 1) > 1 for changes in RUNS.values())
    for name in ("train.replay_routing", "train.measure_kl"):
        assert known[name].default
        assert any(changes.get(name) is False for changes in RUNS.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_end_to_end(results, name):
    _, journal, metrics, notes = results(name)
    assert len(journal) == 2 * 3 * RUNS[name].get("groups", 2)
    assert [row["step"] for row in metrics] == [0, 1]
    assert all(row["logprob_gap/mean"] < 1e-5 for row in metrics)
    tasks = {row["task"] for row in journal} - {"hopeless"}
    assert {row["task"] for row in journal if row["outcome"] == "ok"} == tasks
    assert [row["update/skipped"] for row in metrics] == [0, 0]
    substeps = RUNS[name].get("train.num_substeps", 1)
    assert [row["adapter_step"] for row in journal] == [0] * (len(journal) // 2) + [substeps] * (len(journal) // 2)
    if "train.kl_coefficient" in RUNS[name]:
        assert metrics[0]["kl_base/mean"] == pytest.approx(0.0, abs=1e-5)  # the initial adapter is zero
    if RUNS[name].get("reuse.sampler") == "fixed":
        assert {row["parent_id"] for row in journal} == {"seed"}
        assert "kl_base/mean" not in metrics[0]
    if "reuse.fresh" in RUNS[name]:
        assert {row["parent_id"] for row in journal if row["group"] == 1} == {"seed"}
    drafts = 0 < RUNS[name].get("sampling.draft_tokens", 0) < 15
    assert all((row.get("sample/draft_tokens_per_pass") is not None) == drafts for row in metrics)
    assert any("draft_tokens = 15 has no effect" in note for note in notes) == (name == USERS)
    # The apprentice needs three tokens to start an answer, so two are never enough.
    assert {row["sample/forced_frac"] for row in metrics} == {1.0 if "sampling.thinking_tokens" in RUNS[name] else 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", [PHRASES, SEVERAL])
def test_groups_of_several_competitions_alternate(results, name):
    folder, journal, metrics, _ = results(name)
    ids = [path.removesuffix(".py") for path in RUNS[name]["task.competition"].split(", ")]
    assert [journal[group * 3]["task"] for group in range(4)] == [*ids, ids[0]]
    assert all(row["parent_id"] == "seed" or row["task"] == journal[0]["task"] for row in journal)
    known = {row["id"]: row["task"] for row in journal}
    assert all(known.get(row["parent_id"], row["task"]) == row["task"] for row in journal)  # a parent has the same competition
    assert {f"task/{id}/best_score" for id in ids} <= metrics[-1].keys()
    disclosed = json.loads((folder / "disclosure.json").read_text())["competitions"]
    assert [each["id"] for each in disclosed] == ids
    for id in ids:
        assert (folder / "best" / id / "solution.py").exists()


@pytest.mark.slow
def test_journal_and_best_program_come_from_the_edits(results):
    """The replies are in rollouts/. Each is applied by hand to the program of its parent."""
    folder, journal, _, _ = results(EDITS)
    programs = {"seed": SEED_PROGRAM.strip()} | {row["id"]: row["code"] for row in journal}
    replies = pd.concat(pd.read_parquet(path) for path in sorted((folder / "rollouts").iterdir())).set_index("id")["reply"]
    flips = failures = 0
    for row in journal:
        expected, reply = programs[row["parent_id"]], replies[row["id"]]
        comment = re.search(r"=======\n(def run.*\n.*)\n>>>>>>> REPLACE", reply)
        flip, parent_flipped = "[0] * 40" in reply, "[0]" in expected
        if comment is not None:
            expected = expected.replace("def run():", comment[1])
        if flip:
            expected = expected.replace("[1]", "[0]")
            flips += 1
        if comment is None and "```python" in reply:
            expected = "def run():\n    return [1] * 40"
        elif comment is None or (flip and parent_flipped):
            expected = None
            failures += 1
        assert row["code"] == expected
        if comment is not None and row["outcome"] == "format_error":
            assert row["detail"].startswith("Edit 2 of 2: ")
    assert flips
    best = max((row for row in journal if row["outcome"] == "ok"), key=lambda row: row["reward"])
    assert (folder / "best" / "solution.py").read_text().strip() == best["code"]


@pytest.mark.slow  # tests/tasks and tests/learning test the transforms
def test_transforms_make_rewards_and_signals(results):
    """By hand, from the scores and advantages that the run recorded."""
    folder, journal, _, notes = results(USERS)
    scored = [row for row in journal if row["score"] is not None]
    by_hand = {"negated": lambda score: -score, "inverse": lambda score: 1 / (1 + score), "ranked": lambda score: score}
    for row in scored:
        assert row["reward"] == pytest.approx(by_hand[row["task"]](row["score"]))
    (ranked,) = (group for group in range(4) if journal[group * 3]["task"] == "ranked")
    shown = pd.read_parquet(folder / "rollouts" / "step-000000.parquet").to_dict("records")[ranked * 3 : ranked * 3 + 3]
    below = np.array([[(a["reward"] > b["reward"]) + (a["reward"] == b["reward"]) / 2 for b in shown] for a in shown]).sum(1) - 0.5
    weights = np.exp(2.0 * below / 2)
    assert len({row["reward"] for row in shown}) > 1
    np.testing.assert_allclose([row["advantage"] for row in shown], weights / weights.mean() - 1)
    (warning,) = (note for note in notes if "transform" in note and "config.train.advantage" in note)
    assert "negated: error, transform 'negate'" in warning


def test_warns_only_if_scales_differ(tmp_path):
    def tasks(competitions):
        config = apprentice_config()
        config.task.competition = competitions
        return prepare_tasks(config.task, folder=tmp_path / competitions, seed=0)

    shares, mixed = tasks("digits-parity"), tasks("digits-parity, breast-cancer, diabetes")
    for advantage in set(ESTIMATORS) - set(SCALE_FREE):
        said = scale_warning(mixed, advantage)
        assert said is not None
        assert "digits-parity: accuracy, transform 'identity'" in said
        assert f"config.train.advantage = {advantage!r}" in said
        assert scale_warning([*shares, *shares], advantage) is None  # both metrics are fractions of rows
    for advantage in SCALE_FREE:
        assert scale_warning(mixed, advantage) is None
    assert scale_warning(mixed[2:], "entropic") is None


def test_groups_with_too_few_distinct_programs_are_counted():
    """Constant groups do not count: no estimator learns from them."""
    values_K, all_K, two_K = np.array([0.5, 0.5, 0.75]), np.array([True, True, True]), np.array([True, False, True])
    none_K = np.zeros(3, bool)
    signals = [Signals(values_K, all_K, none_K), Signals(values_K, two_K, none_K), Signals(np.full(3, 0.5), two_K, none_K)]
    assert {name: groups_with_too_few(signals, name) for name in ESTIMATORS} == {
        name: int(name == "entropic_adaptive") for name in ESTIMATORS
    }


@pytest.mark.slow  # tests/text/test_prompts.py tests shortened prompts
def test_shortened_prompts_are_reported_and_counted(results):
    folder, _, metrics, notes = results(USERS)
    assert [row["prompt/shortened"] for row in metrics] == [0, 1]
    (told,) = (note for note in notes if "shortened" in note)
    assert "1 of 4 prompts were shortened to" in told
    assert re.search(r"Group 3\b.*\bseed\b.*\b0 of 0\b.*\b236 of 473\b", told)
    first, later = (list(pd.read_parquet(folder / "rollouts" / f"step-{step:06d}.parquet")["prompt"])[::3] for step in (0, 1))
    assert "The last attempt failed:\n\n```\n[...]\n" in later[3]
    assert all("Reasoning: low" in prompt and "failed" not in prompt for prompt in first)
    for prompt in later[:3]:
        assert "# Your last program" in prompt
        assert sum(idea in prompt for idea in IDEAS) == 2


def check_continuing_one_competition(results, monkeypatch, folder, name, id, config, **changes):
    """Continues one of a run's competitions, with its archive, journal, adapter and optimiser."""
    source, journal, _, _ = results(name)
    stands = []
    restore = preparation.restore

    def restore_and_keep(*arguments, **options):
        stand = restore(*arguments, **options)
        stands.append(jax.tree.map(np.array, stand.train_state))  # the update donates the arrays
        return stand

    monkeypatch.setattr(preparation, "restore", restore_and_keep)
    further, metrics, _ = run(folder, config, **{"train.resume_from": str(source), "train.steps": 1, **changes})
    new = further[len(journal) :]
    assert further[: len(journal)] == journal
    assert {(row["task"], row["step"]) for row in new} == {(id, 2)}
    mine = [row for row in journal if row["task"] == id and row["score"] is not None]
    assert {row["parent_id"] for row in new} <= {row["id"] for row in mine} | ({"seed"} if config.reuse.sampler == "puct" else set())
    assert (
        metrics[-1]["best/score"] == max([*mine, *(row for row in new if row["score"] is not None)], key=lambda row: row["reward"])["score"]
    )

    # The adapter is that of the other run after its last step: count of updates, weights and optimiser.
    updates = 2 * RUNS[name].get("train.num_substeps", 1)
    assert {row["adapter_step"] for row in new} == {updates}
    (state,) = stands
    earlier = Checkpoints(source / "checkpoints", keep=1, every=0, read_only=True)
    theirs, _ = earlier.restore(1, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state))
    earlier.close()
    assert theirs is not None
    assert int(theirs.step) == int(state.step) == updates
    ours, others = jax.tree.leaves(state), jax.tree.leaves(theirs)
    assert len(ours) == len(others)
    assert all(np.array_equal(a, b) for a, b in zip(ours, others, strict=True))
    # The adapter is trained: half of a new adapter's matrices are zero.
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(state.lora))

    # A search from the same state gives the same prompts to the base model, so only learning differs.
    base_folder = folder.with_name("base")
    base, _, _ = run(base_folder, config, kind=RunKind.SEARCH, **{"train.resume_from": str(source), "train.steps": 1, **changes})
    assert stands[1] is None
    assert {row["adapter_step"] for row in base[len(journal) :]} == {0}
    prompts, same = (list(pd.read_parquet(place / "rollouts" / "step-000002.parquet")["prompt"]) for place in (folder, base_folder))
    assert prompts == same


@pytest.mark.slow  # runs/test_source.py tests what a run takes from another one
def test_continue_one_of_a_users_competitions(results, root, tmp_path, monkeypatch):
    changes = {"task.competition": str(root / "negated.py"), "groups": 1}
    check_continuing_one_competition(results, monkeypatch, tmp_path / "alone", PHRASES, "negated", phrases_config(root), **changes)


@pytest.mark.slow
def test_continue_one_of_several_competitions(results, tmp_path, monkeypatch):
    check_continuing_one_competition(results, monkeypatch, tmp_path / "alone", SEVERAL, "digits-parity", apprentice_config(), groups=1)


@pytest.mark.slow
def test_killed_puct_run_matches_the_uninterrupted_one(tmp_path):
    """kill -9 during the third step, when programs have children; then the same command again."""
    write_phrase_model(tmp_path / "model")
    environment = tiny_run.environment(tmp_path)

    def command(workdir):
        return [*tiny_run.command(tmp_path, workdir), "--config.reuse.sampler=puct", "--config.groups=3"]

    done = subprocess.run(command(tmp_path / "unbroken"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    learned = 0
    for line in process.stdout:
        learned += line.startswith("phase learning")
        if learned == 3:
            break
    process.kill()
    process.stdout.close()
    assert process.wait() == -9
    done = subprocess.run(command(tmp_path / "killed"), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed after step 2" in done.stdout
    expected, found = tiny_run.results(tmp_path / "unbroken"), tiny_run.results(tmp_path / "killed")
    assert found == expected
    parents = {row["parent_id"] for row in rows(tmp_path / "killed" / "journal.jsonl")}
    assert len(parents - {"seed"}) > 2  # puct had several candidates
