"""The config table: the report's values, and errors that name every wrong setting."""

import re
import runpy
from pathlib import Path

import pytest

from discover_jax import config as settings
from discover_jax.archive.selectors import kept_children
from discover_jax.config.page import settings_page
from discover_jax.config.sampling import FORCED_TOKENS
from discover_jax.engine import microbatch_rows
from discover_jax.exceptions import ConfigError
from discover_jax.policy import APPRENTICE
from discover_jax.text.harmony import answer_forced
from discover_jax.text.tokenizer import load_tokenizer


def _load(path, *argument):
    return runpy.run_path(path)["get_config"](*argument)


@pytest.mark.parametrize(("run", "shape"), [("run1", (2, 2, 10)), ("run2", (4, 2, 10)), ("run3", (16, 8, 17)), ("run4", (16, 8, 6))])
def test_the_reports_runs_have_the_reports_values(run, shape):
    config = settings.validate(_load("configs/spaceship.py", run))
    assert (config.groups, config.group_size, config.train.steps) == shape
    # Sections 5.1 and 5.2 of the report, typed by hand.
    expected = {
        "lora.attention_rank": 32,
        "train.learning_rate": 4e-5,
        "train.adam_b1": 0.9,
        "train.adam_b2": 0.95,
        "train.advantage": "entropic",
        "train.beta": 2.0,
        "train.loss": "importance_sampling",
        "sampling.max_new_tokens": 26_000,
        "sampling.temperature": 1.0,
        "task.competition": "spaceship-titanic",
        "task.reward": "grade",
        "execution.seconds": 300,
        "execution.cores": 2,
        "reuse.sampler": "greedy",
        "reuse.epsilon": 0.125,
    }
    flat = settings.flatten(config)
    assert {name: flat[name] for name in expected} == expected
    assert bool(flat["train.resume_from"]) == (run == "run4")


@pytest.mark.parametrize("argument", [("configs/quickstart.py",), ("configs/spaceship.py",), ("configs/spaceship.py", "apprentice")])
def test_shipped_configs_are_valid(argument):
    settings.validate(_load(*argument))


def test_every_setting_has_a_meaning_and_a_default_within_its_bounds():
    config = settings.default_config()
    config.prompt.style = "brief"  # the default weights are the apprentice, which knows only this style
    settings.validate(config)
    assert all(row.meaning for row in settings.settings().values())


def test_every_rule_names_settings_that_exist():
    known = settings.settings()
    for name, row in known.items():
        for rule in settings.rules_of(name, row):
            assert set(rule.uses) <= known.keys(), name
            assert set(re.findall(r"config\.([a-z_.]*[a-z_])", rule.fix)) <= known.keys() | {"config"}, name


def test_first_tier_has_about_a_dozen_settings():
    first = {name for name, row in settings.settings().items() if row.tier == 1}
    assert first == {
        *("task.competition", "task.raw", "task.reward", "model.weights", "groups", "group_size"),
        *("train.steps", "train.learning_rate", "train.advantage", "reuse.sampler"),
        *("sampling.max_prompt_tokens", "sampling.max_new_tokens", "mesh.data", "mesh.expert", "mesh.tensor"),
    }
    assert {row.tier for row in settings.settings().values()} == {1, 2}


def test_settings_page_is_current():
    page = Path("docs/settings.md").read_text()
    assert page == settings_page(), "run: python -m discover_jax.config --write docs/settings.md"
    assert all(page.count(f"| `{name}` |") == 1 for name in settings.settings())


def problems_of(config, **options):
    """The lines of the error by setting."""
    with pytest.raises(ConfigError) as error:
        settings.validate(config, **options)
    lines = re.findall(r"^  - (config\.([a-z_0-9.]*[a-z_0-9]).*)$", str(error.value), re.MULTILINE)
    return {name: line for line, name in lines}


