"""The config table: the report's values, and errors that name every wrong setting."""

import contextlib
import runpy

import pytest

from discover_jax import config as settings
from discover_jax.archive.selectors import kept_children
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
    # Section 5.1 and 5.2 of the report, typed in again by hand.
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


def test_unknown_key_is_refused_with_the_nearest_name():
    config = settings.default_config()
    with pytest.raises(AttributeError):
        config.train.step = 3
    with config.unlocked():
        config.train.step = 3
    with pytest.raises(ConfigError, match=r"config\.train\.step is not a setting; did you mean config\.train\.steps"):
        settings.validate(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.steps", 0, "too small"),
        ("train.learning_rate", float("nan"), "too small"),
        ("reuse.epsilon", 1.5, "too large"),
        ("task.reward", "luck", "allowed: grade, holdout"),
        ("task.holdout_folds", 5, "folds are parts of the reward 'holdout'"),
        ("task.grader", "kaggle", "allowed: native, mlebench"),
        ("seed", True, "must be a int"),
        ("execution.backend", "unsafe-subprocess", "allow_weaker"),
        ("execution.backend", "docker", "allowed: bubblewrap, ray, unsafe-subprocess"),
        ("execution.ray_address", "local", r"ray_address = 'local' has no effect.*set config\.execution\.backend='ray'"),
        ("group_size", 1, "group of one"),
        ("reuse.exploration", 2.0, r"reuse\.exploration = 2\.0 has no effect"),
        ("train.clip_high", 0.3, r"train\.clip_high = 0\.3 has no effect"),
        ("train.truncate", 5.0, r"train\.truncate = 5\.0 has no effect"),
        ("train.num_substeps", 1000, "more than a step's 32 rollouts"),
        ("sampling.temperature_spread", 0.99, "too large"),
        ("prompt.ideas", 2, r"prompt\.ideas = 2 has no effect"),
        ("prompt.stdout_chars", 100, r"prompt\.stdout_chars = 100 has no effect"),
        ("prompt.error_chars", 0, r"prompt\.error_chars = 0 has no effect"),
        ("prompt.reasoning_effort", "low", r"prompt\.reasoning_effort = 'low' has no effect"),
        ("sampling.thinking_closing", "Now.", r"sampling\.thinking_closing = 'Now\.' has no effect"),
        ("sampling.thinking_tokens", 508, r"no room for an answer.*raise max_new_tokens to more than 515"),
        ("reuse.children", -2, "too small"),
        ("reuse.fresh", 1.0, r"starts every group from nothing.*reuse\.sampler='fixed'"),
        ("reuse.fresh", 0.9, r"with config\.groups = 4 starts every group from nothing"),
        ("reuse.fresh", 0.1, "rounds to no group"),
        ("train.row_tokens", 16, "longest rollout"),
        ("prompt.style", "full", "brief"),
        ("mesh.data", 2, r"train\.rows = 1 with config\.mesh\.data = 2.*Set rows to 2"),
    ],
)
def test_bad_values_and_contradictions_say_what_is_allowed(name, value, message):
    config = _load("configs/quickstart.py")
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(ConfigError, match=message) as error:
        settings.validate(config)
    assert name.split(".")[0] in str(error.value)


@pytest.mark.parametrize(
    ("address", "known"), [("auto", True), ("10.0.0.1:6379", True), ("[::1]:6379", True), ("ray://h:1", False), ("", False)]
)
def test_addresses_of_ray_clusters(address, known):
    config = _load("configs/quickstart.py")
    config.execution.backend, config.execution.ray_address = "ray", address
    with contextlib.nullcontext() if known else pytest.raises(ConfigError, match="allowed: auto, local, or HOST:PORT"):
        settings.validate(config)


def test_all_problems_are_named_at_once():
    config = _load("configs/quickstart.py")
    config.groups, config.train.steps = 0, 0
    with pytest.raises(ConfigError) as error:
        settings.validate(config)
    assert "config.groups" in str(error.value)
    assert "config.train.steps" in str(error.value)


