"""Adapters in peft's format: logits and gradients against peft over transformers, round trips, errors, and the command."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from discover_jax import config as settings
from discover_jax.exceptions import RunError, WeightsError
from discover_jax.export_adapter import export_adapter
from discover_jax.learning.train_state import adam, init_train_state
from discover_jax.models.adapter import CONFIG, WEIGHTS, load_peft, read_lora_config, save_peft
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.folder import load_folder
from discover_jax.models.synthetic import write_synthetic
from discover_jax.runs.checkpoints import Checkpoints

SMALL = ModelConfig(
    num_layers=4,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    num_experts=4,
    experts_per_token=2,
    mlp_width=96,
    vocab_size=97,
    sliding_window=16,
    eos_id=1,
    pad_id=0,
)
LORA = LoraConfig(attention_rank=4, expert_rank=2, head_rank=3, alpha=6.0)
RANKS = {
    "three ranks": LORA,
    "one rank": LoraConfig(4, 4, 4, alpha=4.0),
    "only attention": LoraConfig(5, 0, 0, alpha=2.5),
    "only experts": LoraConfig(0, 3, 0, alpha=8.0),
    "only head": LoraConfig(0, 0, 2, alpha=1.0),
    "attention and head": LoraConfig(2, 0, 6),
}
_QUICK = ("three ranks", "only attention")
GROUPS = {"attention_rank": "self_attn", "expert_rank": "mlp.experts", "head_rank": "lm_head"}


def random_lora(lora: LoraConfig, seed=0, config=SMALL):
    """All weights are random, also B. The adapter's products are about a tenth of the base's."""
    rng = np.random.default_rng(seed)

    def draw(path, struct):
        fan_in = struct.shape[-1] ** -0.5
        scale = fan_in if path[-1].key == "lora_a" else 0.1 / (lora.alpha * fan_in)
        return jax.device_put((scale * rng.standard_normal(struct.shape)).astype(np.float32))

    return jax.tree_util.tree_map_with_path(draw, Model(config, lora).abstract_lora())


def random_tokens(rows=2, length=40, seed=0):
    return np.random.default_rng(seed).integers(0, SMALL.vocab_size, (rows, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, frozen, lora, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTD = model.hidden(frozen, lora, tokens_BT, positions_BT, jnp.ones_like(positions_BT))
    return model.logits(frozen, lora, hidden_BTD)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# ---------------------------------------------------------------------- against peft


@pytest.fixture(scope="module")
def libraries():
    reason = "needs torch and peft (make test installs them; PARITY=0 leaves them out)"
    return pytest.importorskip("torch", reason=reason), pytest.importorskip("transformers"), pytest.importorskip("peft", reason=reason)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of base weights, and the tree that we load from it."""
    path = tmp_path_factory.mktemp("base")
    write_synthetic(path, SMALL, seed=1)
    return path, load_folder(path)[1]


