"""Converts a GGUF file (Qwen2.5, Qwen3, Llama 3.x, SmolLM2) to a Hugging Face folder in bfloat16.

    python -m discover_jax.models.import_gguf --gguf=FILE --out=DIR

The folder gets config.json, generation_config.json, tokenizer.json, tokenizer_config.json (with the chat template) and model*.safetensors.
Memory: one tensor at a time. Quantised weights are dequantised and rounded to bfloat16.
"""

import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from discover_jax.exceptions import DiscoverError, WeightsError
from discover_jax.files import replacement, storage_remedy
from discover_jax.models import gguf_tensors
from discover_jax.models.gguf_config import read_config
from discover_jax.models.gguf_file import GgufFile
from discover_jax.models.gguf_tensors import HF_EMBEDDING, HF_HEAD, Target
from discover_jax.models.gguf_tokenizer import build_tokenizer, read_generation_config, read_vocabulary
from discover_jax.models.layouts import HF_FILE
from discover_jax.models.progress import OnProgress, Progress
from discover_jax.models.shards import INDEX, name_files, split_into_shards

_ITEMSIZE = 2
"""Bytes of a bfloat16."""
_WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.gguf")
"""Patterns of files that contain or list weights."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was written.

    Attributes:
      config: content of config.json.
      total: bytes of all tensors.
      files: number of *.safetensors files.
      remarks: decisions that the file left open, one sentence each.
    """

    config: dict[str, Any]
    total: int
    files: int
    remarks: tuple[str, ...]


