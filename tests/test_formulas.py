"""The memory of absent machines without their compiler or kernels: by formulas, and never by code that the run would not use."""

import re

import pytest

from discover_jax import dry_run, formulas, machines
from discover_jax.config import default_config
from discover_jax.exceptions import CapacityError
from discover_jax.machines import Machine, speeds_of
from discover_jax.models.families import SHAPES

H200, V5P = int(0.9 * 143_771 * 2**20), int(95.73 * 2**30)


def _config(shape="gpt-oss-120b", **settings):
    config = default_config()
    config.model.weights, config.model.shape = "random", shape
    for name, value in settings.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


def _machine(name="h200", memory=H200, exact=False, devices=1):
    platform = speeds_of(name).platform
    return Machine(f"{devices} x {name}", [None] * devices, memory, "", platform, exact=exact, speeds=speeds_of(name))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a dry run for an absent machine, and returns whether it fits and what it prints. Nothing may be compiled."""

    def call(config, machine, learn=True):
        def compile(*_, **__):
            raise AssertionError("compiled the references, which the run would not use")

        monkeypatch.setattr(dry_run, "find_machine", lambda name, needed: machine)
        monkeypatch.setattr(dry_run, "needs", compile)
        fits = dry_run.run(config, "another", learn=learn)
        return fits, capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    ("config", "machine", "gigabytes"),
    [
        # Measured peaks and those of the TPU compiler: see test_meshes.
        (_config(train__row_tokens=34_192), _machine(), 117.3),
        (_config(mesh__expert=2, train__rows=2, train__row_tokens=32_768 + 1424), _machine(devices=2), 86.9),
        (_config(model__remat="pairs", train__row_tokens=34_192), _machine(), 100.7),
        (
            _config(mesh__expert=8, train__rows=8, train__row_tokens=34_192),
            _machine("v5p", V5P, devices=8),
            53.9,  # 5% above the compiler's figure (docs/scaling.md)
        ),
    ],
)
def test_without_a_compiler_the_formulas_decide(run, config, machine, gigabytes):
    fits, text = run(config, machine)
    assert fits
    assert dry_run_fits(text)
    row = re.search(r"^update +gradient.* ([\d.]+) <- peak$", text, re.MULTILINE)
    assert float(row[1]) == pytest.approx(gigabytes, rel=0.03)
    assert re.search(r"figures +estimates by formulas, since the (GPU|TPU) compiler is not installed", text)


def dry_run_fits(text: str) -> bool:
    return re.search(r"(?i)\bfits\b", text) is not None and re.search(r"(?i)\bnot fit\b|unknown", text) is None


def test_without_kernels_a_compiler_is_not_enough(run, monkeypatch):
    monkeypatch.setattr(formulas, "find_kernel", lambda *_: (None, "the package jax_triton cannot be imported"))
    fits, text = run(_config(), _machine(exact=True))
    assert fits
    assert "since the package jax_triton cannot be imported" in text


def test_a_run_that_does_not_fit_gets_advice(run):
    fits, text = run(_config(model__remat="none"), _machine())
    assert not fits
    assert re.search(r"(?i)\bupdate\b.*\bnot fit\b", text)
    assert re.search(r"activations.*config\.train\.rows", text)


def test_each_rematerialisation_has_its_memory(run):
    _, text = run(_config(), _machine())
    rows = {name: float(size) for name, size in re.findall(r"^  [* ] (none|layers|pairs) +([\d.]+) GB", text, re.MULTILINE)}
    assert rows["none"] > rows["layers"] > rows["pairs"] > 65.0


def test_a_search_has_neither_optimiser_nor_gradient(run):
    fits, text = run(_config(), _machine(), learn=False)
    assert fits
    assert re.search(r"^measuring +base +[\d.]+ +- +- +- ", text, re.MULTILINE)
    assert "remat" not in text.split("figures")[1]


@pytest.mark.parametrize(
    "config",
    [_config(model__dtype="float32"), _config(model__experts="dense"), _config("qwen2.5-coder-7b", mesh__tensor=2)],
    ids=["float32", "dense experts", "a dense model over tensor"],
)
def test_no_verdict_where_no_formula_was_measured(run, config):
    fits, text = run(config, _machine(devices=2))
    assert fits  # the exit code is that of a run that does not fit only if it does not
    assert "Whether the run fits is unknown" in text
    assert "-e '.[cuda]'" in text
    assert "activations" not in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (_config(), r"gpt-oss within 3%"),
        (_config("qwen2.5-coder-7b", mesh__data=2, train__rows=2), r"dense models, activations are fitted"),
        (_config("gpt-oss-20b", mesh__tensor=2), r"without kernels\..*order of magnitude"),
    ],
    ids=["kernels", "dense", "references"],
)
def test_the_accuracy_is_that_of_the_mesh_and_model(run, config, said):
    _, text = run(config, _machine(devices=2))
    (figures,) = (line for line in text.splitlines() if line.startswith("figures"))
    assert re.search(said, figures)
    assert ("within 3%" in figures) == ("within 3%" in said)


def test_no_room_for_one_rollout():
    with pytest.raises(CapacityError, match=r"max_new_tokens"):
        formulas.parts(_config(), SHAPES["gpt-oss-120b"], _machine(memory=70 * 10**9), learn=True)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_machines_without_their_plugin_miss_the_compiler(platform):
    assert "compiler is not installed" in formulas.what_is_missing(_machine({"gpu": "h100", "tpu": "v6e"}[platform]))
    assert not formulas.what_is_missing(_machine("v6e", exact=True))  # TPUs have no kernel of decoding that could be missing
    assert machines.find_machine("", 1).exact