@pytest.fixture
def reference(libraries, base):
    """transformers' model of the same folder. Each test gets a new one, because peft inserts its wrappers into the model."""
    torch, transformers, _ = libraries
    return transformers.GptOssForCausalLM.from_pretrained(
        base[0],
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def torch_logits(torch, model, tokens_BT):
    with torch.no_grad():
        return model(torch.tensor(tokens_BT)).logits.numpy()


@pytest.mark.filterwarnings("error:.*(rank_pattern|missing adapter keys|unexpected keys)")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.slow]) for name in RANKS])
def test_peft_loads_our_adapter_and_computes_equal_logits(tmp_path, libraries, base, reference, name):
    torch, _, peft = libraries
    lora = random_lora(RANKS[name], seed=len(name))
    save_peft(tmp_path, lora, SMALL, RANKS[name], str(base[0]))
    tokens_BT = random_tokens()
    plain = torch_logits(torch, reference, tokens_BT)
    model = peft.PeftModel.from_pretrained(reference, tmp_path)
    adapted = torch_logits(torch, model, tokens_BT)
    assert np.abs(adapted - plain).max() > 0.1  # otherwise the comparison would not test the adapter
    ours = logits(Model(SMALL, RANKS[name]), base[1], lora, tokens_BT)
    np.testing.assert_allclose(ours, adapted, atol=1e-4, rtol=0)
    merged = torch_logits(torch, model.merge_and_unload(), tokens_BT)  # docs/adapters.md recommends it
    np.testing.assert_allclose(ours, merged, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*(rank_pattern|save_embedding_layers|config file)")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.slow]) for name in RANKS])
def test_we_load_pefts_adapter_and_compute_equal_logits(tmp_path, libraries, base, reference, name):
    """peft creates, configures and saves the adapter. If it adapts the head, it also saves a copy of the base's head."""
    torch, _, peft = libraries
    lora = RANKS[name]
    modules = {f"{letter}_proj": lora.attention_rank for letter in "qkvo"} | {"lm_head": lora.head_rank}
    parameters = {f"mlp.experts.{matrix}_proj": lora.expert_rank for matrix in ("down", "gate_up")}
    options = peft.LoraConfig(
        r=64,
        lora_alpha=lora.alpha,
        rank_pattern={target: rank for target, rank in (modules | parameters).items() if rank},
        target_modules=[target for target, rank in modules.items() if rank],
        target_parameters=[target for target, rank in parameters.items() if rank],
    )
    model = peft.get_peft_model(reference, options).eval()
    torch.manual_seed(len(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_A" in parameter_name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif "lora_B" in parameter_name:
                parameter.normal_(std=0.2 / lora.alpha)
    model.save_pretrained(tmp_path)
    tokens_BT = random_tokens()
    expected = torch_logits(torch, model, tokens_BT)
    with model.disable_adapter():
        assert np.abs(expected - torch_logits(torch, model, tokens_BT)).max() > 0.1
    assert read_lora_config(tmp_path, SMALL) == lora
    ours = Model(SMALL, lora)
    np.testing.assert_allclose(logits(ours, base[1], load_peft(tmp_path, ours), tokens_BT), expected, atol=1e-4, rtol=0)


def test_gradients_equal_torch(tmp_path, libraries, base, reference):
    """Gradients of a scalar of the logits with respect to every adapter weight, matched by the names in both saved files."""
    torch, _, peft = libraries
    model, lora, tokens_BT = Model(SMALL, LORA), random_lora(LORA, seed=7), random_tokens(seed=7)
    weights_BTV = np.random.default_rng(8).standard_normal((*tokens_BT.shape, SMALL.vocab_size)).astype(np.float32) / tokens_BT.size
    save_peft(tmp_path / "lora", lora, SMALL, LORA, "base")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "lora", is_trainable=True)
    loss = (theirs(torch.tensor(tokens_BT)).logits * torch.tensor(weights_BTV)).sum()
    loss.backward()
    expected = {
        name.replace(".default", ""): parameter.grad.numpy() for name, parameter in theirs.named_parameters() if parameter.requires_grad
    }
    value, gradients = jax.value_and_grad(lambda lora: jnp.vdot(logits(model, base[1], lora, tokens_BT), weights_BTV))(lora)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    save_peft(tmp_path / "gradients", gradients, SMALL, LORA, "base")
    ours = safetensors.numpy.load_file(tmp_path / "gradients" / WEIGHTS)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 1e-4, name
        np.testing.assert_allclose(ours[name], gradient, atol=1e-4 * np.abs(gradient).max(), rtol=0, err_msg=name)


# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", RANKS)
def test_round_trip_is_exact(tmp_path, name):
    lora, model = random_lora(RANKS[name]), Model(SMALL, RANKS[name])
    save_peft(tmp_path, lora, SMALL, RANKS[name], "base")
    assert read_lora_config(tmp_path, SMALL) == RANKS[name]
    read = load_peft(tmp_path, model)
    assert_identical(read, lora)
    save_peft(tmp_path / "again", read, SMALL, RANKS[name], "base")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / CONFIG).read_bytes() == (tmp_path / CONFIG).read_bytes()


@pytest.mark.parametrize("left_out", GROUPS)
def test_targets_of_rank_0_are_not_saved(tmp_path, left_out):
    ranks = dataclasses.replace(LORA, **{left_out: 0})
    save_peft(tmp_path, random_lora(ranks), SMALL, ranks, "base")
    names = safetensors.numpy.load_file(tmp_path / WEIGHTS).keys()
    for rank, part in GROUPS.items():
        assert any(part in name for name in names) == (rank != left_out)
    content = json.loads((tmp_path / CONFIG).read_text())
    targets = [*content["target_modules"], *(content["target_parameters"] or [])]
    expected = {"attention_rank": ["q_proj", "k_proj", "v_proj", "o_proj"], "head_rank": ["lm_head"]}
    expected["expert_rank"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert sorted(targets) == sorted(target for rank, some in expected.items() if rank != left_out for target in some)


def test_loading_onto_a_mesh(tmp_path):
    """Shardings are the model's, and values are equal. A separate process simulates four devices."""
    even = dataclasses.replace(SMALL, vocab_size=98)
    save_peft(tmp_path, random_lora(LORA, config=even), even, LORA, "base")
    code = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from discover_jax.models.adapter import load_peft
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.sharding import make_mesh
config, lora = eval(sys.argv[2]), eval(sys.argv[3])
model = Model(config, lora, mesh=make_mesh(1, 2, 2))
spread, plain = load_peft(sys.argv[1], model), load_peft(sys.argv[1], Model(config, lora))
for a, b, struct in zip(*map(jax.tree.leaves, (spread, plain, model.abstract_lora())), strict=True):
    assert a.sharding == struct.sharding, (a.sharding, struct.sharding)
    np.testing.assert_array_equal(a, b)
print("equal")
"""
    ended = subprocess.run([sys.executable, "-c", code, tmp_path, repr(even), repr(LORA)], capture_output=True, text=True)
    assert ended.stdout == "equal\n", ended.stderr


# ---------------------------------------------------------------------- errors


@pytest.fixture
def saved(tmp_path):
    save_peft(tmp_path, random_lora(LORA), SMALL, LORA, "base")
    return tmp_path


def change_config(path, **changes):
    file = path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(path, change):
    arrays = safetensors.numpy.load_file(path / WEIGHTS)
    change(arrays)
    safetensors.numpy.save_file(arrays, path / WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rslora": True}, "use_rslora = True"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True, "modules_to_save": ["embed_tokens"]}, r"lora_bias = True; modules_to_save = \['embed_tokens'\]"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices = \[3\]"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"some_later_variant": {"on": True}}, "some_later_variant"),
        ({"peft_type": "LOHA"}, r"peft_type = 'LOHA' \(allowed: 'LORA'\)"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"rank_pattern": {"k_proj": 3}}, r"attention.* 2 \(model.layers.0.self_attn.q_proj\), 3 \(.*k_proj\)"),
        (
            {"alpha_pattern": {r"layers\.2\.mlp\.experts\.down_proj": 1}},
            r"alphas: 6 .*, 1 \(model.layers.2.mlp.experts.down_proj",
        ),
        ({"rank_pattern": {"(": 3}}, r"pattern '\(' in rank_pattern"),
        ({"r": None}, "None.*ranks.*expert"),
        ({"lora_alpha": "much"}, "'much'.*alphas"),
    ],
)
def test_unsupported_configs_are_refused(saved, changes, message):
    change_config(saved, **changes)
    with pytest.raises(WeightsError, match=message):
        load_peft(saved, Model(SMALL, LORA))


_WRONG = [None, True, False, 0, -1, 0.5, 2**40, 10**400, float("nan"), float("inf"), "4", "", [], [4], {}, {"a": 1}, {"k_proj": [1]}, [[]]]


def test_any_value_of_any_field_is_read_or_refused(saved):
    names = (
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "bias",
        "target_modules",
        "use_dora",
        "new",
    )
    refused = 0
    before = (saved / CONFIG).read_text()
    for name in names:
        for value in _WRONG:
            change_config(saved, **{name: value})
            try:
                read_lora_config(saved, SMALL)
            except WeightsError:
                refused += 1
            (saved / CONFIG).write_text(before)
    assert refused > 80
    for pattern in ("(", "a{99999999999}", "*", "(?P<a>"):
        change_config(saved, rank_pattern={pattern: 3})
        with pytest.raises(WeightsError, match="rank_pattern"):
            read_lora_config(saved, SMALL)
    for text in ("[" * 100_000, "", "3", '"r"'):
        (saved / CONFIG).write_text(text)
        with pytest.raises(WeightsError, match=CONFIG):
            read_lora_config(saved, SMALL)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_fifos_are_not_opened(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(WeightsError, match="FIFO"):
        read_lora_config(saved, SMALL)


def test_unsupported_targets_are_named(saved):
    router = "base_model.model.model.layers.1.mlp.router.lora_A.weight"
    change_tensors(saved, lambda arrays: arrays.update({router: np.zeros((2, 64), np.float32)}))
    with pytest.raises(WeightsError, match=r"1 tensors.*layers.1.mlp.router.lora_A"):
        load_peft(saved, Model(SMALL, LORA))


@pytest.mark.parametrize("part", ["layers.3.self_attn.k_proj", "layers.0.mlp.experts.base_layer", "lm_head.lora_B"])
def test_missing_tensors_are_named(saved, part):
    change_tensors(saved, lambda arrays: [arrays.pop(name) for name in list(arrays) if part in name])
    with pytest.raises(WeightsError, match=rf"lacks \d tensors.*{part}"):
        load_peft(saved, Model(SMALL, LORA))


def test_wrong_shapes_and_types_are_named(saved):
    def change(arrays):
        gate_up = "base_model.model.model.layers.1.mlp.experts.base_layer"
        for half in "AB":
            a, b = f"{gate_up}.lora_{half}.weight", f"{gate_up.removesuffix('.base_layer')}.lora_{half}.weight"
            arrays[a], arrays[b] = arrays[b], arrays[a]
        arrays["base_model.model.lm_head.lora_A.weight"] = arrays["base_model.model.lm_head.lora_A.weight"].astype(np.float64)

    change_tensors(saved, change)
    with pytest.raises(WeightsError, match=r"5 tensors.*base_layer.lora_A.weight.*\(8, 96\).*\(8, 64\)") as caught:
        load_peft(saved, Model(SMALL, LORA))
    assert re.search(r"lm_head.lora_A.weight .*F64", str(caught.value))


def test_adapters_of_other_models_are_refused(saved):
    with pytest.raises(WeightsError, match=r"LoraConfig\(attention_rank=4.*LoraConfig\(attention_rank=32"):
        load_peft(saved, Model(SMALL))
    with pytest.raises(WeightsError, match=r"layers\.2\..* 2 layers"):
        load_peft(saved, Model(dataclasses.replace(SMALL, num_layers=2), LORA))
    with pytest.raises(WeightsError, match="lacks 24 tensors"):
        load_peft(saved, Model(dataclasses.replace(SMALL, num_layers=6), LORA))
    with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.experts.*\(8, 64\).*\(16, 64\)"):
        load_peft(saved, Model(dataclasses.replace(SMALL, num_experts=8), LORA))


def test_damaged_folders_are_named(saved):
    model = Model(SMALL, LORA)
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:-10])
    with pytest.raises(WeightsError, match=f"{WEIGHTS}.*truncated"):
        load_peft(saved, model)
    (saved / WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=WEIGHTS):
        load_peft(saved, model)
    (saved / CONFIG).write_text("[]")
    with pytest.raises(WeightsError, match=f"{CONFIG}.*list"):
        load_peft(saved, model)
    with pytest.raises(WeightsError, match=r"nowhere.adapter_config\.json"):
        load_peft(saved / "nowhere", model)


def test_save_peft_refuses_wrong_trees_and_paths(tmp_path):
    with pytest.raises(WeightsError, match=r"ranks.* 0"):
        save_peft(tmp_path / "a", {}, SMALL, LoraConfig(0, 0, 0), "base")
    other = dataclasses.replace(LORA, head_rank=2)
    with pytest.raises(WeightsError, match=r"2 arrays.*head/lora_a.*\(2, 64\).*\(3, 64\).*head/lora_b"):
        save_peft(tmp_path / "a", random_lora(LORA), SMALL, other, "base")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="/file"):
        save_peft(tmp_path / "file", random_lora(LORA), SMALL, LORA, "base")


# ---------------------------------------------------------------------- the command


def make_run(path, weights, *, max_grad_norm=0.0, steps=(0, 1, 2), **changes):
    """The files of a training run: config.json, and checkpoints with adapters."""
    config = settings.default_config()
    config.model.weights = str(weights)
    config.lora.update(dataclasses.asdict(LORA))
    config.train.max_grad_norm = max_grad_norm
    flat = settings.flatten(config) | changes
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"kind": "train", "config": flat}))
    checkpoints = Checkpoints(path / "checkpoints", keep=3, every=0)
    for step in steps:
        checkpoints.save(step, init_train_state(random_lora(LORA, seed=step), adam(max_grad_norm=max_grad_norm)), {"step": step})
    checkpoints.close()
    return path


def command(*arguments, module="discover_jax.export_adapter"):
    return subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_exports_a_checkpoint(tmp_path, base):
    run = make_run(tmp_path / "run", base[0], max_grad_norm=1.0)
    before = sorted(run.rglob("*"))
    ended = command(f"--run={run}", f"--out={tmp_path / 'latest'}")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"checkpoint 2\b.*ranks 4 .*2 .*3 .*alpha 6\b", ended.stdout)
    assert str(tmp_path / "latest") in ended.stdout
    assert_identical(load_peft(tmp_path / "latest", Model(SMALL, LORA)), random_lora(LORA, seed=2))
    assert json.loads((tmp_path / "latest" / CONFIG).read_text())["base_model_name_or_path"] == str(base[0])
    ended = command(f"--run={run}", "--step=0", f"--out={tmp_path / 'first'}", "--base=openai/gpt-oss-20b")
    assert ended.returncode == 0, ended.stderr
    assert_identical(load_peft(tmp_path / "first", Model(SMALL, LORA)), random_lora(LORA, seed=0))
    assert json.loads((tmp_path / "first" / CONFIG).read_text())["base_model_name_or_path"] == "openai/gpt-oss-20b"
    assert sorted(run.rglob("*")) == before  # export must not change a run directory that may be in use
    ended = command(f"--run={run}", "--step=7", f"--out={tmp_path / 'none'}", module="discover_jax.models.export_adapter")  # its old name
    assert ended.returncode == 2
    assert re.match("error: .*checkpoint 7", ended.stderr)
    assert "Traceback" not in ended.stderr


def test_runs_without_an_adapter_are_refused(tmp_path, base):
    with pytest.raises(RunError, match=r"--run"):
        export_adapter(tmp_path, tmp_path / "out")
    run = make_run(tmp_path / "none yet", base[0], steps=())
    with pytest.raises(RunError, match=r"none yet.*checkpoint"):
        export_adapter(run, tmp_path / "out")
    (run / "checkpoints").rmdir()
    with pytest.raises(RunError, match=r"none yet.*checkpoints"):
        export_adapter(run, tmp_path / "out")
    search = make_run(tmp_path / "search", base[0], steps=())
    Checkpoints(search / "checkpoints", keep=1, every=0).save(0, None, {})
    with pytest.raises(RunError, match=r"Checkpoint 0\b.*adapter"):
        export_adapter(search, tmp_path / "out")
    moved = make_run(tmp_path / "moved", tmp_path / "elsewhere", steps=(0,))
    with pytest.raises(WeightsError, match="elsewhere"):
        export_adapter(moved, tmp_path / "out")
    drawn = make_run(tmp_path / "drawn", "random", steps=(), **{"model.shape": "gpt-oss-20b"})
    with pytest.raises(RunError, match=r"random.*--base"):
        export_adapter(drawn, tmp_path / "out")
    older = make_run(tmp_path / "older", base[0], steps=(0,))
    content = json.loads((older / "config.json").read_text())
    del content["config"]["train.max_grad_norm"]
    (older / "config.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"config\.json.*max_grad_norm"):
        export_adapter(older, tmp_path / "out")
    assert not (tmp_path / "out").exists()