def test_unknown_key_is_refused_with_the_nearest_name():
    config = settings.default_config()
    with pytest.raises(AttributeError):
        config.train.step = 3
    with config.unlocked():
        config.train.step = 3
    assert "config.train.steps" in problems_of(config)["train.step"]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("train.steps", 0, ("at least 1", "got 0")),
        ("train.learning_rate", float("nan"), ("at least 0", "got nan")),
        ("reuse.epsilon", 1.5, ("at most 1", "got 1.5")),
        ("task.reward", "luck", ("'grade', 'holdout'", "got 'luck'")),
        ("task.holdout_folds", 5, ("config.task.reward = 'grade'",)),
        ("task.stratified", False, ("config.task.reward = 'grade'",)),
        ("task.reuse_output", "on", ("config.prompt.style = 'brief'",)),
        ("task.grader", "kaggle", ("'native', 'mlebench'",)),
        ("seed", True, ("int", "bool")),
        ("execution.backend", "unsafe-subprocess", ("config.execution.allow_weaker = False",)),
        ("execution.backend", "docker", ("'bubblewrap', 'ray', 'unsafe-subprocess'",)),
        ("execution.ray_address", "local", ("config.execution.backend = 'bubblewrap'",)),
        ("group_size", 1, ("at least 2",)),
        ("reuse.exploration", 2.0, ("config.reuse.sampler = 'greedy'",)),
        ("train.clip_high", 0.3, ("config.train.loss",)),
        ("train.truncate", 5.0, ("config.train.loss",)),
        ("train.num_substeps", 1000, ("config.groups = 4", "config.group_size = 8")),
        ("train.waves", 5, ("config.groups = 4", "Lower it")),
        ("sampling.temperature_spread", 0.99, ("0.95",)),
        ("prompt.ideas", 2, ("config.prompt.style",)),
        ("prompt.stdout_chars", 100, ("config.prompt.style",)),
        ("prompt.error_chars", 0, ("config.prompt.style",)),
        ("prompt.reasoning_effort", "low", ("config.prompt.style",)),
        ("sampling.thinking_closing", "Now.", ("config.sampling.thinking_tokens",)),
        ("sampling.thinking_tokens", 510, ("config.sampling.max_new_tokens = 512",)),
        ("reuse.children", -2, ("at least -1",)),
        ("reuse.fresh", 1.0, ("config.groups = 4", "config.reuse.sampler = 'fixed'")),
        ("reuse.fresh", 0.9, ("config.groups = 4", "config.reuse.sampler = 'fixed'")),
        ("reuse.fresh", 0.1, ("config.groups = 4",)),
        ("train.row_tokens", 16, ("config.sampling.max_prompt_tokens = 640", "config.sampling.max_new_tokens = 512")),
        ("prompt.style", "full", ("config.model.weights = 'apprentice'",)),
    ],
)
def test_error_names_the_setting_its_value_and_the_allowed_ones(name, value, allowed):
    config = _load("configs/quickstart.py")
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    problems = problems_of(config)
    assert problems.keys() == {name}
    assert repr(value) in problems[name]
    assert all(text in problems[name] for text in allowed), problems[name]


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"num_substeps": 3}, ("config.train.num_substeps = 3", "multiple")),
        ({"failures": "spread"}, ("config.train.failures = 'spread'", "programs of all groups", "config.train.failures = 'reward'")),
        ({"num_substeps": 4}, ()),
        ({"num_substeps": 2, "kl_coefficient": 0.1, "measure_kl": True}, ()),
        ({"reduction": "token_mean", "advantage": "frontier"}, ()),
    ],
)
def test_waves_are_refused_where_a_wave_cannot_be_learnt_by_itself(changes, allowed):
    config = _load("configs/quickstart.py")
    config.train.update({"waves": 4, **changes})
    if allowed:
        problems = problems_of(config)
        assert problems.keys() == {"train.waves"}
        assert all(text in problems["train.waves"] for text in allowed)
        config.train.waves = 1
    settings.validate(config)


@pytest.mark.parametrize(
    ("address", "known"), [("auto", True), ("10.0.0.1:6379", True), ("[::1]:6379", True), ("ray://h:1", False), ("", False)]
)
def test_addresses_of_ray_clusters(address, known):
    config = _load("configs/quickstart.py")
    config.execution.backend, config.execution.ray_address = "ray", address
    if known:
        settings.validate(config)
    else:
        assert problems_of(config).keys() == {"execution.ray_address"}


def test_all_problems_are_reported_together():
    config = _load("configs/quickstart.py")
    config.groups, config.train.steps = 0, 0
    assert problems_of(config).keys() == {"groups", "train.steps"}


def test_dry_run_accepts_meshes_and_weights_that_runs_refuse():
    config = _load("configs/spaceship.py")
    config.mesh.data, config.model.weights, config.model.shape = 8, "random", "gpt-oss-120b"
    assert settings.validate(config, for_run=False).mesh.data == 8
    assert problems_of(config).keys() == {"train.rows", "model.tokenizer"}
    config.group_size = 1
    assert problems_of(config, for_run=False).keys() == {"group_size"}


