"""The dry run, compared with real arrays and the process's measured memory, and its command line."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import pytest

from discover_jax import dry_run, formulas
from discover_jax.config import default_config
from discover_jax.engine import build_model, build_optimizer, build_sampler
from discover_jax.exceptions import CapacityError, DiscoverError
from discover_jax.learning.train_state import init_train_state
from discover_jax.machines import Machine, find_machine
from discover_jax.models.config import ModelConfig

_SIZES = ModelConfig(2, 64, 4, 2, 16, 4, 2, 64, 512, sliding_window=8)
_SMALL = (
    "--config=configs/quickstart.py",
    "--config.sampling.max_prompt_tokens=64",
    "--config.sampling.max_new_tokens=64",
    "--config.train.rows=1",
    "--dry_run",
)

_RANDOM = ("--config.model.weights=random", "--config.model.shape=gpt-oss-120b")


def _config():
    config = default_config()
    config.groups, config.group_size, config.sampling.slots = 2, 3, 4
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens, config.train.rows = 200, 400, 2
    config.lora.expert_rank = config.lora.attention_rank = config.lora.head_rank = 8
    return config


def _needs(config, **options):
    return dry_run.needs(config, _SIZES, find_machine("", 1), on_compile=lambda _: None, **options)


def _bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def found():
    return _needs(_config())


def test_weights_adapter_and_optimiser_match_real_arrays(found, random_weights):
    config = _config()
    model = build_model(config, _SIZES)
    state = init_train_state(model.init_lora(jax.random.key(0)), build_optimizer(config))
    expected = {"weights": _bytes(random_weights(model.abstract_frozen())), "adapter": _bytes(state.lora)}
    expected["optimiser"] = _bytes(state.opt_state)
    assert [{part: need.parts[part] for part in expected} for need in found] == [expected] * len(found)
    assert expected["weights"] > 0 < expected["adapter"] < expected["optimiser"]


def test_formulas_give_the_parts_of_the_compiled_functions(found):
    compiled = {need.function: need.parts for need in found}
    absent = dataclasses.replace(find_machine("", 1), platform="gpu", exact=False)
    for (_, function), parts in formulas.parts(_config(), _SIZES, absent, learn=True).items():
        for part in ("weights", "adapter", "optimiser", "cache"):
            assert parts.get(part, 0) == pytest.approx(compiled[function][part], rel=0.03), (function, part)


def test_cache_has_keys_and_values_of_every_slot(found):
    # By hand: two layers, keys and values, two heads of 16 in bfloat16. The sliding layer has a ring of 8 places for each of 4 slots. The
    # other layer has pages of 128: five per slot, for 200 + 400 tokens, and two for a prompt.
    (decode,) = (need for need in found if need.function == "decode")
    of_place = 2 * 2 * 16 * 2
    of_rows = decode.parts["cache"] - (4 * 8 + (4 * 5 + 2) * 128) * of_place
    assert 0 < of_rows < 4 * 1024  # the activations and numbers of each row


@pytest.mark.slow  # test_meshes tests the rule
def test_cache_fits_in_the_remaining_memory(random_weights):
    config = _config()
    config.groups, config.group_size, config.sampling.slots = 16, 16, 256
    model = build_model(config, _SIZES)
    state = init_train_state(model.init_lora(jax.random.key(0)), build_optimizer(config))
    resident = _bytes(random_weights(model.abstract_frozen())) + _bytes(state)
    of_page = 128 * 2 * 2 * 16 * 2

    def pages(**options):
        sampler = build_sampler(config, model, (0,), **options)
        (function,) = (f for f in sampler.lowered_functions(model.abstract_frozen(), model.abstract_lora(), 16, 256) if f.name == "decode")
        return function.live["cache"][0].pages

    assert pages() == pages(memory=10**9) == 256 * 5 + 2  # five for 200 + 400 tokens, and two for a prompt
    memory = int((resident + 256 * 512 * 4 * 4 + 100 * of_page) / 0.97)
    assert 0 < pages(memory=memory) < 100  # the adapter's copy and the rings also take memory
    assert pages(memory=memory, learn=False) > pages(memory=memory)
    with pytest.raises(CapacityError, match=r"weights\b.*adapter\b.*optimiser"):
        pages(memory=resident)
    config.sampling.cache_tokens = 128 * 30 + 5
    assert pages() == pages(memory=memory) == 30


def test_the_columns_of_long_names_are_aligned():
    found = [dry_run.Need("sampling", name, dict.fromkeys(dry_run.PARTS, 10**9)) for name in ("put", "decode with drafts")]
    lines = dry_run.report(_config(), _SIZES, find_machine("", 1), found)
    rows = [line for line in lines if line.startswith(("phase ", "sampling  put", "sampling  decode"))]
    ends = [[match.end() for match in re.finditer(r"\S+", line.replace(" <- peak", ""))][-7:] for line in rows]
    assert len(ends) == 3
    assert ends[0] == ends[1] == ends[2]


def test_phases_and_functions_have_the_order_of_a_step(found):
    assert [(need.phase, need.function) for need in found] == [
        ("sampling", "prefill"),
        ("sampling", "decode"),
        ("sampling", "put"),
        ("sampling", "set aside"),
        ("update", "base"),
        ("update", "gradient"),
        ("update", "apply"),
    ]
    assert all(need.total == sum(need.parts.values()) > 0 for need in found)


@pytest.mark.slow  # the command is tested for a search, too
def test_search_has_no_gradient_and_more_rows_need_more():
    config = _config()
    before = _needs(config, learn=False)
    assert {need.phase for need in before} == {"sampling", "measuring"}
    assert all(need.parts["adapter"] == need.parts["optimiser"] == need.parts["gradient"] == 0 for need in before)
    config.train.rows *= 3
    after = _needs(config, learn=False)
    assert after[:-1] == before[:-1]
    assert after[-1].parts["activations"] > 1.5 * before[-1].parts["activations"]


# The growth of the process's memory while the gradient is computed, and the prediction. The peak is reset after compilation.
_MEASURED = """
import jax, numpy as np
from discover_jax import dry_run, formulas
from discover_jax.config import default_config
from discover_jax.engine import build_model, build_optimizer, build_update, row_tokens
from discover_jax.learning.packing import pack
from discover_jax.machines import find_machine
from discover_jax.models.config import ModelConfig
from discover_jax.types import Rollout, StopReason

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

