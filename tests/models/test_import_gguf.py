"""GGUF import: tensors and logits against transformers, tokenizers against transformers, and errors about files and folders."""

import json
import math
import os
import re
import struct
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from discover_jax.exceptions import DiscoverError, TokenizerError, WeightsError
from discover_jax.models import gguf_tensors, import_gguf, shards
from discover_jax.models.gguf_config import llama3_factors, recover_llama3_scaling
from discover_jax.models.gguf_file import GgufFile, StoredTensor

TYPES = gguf.GGMLQuantizationType
FAMILIES = {
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
}
# Rows of 32 values fit the blocks of Q8_0 and Q4_0. transformers' own import requires heads * head_dim = hidden_size.
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 352,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CONTROL, USER_DEFINED, UNUSED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED
CORPUS = ["def hello(x): return x + 1\n", "hello world, we'll see 12 345\n", "Größe café naïve\n", "    if a == b:\n        pass\n"] * 4
TEXTS = [
    "def f(x):\n    return x**2 + 1  # café\n",
    "Größe naïve 日本語 русский",
    "😀 👩‍👩‍👧 hello",
    "It's we'll I'M",
    "  spaces\r\n\r\n\t\tend   ",
    "12345 3.14",
    "<|im_start|>user\nhello<|im_end|>\n<tool_call>x</tool_call>",
    "",
]


# ---------------------------------------------------------------------- files to import


def _vocabulary():
    """Tokens, their types and merges of a small byte-level vocabulary, padded to the model's vocabulary as llama.cpp's converter does."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    types = [gguf.TokenType.NORMAL] * len(tokens)
    added = [("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<tool_call>", USER_DEFINED)]
    added += [(f"[PAD{index}]", UNUSED) for index in range(len(tokens) + len(added), SIZES["vocab_size"])]
    return [*tokens, *(text for text, _ in added)], [*types, *(kind for _, kind in added)], [" ".join(m) for m in state["merges"]]


TOKENS, TOKEN_TYPES, MERGES = _vocabulary()
IDS = {text: index for index, text in enumerate(TOKENS)}


@pytest.fixture(scope="module", autouse=True)
def _references():
    """Not at the top of the file: each worker imports all files, but only one runs the tests that need torch (see `TORCH` in conftest)."""
    global torch, transformers
    torch = pytest.importorskip("torch", reason="parity needs torch (make test installs it; PARITY=0 leaves it out)")
    transformers = pytest.importorskip("transformers")


def _classes(family):
    config_class, model_class = FAMILIES[family]
    return getattr(transformers, config_class), getattr(transformers, model_class)


def _random_model(family, *, tied=False, **options):
    """A random model whose values are exact in bfloat16."""
    config_class, model_class = _classes(family)
    config = config_class(**{**SIZES, **options}, tie_word_embeddings=tied, attn_implementation="eager")
    torch.manual_seed(1)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.2) + (1.0 if "norm" in name else 0.0)
            parameter.copy_(values.to(torch.bfloat16).float())
    return model


def _permute(rows, heads):
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _gguf_tensors(model, family):
    """The tensors of a model by their GGUF names, as llama.cpp's converter stores them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], SIZES["num_hidden_layers"])
    tensors = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if family == "llama" and (found := re.search(r"\.([qk])_proj\.", name)):
            array = _permute(array, SIZES["num_attention_heads" if found[1] == "q" else "num_key_value_heads"])
        tensors[names.get_name(name, (".weight", ".bias"))] = array
    return tensors


