"""Small GGUF files, as llama.cpp's converter writes them, and the models that they hold.

Functions that need torch import it themselves: all workers import this file, but one runs all tests with torch (see `TORCH` in conftest).
"""

import json
import re

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from discover_jax.exceptions import DiscoverError
from discover_jax.models import import_gguf

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


def classes_of(family):
    import transformers

    config_class, model_class = FAMILIES[family]
    return getattr(transformers, config_class), getattr(transformers, model_class)


def random_model(family, *, tied=False, **options):
    """A random model whose values are exact in bfloat16."""
    import torch

    config_class, model_class = classes_of(family)
    config = config_class(**{**SIZES, **options}, tie_word_embeddings=tied, attn_implementation="eager")
    torch.manual_seed(1)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.2) + (1.0 if "norm" in name else 0.0)
            parameter.copy_(values.to(torch.bfloat16).float())
    return model


def permute(rows, heads):
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors_of(model, family):
    """The tensors of a model by their GGUF names, as llama.cpp's converter stores them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], SIZES["num_hidden_layers"])
    tensors = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if family == "llama" and (found := re.search(r"\.([qk])_proj\.", name)):
            array = permute(array, SIZES["num_attention_heads" if found[1] == "q" else "num_key_value_heads"])
        tensors[names.get_name(name, (".weight", ".bias"))] = array
    return tensors


def metadata_of(family, theta=10_000.0):
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


def write_gguf(path, metadata, tensors, types=None, split=0):
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


def write_model(path, model, family, *, types=None, metadata=None, tensors=None, split=0):
    """Writes a model, with changes: None removes a metadata key or a tensor."""
    stored = {name: array for name, array in (tensors_of(model, family) | (tensors or {})).items() if array is not None}
    return write_gguf(path, metadata_of(family) | (metadata or {}), stored, types, split)


def matrices_of(model, family):
    return [name for name, array in tensors_of(model, family).items() if array.ndim > 1]


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(torch.arange(1, 25)[None] * 7 % SIZES["vocab_size"]).logits.numpy()


def load_model(folder):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def error_of(source, out):
    """The error of an import, which must name the file and write nothing."""
    with pytest.raises(DiscoverError) as caught:
        import_gguf.import_gguf(source, out)
    assert str(source) in str(caught.value)
    assert not out.exists()
    return caught.value