def test_a_dry_run_may_ask_about_meshes_and_weights_that_no_run_takes():
    config = _load("configs/spaceship.py")
    config.mesh.data, config.model.weights, config.model.shape = 8, "random", "gpt-oss-120b"
    assert settings.validate(config, for_run=False).mesh.data == 8
    with pytest.raises(ConfigError, match="Set rows to 8") as error:
        settings.validate(config)
    assert "brings no tokenizer" in str(error.value)
    config.group_size = 1
    with pytest.raises(ConfigError, match="group of one"):
        settings.validate(config, for_run=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.advantage": "entropic_adaptive", "group_size": 2}, "no beta solves its equation"),
        ({"train.advantage": "entropic_adaptive", "train.beta": 3.0}, r"train\.beta = 3\.0 has no effect"),
        ({"reuse.sampler": "fixed", "reuse.distinct": True}, "starts every group from nothing"),
        ({"reuse.sampler": "puct", "reuse.epsilon": 0.5}, r"reuse\.epsilon = 0\.5 has no effect"),
        ({"reuse.sampler": "fixed", "reuse.children": 2}, r"reuse\.children = 2 has no effect"),
        ({"reuse.sampler": "fixed", "reuse.capacity": 10}, r"reuse\.capacity = 10 has no effect"),
        ({"reuse.distinct": True, "groups": 1}, r"reuse\.distinct = True with config\.groups = 1 has no effect"),
        ({"reuse.distinct": True, "groups": 3, "task.competition": "a, b, c"}, "= 3 for 3 competitions has no effect"),
        ({"reuse.fresh": 0.5, "groups": 3, "task.competition": "a, b, c"}, "for 3 competitions starts every group from nothing"),
        ({"train.kl_coefficient": 0.1, "train.measure_kl": False}, r"kl_coefficient = 0\.1 with config\.train\.measure_kl = False"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes, message):
    config = _load("configs/quickstart.py")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        settings.validate(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"reuse.sampler": "puct", "reuse.children": 0},  # the paper's rule can be left out
        {"reuse.children": 2},  # and taken without puct
        {"reuse.fresh": 0.25, "reuse.distinct": True},
        {"reuse.distinct": True, "groups": 4, "task.competition": "a, b, c"},  # one of them has two groups
        {"reuse.fresh": 0.5, "groups": 4, "task.competition": "a, b, c"},
        {"sampling.thinking_tokens": 500, "sampling.thinking_closing": "Now."},
        {"train.kl_coefficient": 0.0, "train.measure_kl": False},
    ],
)
def test_options_that_look_odd_but_do_something_are_taken(changes):
    config = _load("configs/quickstart.py")
    config.update_from_flattened_dict(changes)
    settings.validate(config)


def test_what_forces_an_answer_takes_at_least_what_the_config_reckons_with():
    """The exact number depends on the tokenizer; the rule must refuse nothing that would fit."""
    tokenizer = load_tokenizer(APPRENTICE)
    assert len(answer_forced("", tokenizer)) >= settings._FORCED_TOKENS


@pytest.mark.parametrize("run", ["run1", "run2", "run3", "run4", "paper"])
def test_what_this_project_adds_to_the_method_is_off_in_the_reports_and_the_papers_runs(run):
    """Values typed in by hand, so that changed defaults are noticed, too."""
    flat = settings.flatten(settings.validate(_load("configs/spaceship.py", run)))
    off = {
        "diversity.novelty_bonus": 0.0,
        "diversity.duplicates": "keep",
        "reuse.distinct": False,
        "reuse.fresh": 0.0,
        "sampling.temperature_spread": 0.0,
        "prompt.ideas": 0,
        "train.max_grad_norm": 0.0,
    }
    assert {name: flat[name] for name in off} == off
    assert flat["train.kl_coefficient"] == (0.1 if run == "paper" else 0.0)
    # The two best children of a parent are part of puct, and of nothing else.
    assert kept_children(flat["reuse.sampler"], flat["reuse.children"]) == (2 if run == "paper" else 0)


def test_the_paper_s_setting():
    config = _load("configs/spaceship.py", "paper")
    settings.validate(config)
    assert (config.groups, config.group_size, config.train.steps) == (8, 64, 50)
    assert (config.train.advantage, config.train.kl_coefficient, config.reuse.sampler) == ("entropic_adaptive", 0.1, "puct")
    assert config.sampling.thinking_tokens > 0