sizes = ModelConfig(2, 128, 4, 2, 32, 4, 2, 128, 24_000, sliding_window=8)
config = default_config()
config.model.dtype = "float32"
config.groups, config.group_size, config.train.rows = 1, 4, 4
config.sampling.max_prompt_tokens = config.sampling.max_new_tokens = 256
needs = dry_run.needs(config, sizes, find_machine("", 1), on_compile=lambda _: None)
(need,) = (need for need in needs if need.function == "gradient")
model = build_model(config, sizes)
frozen, lora = model.init_frozen(jax.random.key(0)), model.init_lora(jax.random.key(1))
update = build_update(config, model, build_optimizer(config))
ones = np.ones(256, np.int32)
rollouts = [Rollout(0, i, ones, ones, np.float32(-ones), ones > 0, StopReason.MAX_TOKENS) for i in range(4)]
batches = pack(rollouts, [1.0, -1.0, 1.0, -1.0], row_tokens=row_tokens(config), rows=4)
jax.block_until_ready(update.gradient(frozen, lora, batches))  # compiles
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
jax.block_until_ready(update.gradient(frozen, lora, batches))
print(memory("VmHWM") - before, need.parts["activations"])
"""


@pytest.mark.slow  # the default run tests that more rows need more
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process's memory can be reset on Linux only")
def test_predicted_activations_match_process_memory():
    # By default glibc keeps freed memory, so the second call would not grow.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", _MEASURED], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    measured, predicted = map(int, done.stdout.split())
    assert predicted > 100e6
    # The CPU's matrix product library packs operands into buffers that the compiler does not know of.
    assert 0.6 * measured < predicted < 1.1 * measured


def fits(report: str) -> bool:
    """Whether the report says that the run fits."""
    return re.search(r"(?i)\bfits\b", report) is not None and re.search(r"(?i)\bnot fit\b", report) is None


def _report(found, machine, **changes):
    config = _config()
    for name, value in changes.items():
        config.train[name] = value
    return "\n".join(dry_run.report(config, _SIZES, machine, found))


def test_verdict_names_the_settings_to_change(found):
    machine = find_machine("", 1)
    assert fits(_report(found, machine))
    tight = dataclasses.replace(machine, memory=max(n.total for n in found) - 1)
    text = _report(found, tight)
    assert not fits(text)
    assert re.search(r"(?i)\bupdate\b.*\bnot fit\b.*\d GB\b", text)
    assert "config.train.rows = 2" in text
    assert not re.search(r"(?i)\bsampling\b.*\bnot fit\b", text)


def test_compiler_error_is_shown_and_does_not_fit(found):
    refused = [*found[:-2], dataclasses.replace(found[-2], complaint="RESOURCE_EXHAUSTED: Ran out of memory. Used 9G of 8G")]
    text = _report(refused, find_machine("", 1))
    assert "Used 9G of 8G" in text
    assert not fits(text)


def test_estimate_is_marked_as_one(found):
    here = find_machine("", 1)
    absent = Machine("8 x NVIDIA H200", here.devices, here.memory, "", "gpu", exact=False)
    text = "\n".join(dry_run.report(_config(), _SIZES, absent, found, missing="the GPU compiler is not installed"))
    assert re.search(r"\bestimate[sd]? by formulas\b.*\bGPU compiler\b", text)
    assert "-e '.[cuda]'" in text
    assert "formulas" not in _report(found, here)


def _command(*arguments, module="main"):
    command = [sys.executable, "-m", f"discover_jax.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow  # compiles the gradient for each remat policy; test_dry_run_accepts_meshes_of_other_machines runs the command
def test_command_prints_config_table_and_verdict_and_writes_nothing(tmp_path):
    done = _command(*_SMALL, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\* sampling\.max_new_tokens = 64\b", done.stdout)
    assert re.search(r"^update +gradient( +[\d.-]+){7} <- peak$", done.stdout, re.MULTILINE)
    assert fits(done.stdout)
    remat = {name: float(size) for name, size in re.findall(r"^  [* ] (none|layers|pairs) +([\d.]+) GB", done.stdout, re.MULTILINE)}
    assert remat["none"] > remat["layers"] >= remat["pairs"] > 0
    assert "  * none" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # other tests check the verdict without the command
def test_exit_code_is_1_if_the_run_does_not_fit():
    # More rows than fit in the memory of an H200; this machine has none.
    done = _command("--config=configs/spaceship.py:run1", *_RANDOM, "--config.train.rows=4", "--dry_run", "--machine=h200")
    assert done.returncode == 1, done.stderr
    assert re.search(r"(?i)\bupdate\b.*\bnot fit\b", done.stdout)
    assert "config.train.rows = 4" in done.stdout
    assert "Traceback" not in done.stderr


_SPREAD = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.sharding import local_bytes, make_mesh

model = Model(ModelConfig(2, 64, 4, 2, 16, 4, 2, 64, 512), LoraConfig(8, 8, 8, 8.0), mesh=make_mesh(data=2, expert=2, tensor=2))
abstract = model.abstract_frozen(), model.abstract_lora()
real = jax.tree.map(lambda leaf: jax.device_put(jax.numpy.zeros(leaf.shape, leaf.dtype), leaf.sharding), abstract)
held = [sum(shard.data.nbytes for leaf in jax.tree.leaves(real) for shard in leaf.addressable_shards if shard.device == device)
        for device in jax.devices()]
print(local_bytes(abstract), *held, sum(leaf.nbytes for leaf in jax.tree.leaves(real)))
"""