def import_gguf(source: str | Path, out: str | Path, on_progress: OnProgress | None = None) -> Imported:
    """Writes the model of a GGUF file as a folder. Each file is replaced atomically; config.json is written last.

    Args:
      out: the folder; created if missing. Files of an earlier import that did not finish are overwritten.

    Raises:
      WeightsError: the file cannot be read or is not supported, or the folder has weights or cannot be written.
      TokenizerError: the file's tokenizer is not supported.
    """
    file, out = GgufFile(source), Path(out)
    config = read_config(file)
    gguf_tensors.check_tensors(file, config)
    tokens, types = read_vocabulary(file)
    if len(tokens) > config["vocab_size"]:
        raise WeightsError(f"{file.path} has {len(tokens)} tokens, but embeddings of only {config['vocab_size']}. Download the file again.")
    generation = read_generation_config(file, tokens, types)
    texts = build_tokenizer(file, tokens, types) | {"generation_config.json": _json(generation)}
    targets, tied, remarks = _place_head(file, config)
    config |= {"tie_word_embeddings": tied, **generation}
    if not file.has("tokenizer.chat_template"):
        remarks.append("The file has no chat template: add one to tokenizer_config.json, or use an instruction-tuned model.")

    if _may_lack_scaling(config):
        remarks.append(
            "The file has Llama 3.1's theta and context but no rope_freqs.weight, so positions are not scaled. The first conversions of"
            " Llama 3.1 lost that tensor: if this is one of them, use a newer file."
        )

    shards = split_into_shards(targets, _size)
    names = name_files(HF_FILE, len(shards))
    total = sum(map(_size, targets))
    _prepare_folder(out, {*names, INDEX} if len(shards) > 1 else {*names}, total)
    progress = Progress(total, on_progress)
    for name, shard in zip(names, shards, strict=True):
        _write(out / name, lambda path, shard=shard: _write_shard(path, shard, file, progress))
    if len(shards) > 1:
        weight_map = {target.name: name for name, shard in zip(names, shards, strict=True) for target in shard}
        texts[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, text in [*texts.items(), ("config.json", _json(config))]:
        _write(out / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return Imported(config, total, len(shards), tuple(remarks))


def _place_head(file: GgufFile, config: dict[str, Any]) -> tuple[list[Target], bool, list[str]]:
    """The tensors to write, whether the head is tied to the embedding, and remarks on that.

    llama.cpp's quantiser may store a tied matrix twice, as embedding and as head, in different types. Such copies become one again.
    """
    targets = gguf_tensors.targets(config)
    embedding, head = file.tensors[gguf_tensors.EMBEDDING], file.tensors.get(gguf_tensors.HEAD)
    if head is None:
        return targets, True, []
    tied, distance = gguf_tensors.is_tied(head, embedding)
    if not tied:
        targets.append(Target(HF_HEAD, head.name, head.shape))
        return targets, False, [f"The head differs from the embedding (relative distance {distance:.2g}), so lm_head.weight is written."]
    better = head if gguf_tensors.is_better(head, embedding) else embedding
    targets[0] = Target(HF_EMBEDDING, better.name, better.shape)
    remark = (
        f"The file stores the tied embedding twice, as {embedding.name} ({embedding.type}) and {head.name} ({head.type}), at a relative"
        f" distance of {distance:.2g}. {better.name} is used for both."
    )
    return targets, True, [remark]


def _may_lack_scaling(config: dict[str, Any]) -> bool:
    """Whether a llama model looks like Llama 3.1 to 3.3 but has no rope scaling."""
    theta, length = config["rope_theta"], config["max_position_embeddings"]
    return config["model_type"] == "llama" and config["rope_scaling"] is None and theta == 500_000 and length > 8192


# ---------------------------------------------------------------------- writing


def _size(target: Target) -> int:
    return math.prod(target.shape) * _ITEMSIZE


def _write_shard(path: Path, shard: list[Target], file: GgufFile, progress: Progress) -> None:
    """Writes a safetensors file one tensor at a time: eight bytes with the header's length, the header, then all values.

    `safetensors.numpy.save_file` would need all tensors in memory. Format: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for target in shard:
        start, end = end, end + _size(target)
        header[target.name] = {"dtype": "BF16", "shape": list(target.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # values start at a multiple of 8 bytes
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for target in shard:
            values = gguf_tensors.read(file.tensors[target.source], target.heads)
            out.write(np.ascontiguousarray(values).view(np.uint8).data)
            progress.add(_size(target))


def _prepare_folder(path: Path, names: set[str], total: int) -> None:
    """Creates the folder and checks that it has no weights but those of an unfinished import, and space for `total` bytes."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        found = {file.name for pattern in _WEIGHTS for file in path.glob(pattern)}
        if (path / "config.json").exists():
            found.add("config.json")  # written last: the import that wrote these files was complete
        else:
            found -= names
        if found:
            raise WeightsError(
                f"{path} already contains a model: {', '.join(sorted(found)[:5])}. Set --out to another folder, or delete these files."
            )
        if (free := shutil.disk_usage(path).free) < total:
            raise WeightsError(
                f"{path} has {free:,} bytes free; the weights need {total:,}. Free some space, or set --out to another disk."
            )
    except OSError as error:
        raise WeightsError(f"Cannot write to {path}: {error}. Set --out to another folder.") from error


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        with replacement(path) as temporary:
            write(temporary)
    except OSError as error:
        raise WeightsError(f"Cannot write {path}: {error}. {storage_remedy(error)} Or set --out to another folder.") from error


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


# ---------------------------------------------------------------------- command


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the GGUF file to read")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    arguments = parser.parse_args()
    started, shown = time.monotonic(), 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if (tenth := 10 * done // total) > shown:
            shown = tenth
            print(f"{done / 1e9:6.2f} of {total / 1e9:.2f} GB, {time.monotonic() - started:.0f} s", flush=True)

    print(f"Reading {arguments.gguf} ...", flush=True)
    try:
        imported = import_gguf(arguments.gguf, arguments.out, show)
    except DiscoverError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    for remark in imported.remarks:
        print(remark)
    config, tied = imported.config, "tied head" if imported.config["tie_word_embeddings"] else "separate head"
    print(
        f"Wrote {config['model_type']} ({config['num_hidden_layers']} layers, width {config['hidden_size']}, {tied}) to {arguments.out}:"
        f" {imported.total / 1e9:.2f} GB in {imported.files} files."
    )
    print(f"Next: set --config.model.weights={arguments.out}, and add --dry_run to see whether a run with it fits.")


if __name__ == "__main__":
    main()