@pytest.mark.parametrize(("rows", "data", "derived"), [(0, 1, 1), (0, 8, 8), (3, 1, 3), (16, 8, 16)])
def test_rows_of_a_microbatch_follow_the_mesh_unless_they_are_set(rows, data, derived):
    config = _load("configs/quickstart.py")
    config.train.rows, config.mesh.data = rows, data
    assert microbatch_rows(settings.validate(config)) == derived


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"train.advantage": "entropic_adaptive", "group_size": 2}, "train.advantage"),
        ({"train.advantage": "entropic_adaptive", "train.beta": 3.0}, "train.beta"),
        ({"train.advantage": "max_at_k", "train.max_at_k": 4, "group_size": 4}, "train.max_at_k"),
        ({"train.advantage": "max_at_k", "train.max_at_k": 1, "train.max_at_k_last": 9, "group_size": 8}, "train.max_at_k_last"),
        ({"train.advantage": "max_at_k", "train.max_at_k_last": 2, "train.max_at_k_steps": 5, "train.steps": 4}, "train.max_at_k_steps"),
        ({"train.advantage": "max_at_k", "train.max_at_k_steps": 2}, "train.max_at_k_steps"),
        ({"train.advantage": "frontier", "train.max_at_k": 9, "group_size": 8}, "train.max_at_k"),
        ({"train.advantage": "frontier", "train.frontier_start": 4, "train.steps": 4}, "train.frontier_start"),
        ({"train.advantage": "frontier", "train.frontier_start": 2, "train.frontier_steps": 3, "train.steps": 4}, "train.frontier_steps"),
        ({"train.max_at_k": 3}, "train.max_at_k"),
        ({"train.frontier_base": "group"}, "train.frontier_base"),
        ({"train.failure_spread": 2.0}, "train.failure_spread"),
        ({"reuse.sampler": "fixed", "reuse.distinct": True}, "reuse.distinct"),
        ({"reuse.sampler": "fixed", "train.resume_from": "runs/other"}, "train.resume_from"),
        ({"reuse.sampler": "puct", "reuse.epsilon": 0.5}, "reuse.epsilon"),
        ({"reuse.sampler": "fixed", "reuse.children": 2}, "reuse.children"),
        ({"reuse.sampler": "fixed", "reuse.capacity": 10}, "reuse.capacity"),
        ({"reuse.distinct": True, "groups": 1}, "reuse.distinct"),
        ({"reuse.distinct": True, "groups": 3, "task.competition": "a, b, c"}, "reuse.distinct"),
        ({"reuse.fresh": 0.5, "groups": 3, "task.competition": "a, b, c"}, "reuse.fresh"),
        ({"train.kl_coefficient": 0.1, "train.measure_kl": False}, "train.kl_coefficient"),
        ({"model.shape": "gpt-oss-20b"}, "model.shape"),
        ({"lora.attention_rank": 0, "lora.expert_rank": 0, "lora.head_rank": 0, "lora.mlp_rank": 0}, "lora.attention_rank"),
        ({"tracking.project": "mine"}, "tracking.project"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes, name):
    config = _load("configs/quickstart.py")
    config.update_from_flattened_dict(changes)
    problems = problems_of(config)
    assert problems.keys() == {name}
    assert repr(changes.get(name, 0)) in problems[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"train.advantage": "max_at_k", "train.max_at_k": 3, "group_size": 4},
        {"train.advantage": "frontier", "train.max_at_k": 4, "group_size": 4, "train.frontier_start": 3, "train.steps": 4},
        {"train.failures": "spread", "train.failure_spread": 0.0},
        {"reuse.sampler": "puct", "reuse.children": 0},  # the paper's rule can be disabled
        {"reuse.children": 2},  # and used without puct
        {"reuse.fresh": 0.25, "reuse.distinct": True},
        {"reuse.distinct": True, "groups": 4, "task.competition": "a, b, c"},  # one of them has two groups
        {"reuse.fresh": 0.5, "groups": 4, "task.competition": "a, b, c"},
        {"sampling.thinking_tokens": 500, "sampling.thinking_closing": "Now."},
        {"train.kl_coefficient": 0.0, "train.measure_kl": False},
    ],
)
def test_unusual_options_with_an_effect_are_accepted(changes):
    config = _load("configs/quickstart.py")
    config.update_from_flattened_dict(changes)
    settings.validate(config)


def test_forced_answer_needs_at_least_the_tokens_of_the_rule():
    """The exact number depends on the tokenizer. The rule must not refuse values that would fit."""
    tokenizer = load_tokenizer(APPRENTICE)
    assert len(answer_forced("", tokenizer)) >= FORCED_TOKENS


@pytest.mark.parametrize("run", ["run1", "run2", "run3", "run4", "paper"])
def test_additions_to_the_method_are_off_in_the_reports_and_the_papers_runs(run):
    """The values are typed by hand, so that the test detects changed defaults."""
    flat = settings.flatten(settings.validate(_load("configs/spaceship.py", run)))
    off = {
        "diversity.novelty_bonus": 0.0,
        "diversity.duplicates": "keep",
        "diversity.copies": "keep",
        "diversity.copy_tolerance": 0.0,
        "reuse.distinct": False,
        "reuse.fresh": 0.0,
        "sampling.temperature_spread": 0.0,
        "prompt.ideas": 0,
        "train.max_grad_norm": 0.0,
    }
    assert {name: flat[name] for name in off} == off
    assert flat["train.kl_coefficient"] == (0.1 if run == "paper" else 0.0)
    # Only puct keeps just the two best children of a parent.
    assert kept_children(flat["reuse.sampler"], flat["reuse.children"]) == (2 if run == "paper" else 0)


def test_papers_setting():
    config = _load("configs/spaceship.py", "paper")
    settings.validate(config)
    assert (config.groups, config.group_size, config.train.steps) == (8, 64, 50)
    assert (config.train.advantage, config.train.kl_coefficient, config.reuse.sampler) == ("entropic_adaptive", 0.1, "puct")
    assert config.sampling.thinking_tokens > 0