def test_bytes_of_a_mesh_match_those_on_each_device():
    done = subprocess.run([sys.executable, "-c", _SPREAD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    predicted, *held, whole = map(int, done.stdout.split())
    assert held == [predicted] * 8
    assert whole / 8 < predicted < whole / 2


@pytest.mark.slow  # test_meshes tests the meshes
def test_dry_run_accepts_meshes_of_other_machines(tmp_path):
    spread = ("--config.mesh.expert=4", "--config.mesh.data=2", "--config.sampling.slots=8", "--config.train.rows=8")
    run = ("--config=configs/spaceship.py:run1", *_RANDOM, *spread, "--dry_run", "--machine=h200", f"--workdir={tmp_path / 'run'}")
    done = _command(*run, module="search")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b8 x NVIDIA H200\b.*\bdata 2 x expert 4 x tensor 1\b", done.stdout)
    assert re.search(r"^measuring", done.stdout, re.MULTILINE)
    assert not (tmp_path / "run").exists()
    assert "optimiser" in done.stdout


@pytest.mark.parametrize(("slots", "said"), [(12, True), (8, False)])
def test_drafts_without_effect_are_named(monkeypatch, capsys, slots, said):
    monkeypatch.setattr(formulas, "what_is_missing", lambda machine: "the GPU compiler is not installed")  # formulas are faster
    config = _config()
    config.model.weights, config.model.shape = "random", "gpt-oss-120b"
    config.groups, config.sampling.slots, config.sampling.draft_tokens = 8, slots, 15
    dry_run.run(config, "h200")
    assert ("config.sampling.draft_tokens = 15 has no effect" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("machine", "data", "message"),
    [
        ("h300", 1, r"\bh300\b.*\ba100, h100, h200, b200\b"),
        ("", 4, r"config\.mesh\b.*\b4\b.*\b1\b"),
        ("v5e:2x4", 16, r"\bv5e:2x4\b.*\b8\b"),
    ],
)
def test_unknown_machines_and_too_few_devices_are_refused(machine, data, message):
    config = _config()
    config.mesh.data = data
    with pytest.raises(DiscoverError, match=message):
        dry_run.run(config, machine)