def _metadata(family, theta=10_000.0):
    return {
        "general.architecture": family,
        f"{family}.block_count": SIZES["num_hidden_layers"],
        f"{family}.context_length": SIZES["max_position_embeddings"],
        f"{family}.embedding_length": SIZES["hidden_size"],
        f"{family}.feed_forward_length": SIZES["intermediate_size"],
        f"{family}.attention.head_count": SIZES["num_attention_heads"],
        f"{family}.attention.head_count_kv": SIZES["num_key_value_heads"],
        f"{family}.attention.key_length": SIZES["head_dim"],
        f"{family}.attention.value_length": SIZES["head_dim"],
        f"{family}.rope.freq_base": theta,
        f"{family}.attention.layer_norm_rms_epsilon": SIZES["rms_norm_eps"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": {"llama": "llama-bpe"}.get(family, "qwen2"),
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [int(kind) for kind in TOKEN_TYPES],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": IDS["<|endoftext|>"],
        "tokenizer.ggml.eos_token_id": IDS["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": IDS["<|endoftext|>"],
        "tokenizer.chat_template": TEMPLATE,
    }


def _write_gguf(path, metadata, tensors, types=None, split=0):
    """Writes a file.

    Args:
      split: tensors of each file; 0 for all in one.
      types: type by name of tensor; F32 for the others. Arrays of bytes are already in their type.
    """
    writer = gguf.GGUFWriter(path, metadata["general.architecture"], split_max_tensors=split)
    for key, value in metadata.items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array in tensors.items():
        kind = (types or {}).get(name, TYPES.F32)
        data = array if array.dtype == np.uint8 else gguf.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_model(path, model, family, *, types=None, metadata=None, tensors=None, split=0):
    """Writes a model, with changes: None removes a metadata key or a tensor."""
    stored = {name: array for name, array in (_gguf_tensors(model, family) | (tensors or {})).items() if array is not None}
    return _write_gguf(path, _metadata(family) | (metadata or {}), stored, types, split)


def _matrices(model, family):
    return [name for name, array in _gguf_tensors(model, family).items() if array.ndim > 1]


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 25)[None] * 7 % SIZES["vocab_size"]).logits.numpy()


def _load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A file to import, and its model."""
    model = _random_model("qwen2")
    return _write_model(tmp_path_factory.mktemp("qwen") / "model.gguf", model, "qwen2"), model


# ---------------------------------------------------------------------- logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_file_gives_the_models_logits(family, tied, tmp_path):
    model = _random_model(family, tied=tied)
    source = _write_model(tmp_path / "model.gguf", model, family)
    imported = import_gguf.import_gguf(source, tmp_path / "out")
    assert imported.config["tie_word_embeddings"] is tied
    loaded = _load(tmp_path / "out")
    assert type(loaded) is _classes(family)[1]
    np.testing.assert_array_equal(_logits(loaded), _logits(model))
    # transformers assumes a head size for qwen3 instead of reading it, so it gets the config.
    reference = _classes(family)[1].from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32, config=model.config).eval()
    np.testing.assert_allclose(_logits(loaded), _logits(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_may_be_wider_than_the_model(family, tmp_path):
    model = _random_model(family, head_dim=32)
    sizes = {f"{family}.attention.{name}_length": 32 for name in ("key", "value")}
    import_gguf.import_gguf(_write_model(tmp_path / "model.gguf", model, family, metadata=sizes), tmp_path / "out")
    np.testing.assert_array_equal(_logits(_load(tmp_path / "out")), _logits(model))


def _unpack_by_hand(data, kind):
    """Values of Q8_0 or Q4_0 blocks, from ggml's definition: a float16 scale and 32 integers."""
    size = {TYPES.Q8_0: 34, TYPES.Q4_0: 18}[kind]
    blocks = data.reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == TYPES.Q8_0:
        values = blocks[:, 2:].view(np.int8).astype(np.float32)
    else:
        values = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32) - 8
    return (scale * values).reshape(data.shape[0], -1)


@pytest.mark.parametrize("kind", [TYPES.Q8_0, TYPES.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_file_gives_the_logits_of_the_dequantised_model(family, kind, tmp_path):
    model = _random_model(family)
    source = _write_model(tmp_path / "model.gguf", model, family, types=dict.fromkeys(_matrices(model, family), kind))
    import_gguf.import_gguf(source, tmp_path / "out")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                values = _unpack_by_hand(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(values).to(torch.bfloat16).float())
    np.testing.assert_array_equal(_logits(_load(tmp_path / "out")), _logits(model))


@pytest.mark.parametrize("output", [TYPES.Q8_0, TYPES.Q4_0], ids=lambda kind: kind.name)
def test_tied_matrix_stored_twice_becomes_one_from_the_better_copy(output, tmp_path):
    model = _random_model("qwen2", tied=True)
    embedding = model.model.embed_tokens.weight.detach().numpy()
    other = TYPES.Q5_0
    source = _write_model(
        tmp_path / "model.gguf",
        model,
        "qwen2",
        types={"token_embd.weight": other, "output.weight": output},
        tensors={"output.weight": embedding},
    )
    imported = import_gguf.import_gguf(source, tmp_path / "out")
    better = output if output == TYPES.Q8_0 else other
    assert imported.config["tie_word_embeddings"] is True
    assert "twice" in imported.remarks[0]
    assert ("output.weight is used" in imported.remarks[0]) == (better == output)
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(embedding, better), better)).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"].astype(np.float32), expected)


def test_head_that_was_trained_away_from_the_embedding_stays_separate(tmp_path):
    model = _random_model("qwen2")
    embedding = model.model.embed_tokens.weight.detach()
    with torch.no_grad():
        model.lm_head.weight.copy_((embedding * 1.25).to(torch.bfloat16))  # 20% of its size away: more than Q8_0 explains
    types = {"token_embd.weight": TYPES.Q8_0, "output.weight": TYPES.Q8_0}
    imported = import_gguf.import_gguf(_write_model(tmp_path / "model.gguf", model, "qwen2", types=types), tmp_path / "out")
    assert imported.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")


# ---------------------------------------------------------------------- types of tensors


def _random_blocks(kind, rows, columns):
    """Random bytes of a type, with finite float16 scales."""
    rng = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // block, size), np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    for offset in scales.get(kind.name, (0,)):
        blocks[:, offset : offset + 2] = rng.uniform(-1, 1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def _five_bits_by_hand(data, kind):
    """Values of Q5_0 or Q5_1 blocks, bit by bit: scale, (minimum,) 32 fifth bits, 32 nibbles; values i and i + 16 share a byte."""
    start = 2 if kind == TYPES.Q5_0 else 4
    out = []
    for block in data.reshape(-1, start + 20):
        scale, *minimum = block[:start].copy().view(np.float16).astype(np.float32)
        fifth = int.from_bytes(block[start : start + 4].tobytes(), "little")
        nibbles = block[start + 4 :]
        quants = [int(nibbles[i % 16]) >> (4 * (i // 16)) & 15 | (fifth >> i & 1) << 4 for i in range(32)]
        out += [scale * np.float32(q) + minimum[0] if minimum else scale * np.float32(q - 16) for q in quants]
    return np.array(out, np.float32).reshape(data.shape[0], -1)


def _expected_values(data, kind):
    """Values of stored rows by another implementation than the package gguf."""
    if kind.name in ("F32", "F16"):
        return data.astype(np.float32)
    if kind.name == "BF16":
        return torch.from_numpy(data.copy()).view(torch.bfloat16).float().numpy()
    if kind.name in ("Q5_0", "Q5_1"):
        return _five_bits_by_hand(data, kind)
    from transformers.integrations.gguf import dequant as torch_dequant

    return torch_dequant.dequantize(torch.from_numpy(data.copy()), int(kind)).reshape(data.shape[0], -1).numpy()


@pytest.mark.parametrize("name", gguf_tensors.TYPES)
def test_every_type_is_dequantised(name, monkeypatch):
    monkeypatch.setattr(gguf_tensors, "_CHUNK", 3 * 512)  # several chunks, the last one smaller
    kind, shape = TYPES[name], (7, 512)
    if name in ("F32", "F16", "BF16"):
        data = gguf.quantize(np.random.default_rng(0).standard_normal(shape, np.float32), kind)
    else:
        data = _random_blocks(kind, *shape)
    values = gguf_tensors.read(StoredTensor("blk.0.ffn_up.weight", name, shape, data))
    assert values.shape == shape
    expected = torch.from_numpy(_expected_values(data, kind)).to(torch.bfloat16).float().numpy()
    assert np.isfinite(expected).all()
    # Two float32 orders of operations may round to neighbouring values of bfloat16.
    np.testing.assert_allclose(values.astype(np.float32), expected, rtol=2**-7, atol=1e-6)
    assert (values.astype(np.float32) == expected).mean() > 0.99


def test_noise_bounds_hold_for_types_that_gguf_can_write():
    values = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    for name in ("F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"):
        error = gguf.dequantize(gguf.quantize(values, TYPES[name]), TYPES[name]) - values
        assert math.sqrt(np.mean(error**2) / np.mean(values**2)) < gguf_tensors._NOISE[name], name


def test_restore_order_undoes_llama_cpps_permutation():
    rows = np.arange(6 * 16 * 3).reshape(96, 3)
    permuted = _permute(rows, 6)
    assert not np.array_equal(permuted, rows)
    np.testing.assert_array_equal(gguf_tensors.restore_order(permuted, 6), rows)


# ---------------------------------------------------------------------- llama3's rope scaling


def _transformers_factors(head_size, theta, scaling):
    """The divisors of the rotary frequencies in transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(head_dim=head_size, max_position_embeddings=131_072, rope_parameters={"rope_theta": theta, **scaling})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    return 1 / (theta ** (torch.arange(0, head_size, 2) / head_size)) / scaled


@pytest.mark.parametrize(
    ("factor", "low", "high", "length"),
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (8.0, 2.0, 6.0, 4096), (4.0, 1.0, 8.0, 2048)],
)
@pytest.mark.parametrize("head_size", [64, 128])
def test_llama3_scaling_is_recovered_from_its_factors(head_size, factor, low, high, length):
    given = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    factors = _transformers_factors(head_size, 500_000.0, given).numpy()
    np.testing.assert_allclose(llama3_factors(head_size, 500_000.0, given), factors, rtol=1e-5)
    recovered = recover_llama3_scaling(factors, 500_000.0)
    assert recovered is not None
    np.testing.assert_allclose(_transformers_factors(head_size, 500_000.0, recovered), factors, rtol=1e-5)
    if low == 1:
        assert recovered == given
    assert isinstance(recovered["original_max_position_embeddings"], int)


def test_llama3_scaling_reaches_the_folder(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = _random_model("llama", rope_parameters={"rope_theta": 500_000.0, **scaling})
    factors = _transformers_factors(SIZES["head_dim"], 500_000.0, scaling).numpy()
    source = _write_model(
        tmp_path / "model.gguf",
        model,
        "llama",
        metadata={"llama.rope.freq_base": 500_000.0},
        tensors={"rope_freqs.weight": factors},
    )
    assert import_gguf.import_gguf(source, tmp_path / "out").config["rope_scaling"] == scaling
    np.testing.assert_array_equal(_logits(_load(tmp_path / "out")), _logits(model))


@pytest.mark.parametrize(("length", "remarked"), [(131_072, True), (8192, False)])
def test_early_conversion_of_llama_3_1_is_remarked(length, remarked, tmp_path):
    metadata = {"llama.rope.freq_base": 500_000.0, "llama.context_length": length}
    source = _write_model(tmp_path / "model.gguf", _random_model("llama"), "llama", metadata=metadata)
    remarks = import_gguf.import_gguf(source, tmp_path / "out").remarks
    assert any("no rope_freqs.weight" in remark for remark in remarks) is remarked


def test_factors_of_another_scaling_are_an_error(tmp_path):
    factors = np.array([1, 1, 1.5, 1.2, 3, 2, 8, 8], np.float32)
    assert recover_llama3_scaling(factors, 10_000.0) is None
    source = _write_model(tmp_path / "model.gguf", _random_model("llama"), "llama", tensors={"rope_freqs.weight": factors})
    with pytest.raises(WeightsError, match=r"rope_freqs.weight.*Supported rope scalings: none and llama3"):
        import_gguf.import_gguf(source, tmp_path / "out")


# ---------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "smollm"])
def test_tokenizer_equals_transformers(pre, tmp_path):
    family = "qwen2" if pre == "qwen2" else "llama"
    source = _write_model(
        tmp_path / "model.gguf",
        _random_model(family),
        family,
        metadata={"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False},
    )
    import_gguf.import_gguf(source, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=source.name)
    # transformers' import does not know that SmolLM splits numbers into digits.
    for text in [text for text in TEXTS if pre != "smollm" or not re.search(r"\d", text)]:
        ids = tokenizer(text).input_ids
        assert ids == reference(text).input_ids, text
        assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "café 😀"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids == reference.apply_chat_template(chat, return_dict=False)
    assert ids[0] == IDS["<|im_start|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\ncafé 😀\n"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == IDS["<tool_call>"] + 1  # without the padding of the vocabulary


@pytest.mark.parametrize(("pre", "pieces"), [("qwen2", ["1", "2", "3", "4", "5"]), ("llama-bpe", ["123", "45"]), ("smollm", list("12345"))])
def test_digits_are_split_as_in_each_family(pre, pieces, tmp_path):
    source = _write_model(tmp_path / "m.gguf", _random_model("llama"), "llama", metadata={"tokenizer.ggml.pre": pre})
    import_gguf.import_gguf(source, tmp_path / "out")
    splitter = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str("12345")] == pieces


def test_qwen_composes_accents_as_its_published_tokenizer_does(qwen, tmp_path):
    import_gguf.import_gguf(qwen[0], tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("cafe\u0301").input_ids == tokenizer("caf\u00e9").input_ids


@pytest.mark.parametrize(("pre", "stored", "expected"), [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", True, True)])
def test_first_token_is_added_as_the_metadata_or_the_family_says(pre, stored, expected, tmp_path):
    metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": stored}
    import_gguf.import_gguf(_write_model(tmp_path / "m.gguf", _random_model("llama"), "llama", metadata=metadata), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer("hello").input_ids[0] == IDS["<|endoftext|>"]) is expected
    assert tokenizer("hello", add_special_tokens=False).input_ids[0] != IDS["<|endoftext|>"]


def test_generation_config_lists_all_stop_ids(qwen, tmp_path):
    import_gguf.import_gguf(qwen[0], tmp_path / "out")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [IDS["<|im_end|>"], IDS["<|endoftext|>"]]
    assert generation.pad_token_id == IDS["<|endoftext|>"]


def test_config_names_a_version_of_transformers_that_trusts_the_tokenizer(qwen, tmp_path):
    """Without the version, or with one below 5, transformers 5.17 warns of a fault that only tokenizers of Mistral have."""
    import_gguf.import_gguf(qwen[0], tmp_path / "out")
    version = json.loads((tmp_path / "out" / "config.json").read_text())["transformers_version"]
    assert version == transformers.__version__
    assert int(version.split(".")[0]) >= 5


def test_missing_chat_template_is_remarked(tmp_path):
    source = _write_model(tmp_path / "m.gguf", _random_model("qwen2"), "qwen2", metadata={"tokenizer.chat_template": None})
    imported = import_gguf.import_gguf(source, tmp_path / "out")
    assert any("no chat template" in remark for remark in imported.remarks)
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


# ---------------------------------------------------------------------- folders


def test_shards_have_an_index_and_the_same_logits(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    source, model = qwen
    imported = import_gguf.import_gguf(source, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == imported.files > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == imported.total == 2 * sum(p.numel() for p in model.parameters())
    np.testing.assert_array_equal(_logits(_load(tmp_path / "out")), _logits(model))


def test_progress_reaches_the_total(qwen, tmp_path):
    calls = []
    imported = import_gguf.import_gguf(qwen[0], tmp_path / "out", lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (imported.total, imported.total)


def test_memory_is_one_tensor(tmp_path, monkeypatch):
    for name, size in {"num_hidden_layers": 12, "intermediate_size": 1024, "hidden_size": 288}.items():
        monkeypatch.setitem(SIZES, name, size)
    model = _random_model("llama")
    source = _write_model(tmp_path / "m.gguf", model, "llama", types=dict.fromkeys(_matrices(model, "llama"), TYPES.Q8_0))
    tracemalloc.start()
    imported = import_gguf.import_gguf(source, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 1024 * 288 * 4  # in float32
    assert peak < 5 * largest < imported.total / 3


def test_interrupted_import_can_be_repeated(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    read, calls = gguf_tensors.read, []

    def interrupt(tensor, heads=0):
        calls.append(tensor.name)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return read(tensor, heads)

    monkeypatch.setattr(gguf_tensors, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_gguf.import_gguf(qwen[0], tmp_path / "out")
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob(".*.tmp"))
    import_gguf.import_gguf(qwen[0], tmp_path / "out")
    np.testing.assert_array_equal(_logits(_load(tmp_path / "out")), _logits(qwen[1]))


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_folder_with_other_weights_is_left_alone(name, qwen, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"weights")
    (out / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=rf"{re.escape(str(out))} already contains a model: .*--out"):
        import_gguf.import_gguf(qwen[0], out)
    assert sorted(file.name for file in out.iterdir()) == sorted([name, "config.json"])
    assert (out / name).read_bytes() == b"weights"


def test_too_little_space_is_an_error_before_anything_is_written(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(import_gguf.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(WeightsError, match=r"1,000 bytes free"):
        import_gguf.import_gguf(qwen[0], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_folder_below_a_file_is_an_error(qwen, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"Cannot write to .*--out"):
        import_gguf.import_gguf(qwen[0], tmp_path / "file" / "out")


# ---------------------------------------------------------------------- reading files


def test_file_is_read_as_the_package_gguf_reads_it(tmp_path):
    arrays = {
        "vector": np.arange(7, dtype=np.float32),
        "matrix": np.arange(192, dtype=np.float32).reshape(3, 64),
        "cube": np.ones((2, 3, 32), np.float32),
    }
    types = {"matrix": TYPES.Q4_0, "cube": TYPES.F16}
    metadata = _metadata("llama") | {
        "a.flag": True,
        "a.negative": -1.5,
        "a.bytes": [1, 2, 3],
        "a.texts": ["é", ""],
        "a.flags": [True, False],
    }
    source = _write_gguf(tmp_path / "model.gguf", metadata, arrays, types)
    file, reference = GgufFile(source), gguf.GGUFReader(source)
    keys = [key for key in reference.fields if not key.startswith("GGUF.")]
    assert list(file._metadata) == keys
    for key in keys:
        assert file._metadata[key] == reference.fields[key].contents(), key
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    for expected in reference.tensors:
        tensor = file.tensors[expected.name]
        assert tensor.shape == arrays[expected.name].shape
        assert tensor.type == expected.tensor_type.name
        assert tensor.data.dtype == expected.data.dtype
        np.testing.assert_array_equal(tensor.data, expected.data)


def test_split_file_is_read_as_one(qwen, tmp_path):
    _write_model(tmp_path / "model.gguf", qwen[1], "qwen2", split=10)
    parts = [tmp_path / f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert sorted(tmp_path.iterdir()) == parts
    import_gguf.import_gguf(parts[0], tmp_path / "out")
    np.testing.assert_array_equal(_logits(_load(tmp_path / "out")), _logits(qwen[1]))
    assert "Set --gguf to the first part, model-00001-of-00003.gguf" in str(_refused(parts[1], tmp_path / "other"))
    parts[2].unlink()
    assert "missing: model-00003-of-00003.gguf" in str(_refused(parts[0], tmp_path / "other"))


# ---------------------------------------------------------------------- errors of files


def _refused(source, out):
    """The error of an import, which must name the file and write nothing."""
    with pytest.raises(DiscoverError) as caught:
        import_gguf.import_gguf(source, out)
    assert str(source) in str(caught.value)
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize("part", [4, 16, 100, 3000, 0.2, 0.5, 0.999])
def test_truncated_file(part, qwen, tmp_path):
    whole = qwen[0].read_bytes()
    source = tmp_path / "model.gguf"
    source.write_bytes(whole[: part if isinstance(part, int) else int(len(whole) * part)])
    error = _refused(source, tmp_path / "out")
    assert isinstance(error, WeightsError)
    assert "truncated or damaged" in str(error)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip archive", b"{}"])
def test_file_that_is_not_gguf(content, tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(content)
    assert "is not a GGUF file" in str(_refused(source, tmp_path / "out"))


def test_missing_file_and_folder_as_file(tmp_path):
    assert "No such file" in str(_refused(tmp_path / "absent.gguf", tmp_path / "out"))
    (tmp_path / "folder").mkdir()
    assert "directory" in str(_refused(tmp_path / "folder", tmp_path / "out"))


BAD_METADATA = {
    "architecture": ({"general.architecture": "gemma3"}, WeightsError, r"'gemma3'\. Supported: llama, qwen2, qwen3"),
    "experts": ({"qwen2.expert_count": 8}, WeightsError, "mixture of 8 experts"),
    "window": ({"qwen2.attention.sliding_window": 4096}, WeightsError, "sliding window of 4096"),
    "yarn": ({"qwen2.rope.scaling.type": "yarn"}, WeightsError, "rope scaling 'yarn'. Supported: none, and llama3"),
    "partial rope": ({"qwen2.rope.dimension_count": 8}, WeightsError, "rope.dimension_count is 8"),
    "missing size": ({"qwen2.block_count": None}, WeightsError, "lacks the metadata key 'qwen2.block_count'"),
    "wrong type": ({"qwen2.block_count": "two"}, WeightsError, "'qwen2.block_count' must be an integer; got 'two'"),
    "sizes per layer": ({"qwen2.attention.head_count_kv": [2, 4]}, WeightsError, "must be an integer"),
    "zero heads": ({"qwen2.attention.head_count": 0}, WeightsError, "head_count is 0"),
    "more layers": ({"qwen2.block_count": 3}, WeightsError, r"lacks 12 of the .* blk\.2\."),
    "name of a part": ({"split.count": 3, "split.no": 0}, WeightsError, "part 1 of 3.*'-00001-of-00003.gguf'"),
    "sentencepiece": ({"tokenizer.ggml.model": "llama"}, TokenizerError, r"kind 'llama'\. Supported: 'gpt2'"),
    "splitting": ({"tokenizer.ggml.pre": "tekken"}, TokenizerError, "is 'tekken'. Supported: llama-bpe"),
    "no splitting": ({"tokenizer.ggml.pre": None}, TokenizerError, "is 'default'. Supported: llama-bpe"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, WeightsError, "lacks the metadata key 'tokenizer.ggml.tokens'"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, WeightsError, "352 tokens and 2 token types"),
    "twice": ({"tokenizer.ggml.tokens": [*TOKENS[:8], TOKENS[0], *TOKENS[9:]]}, TokenizerError, "1 tokens more than once"),
    "merge of three": ({"tokenizer.ggml.merges": ["a b c"]}, TokenizerError, "'a b c'"),
    "merge of nothing": ({"tokenizer.ggml.merges": ["zz qq"]}, TokenizerError, "give no tokenizer"),
    "stop id": ({"tokenizer.ggml.eos_token_id": 999}, TokenizerError, "eos_token_id is 999.*352 tokens"),
    "no stop id": ({"tokenizer.ggml.eos_token_id": None}, TokenizerError, "lacks the metadata key 'tokenizer.ggml.eos_token_id'"),
    "more tokens": (
        {"tokenizer.ggml.tokens": [*TOKENS, "extra"], "tokenizer.ggml.token_type": [*map(int, TOKEN_TYPES), 1]},
        WeightsError,
        "353 tokens, but embeddings of only 352",
    ),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata(case, qwen, tmp_path):
    changes, error, message = BAD_METADATA[case]
    refused = _refused(_write_model(tmp_path / "model.gguf", qwen[1], "qwen2", metadata=changes), tmp_path / "out")
    assert isinstance(refused, error)
    assert re.search(message, str(refused)), refused


BAD_TENSORS = {
    "missing": ({"blk.1.attn_k.bias": None}, r"lacks 1 of the 26 tensors .* blk\.1\.attn_k\.bias"),
    "no embedding": ({"token_embd.weight": None}, "token_embd.weight"),
    "unknown": ({"blk.0.ffn_gate_inp.weight": np.ones((4, 96), np.float32)}, "does not have: blk.0.ffn_gate_inp.weight"),
    "shape": ({"blk.0.ffn_up.weight": np.ones((95, 96), np.float32)}, r"blk.0.ffn_up.weight has \(95, 96\), expected \(160, 96\)"),
    "vocabulary of the head": ({"output.weight": np.ones((351, 96), np.float32)}, r"output.weight has \(351, 96\), expected \(352, 96\)"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case, qwen, tmp_path):
    changes, message = BAD_TENSORS[case]
    refused = _refused(_write_model(tmp_path / "model.gguf", qwen[1], "qwen2", tensors=changes), tmp_path / "out")
    assert isinstance(refused, WeightsError)
    assert re.search(message, str(refused)), refused


def test_unsupported_type_of_a_tensor(qwen, tmp_path):
    source = tmp_path / "model.gguf"
    block, size = gguf.GGML_QUANT_SIZES[TYPES.MXFP4]
    packed = np.zeros((160, 96 // block * size), np.uint8)
    _write_model(source, qwen[1], "qwen2", types={"blk.1.ffn_up.weight": TYPES.MXFP4}, tensors={"blk.1.ffn_up.weight": packed})
    message = str(_refused(source, tmp_path / "out"))
    assert "blk.1.ffn_up.weight is MXFP4" in message
    assert "Supported: F32, F16, BF16, Q8_0" in message


def _replaced(source, path, old, new):
    """A copy of a file with the only occurrence of some bytes replaced by others of the same length."""
    content = source.read_bytes()
    assert content.count(old) == 1
    assert len(new) == len(old)
    path.write_bytes(content.replace(old, new))
    return path


def _entry(tensor, kind):
    """The header's bytes of a matrix of the file `qwen`: name, axes, shape and type."""
    name = tensor.encode()
    return len(name).to_bytes(8, "little") + name + struct.pack("<IQQI", 2, 96, 160, kind)


def test_type_that_the_package_does_not_know(qwen, tmp_path):
    name = "blk.1.ffn_up.weight"
    source = _replaced(qwen[0], tmp_path / "model.gguf", _entry(name, 0), _entry(name, 999))
    assert f"{name} is type 999" in str(_refused(source, tmp_path / "out"))


def test_damaged_header(qwen, tmp_path):
    source = tmp_path / "model.gguf"
    for old, new, message in [
        (b"GGUF\3\0\0\0", b"GGUF\1\0\0\0", "version 1 of the GGUF format"),
        (b"GGUF\3\0\0\0", b"GGUF\0\0\0\3", "big-endian"),
        (b"qwen2.block_count", b"qwen2.\xff\xffock_count", "not valid UTF-8"),
        (_entry("blk.1.ffn_up.weight", 0), _entry("blk.0.ffn_up.weight", 0), "'blk.0.ffn_up.weight' twice"),
        (struct.pack("<Q", 17) + b"qwen2.block_count", struct.pack("<Q", 2**60) + b"qwen2.block_count", "needs more than"),
        (b"blk.1.ffn_up.weight" + struct.pack("<I", 2), b"blk.1.ffn_up.weight" + struct.pack("<I", 9), "has 9 axes"),
    ]:
        error = str(_refused(_replaced(qwen[0], source, old, new), tmp_path / "out"))
        assert message in error


def test_rows_that_do_not_fit_the_blocks_of_their_type(qwen, tmp_path):
    name = "blk.1.ffn_up.weight"
    source = _replaced(qwen[0], tmp_path / "model.gguf", _entry(name, 0), _entry(name, int(TYPES.Q4_K)))
    assert f"rows of {name} have 96 values, but Q4_K stores 256 at a time" in str(_refused(source, tmp_path / "out"))


def test_missing_package(qwen, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WeightsError, match=r"requires the package gguf.*discover_jax\[gguf\]"):
        import_gguf.import_gguf(qwen[0], tmp_path / "out")


# ---------------------------------------------------------------------- command


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["import_gguf", *arguments])
    import_gguf.main()


def test_command_says_what_it_wrote_and_what_to_do_next(qwen, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    _run(monkeypatch, f"--gguf={qwen[0]}", f"--out={out}")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("Wrote qwen2 (2 layers, width 96, separate head)") for line in lines)
    assert f"--config.model.weights={out}" in lines[-1]
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_command_prints_an_error_without_traceback(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        _run(monkeypatch, f"--gguf={tmp_path / 'absent.gguf'}", f"--out={tmp_path / 'out'}")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: Cannot read")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.tokens", [1, 2, 3], r"tokens must be a list of texts; got '1'"),
        ("tokenizer.ggml.token_type", [0.5, 1.5], r"token_type must be a list of integers; got '0.5'"),
        ("tokenizer.ggml.merges", [1, 2], r"merges must be a list of texts; got '1'"),
    ],
)
def test_lists_of_another_type_are_refused(key, value, message, tmp_path):
    source = _write_model(tmp_path / "m.gguf", _random_model("qwen2"), "qwen2", metadata={key: value})
    with pytest.raises(WeightsError, match=message):
        import_gguf.import_gguf(source, tmp_path / "out")


def test_fifos_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(WeightsError, match="FIFO"):
        import_gguf.import_gguf(tmp_path / "m.gguf", tmp_path / "out")
