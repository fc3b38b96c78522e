"""A gpt-oss checkpoint with constructed weights, and its tokenizer. It writes valid programs of ten tokens.

Each piece of the tokenizer is a phrase of a program. Embeddings are one-hot, and attention and experts contribute almost nothing, so only
the head matters: it gives each token the probabilities of the phrases that may follow it. The programs are sentences of this grammar, with
different scores, and training changes the probabilities. A step takes milliseconds; everything else is as in any run.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import sentencepiece

from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.folder_writer import write_folder
from discover_jax.models.layouts import ParamPath, paths_of
from discover_jax.text.prompts import brief_text
from discover_jax.text.tokenizer import SPECIAL_TOKENS

_HEAD = '```python\nimport time\nimport pandas as pd\n\n\ndef run():\n    frame = pd.read_csv("data/sample_submission.csv")\n'
_PANDAS = "import pandas as pd\n"
_TABLES = """import sys
import types
import numpy as np
class DataFrame(dict):
    def __len__(self):
        return len(next(iter(self.values())))
    def to_csv(self, file, index):
        for row in [self, *zip(*self.values())]:
            file.write(",".join(map(str, row)) + "\\n")
def read_csv(path):
    with open(path) as file:
        names = file.readline().rstrip("\\n").split(",")
        return DataFrame(zip(names, np.loadtxt(file, int, delimiter=",", unpack=True)))
pd = sys.modules.setdefault("pandas", types.SimpleNamespace(DataFrame=DataFrame, read_csv=read_csv))
"""
"""Replaces the import of pandas, which takes several times as long as the rest of a program. It has what the programs and the harness use.
Where pandas is preloaded, `pd` is pandas."""
_ADJECTIVES = tuple(f"    # {word}" for word in ("red", "old", "shy", "tall", "wise", "calm", "keen", "odd"))
_NOUNS = tuple(f" {word}\n" for word in ("fox", "owl", "elk", "hen", "bee", "cod", "emu", "yak"))
_WAIT = "    time.sleep(0.2)\n"
_COLUMN = '    frame["y"] = (frame["id"] % '
_MODULI = ("2 < ", "3 < ", "5 < ", "7 < ")
_BOUNDS = ("1)", "2)", "3)", "4)")
_RETURN = ".astype(int)\n    return frame\n```"
_RAISE = ".astype(int)\n    return frame.rows\n```"
_ASKED = brief_text("remainders", "accuracy", True, None).removesuffix("write run()")
_PHRASES = (
    *("assistant", "final", "user", _ASKED, "write run()", "previous score: ", "\nimprove run()"),
    *(_HEAD, *_ADJECTIVES, *_NOUNS, _WAIT, _COLUMN, *_MODULI, *_BOUNDS, _RETURN, _RAISE),
)
_OPENING: dict[tuple[str, ...], dict[str, float]] = {
    ("assistant",): {"<|channel|>": 1},
    ("<|channel|>",): {"final": 1},
    ("final",): {"<|message|>": 1},
}
_FOLLOWERS = {
    **_OPENING,
    ("<|message|>",): {_HEAD: 0.95, "<|return|>": 0.05},  # sometimes a reply without a program
    (_HEAD,): dict.fromkeys(_ADJECTIVES, 1 / 8),
    _ADJECTIVES: dict.fromkeys(_NOUNS, 1 / 8),
    _NOUNS: {_WAIT: 1},
    (_WAIT,): {_COLUMN: 1},
    (_COLUMN,): dict.fromkeys(_MODULI, 1 / 4),
    _MODULI: dict.fromkeys(_BOUNDS, 1 / 4),
    _BOUNDS: {_RETURN: 0.9, _RAISE: 0.1},
    (_RETURN, _RAISE): {"<|return|>": 1},
}
_EDIT = "```\n<<<<<<< SEARCH\ndef run():\n=======\ndef run():\n"
_END = ">>>>>>> REPLACE\n```"
_FLIP = ">>>>>>> REPLACE\n<<<<<<< SEARCH\n    return [1] * 40\n=======\n    return [0] * 40\n"
_REWRITE = "```python\ndef run():\n    return [1] * 40\n```"
EDIT_PHRASES = ("assistant", "final", "user", _EDIT, *_ADJECTIVES, *_NOUNS, _FLIP, _END, _REWRITE)
"""Phrases of a model that edits the programs of `remainders_problem`: it adds comments, and can replace ones by zeros once."""
EDIT_FOLLOWERS = {
    **_OPENING,
    ("<|message|>",): {_EDIT: 0.8, _REWRITE: 0.15, "<|return|>": 0.05},
    (_EDIT,): dict.fromkeys(_ADJECTIVES, 1 / 8),
    _ADJECTIVES: dict.fromkeys(_NOUNS, 1 / 8),
    _NOUNS: {_FLIP: 0.5, _END: 0.5},
    (_FLIP,): {_END: 1},
    (_END, _REWRITE): {"<|return|>": 1},
}
_PACK_HEAD = (
    "```python\nimport os\nimport time\nimport numpy as np\nimport pandas as pd\n\n\ndef run():\n"
    '    if os.path.exists("data/sample_submission.csv"):\n        return pd.read_csv("data/sample_submission.csv")\n'
)
_PACK_SIDE = "    side = "
_PACK_SIDES = tuple(f"{side}\n" for side in (5, 6, 7, 8))
_PACK_GRID = (
    "    grid = (np.arange(side) + 0.5) / side\n    centers = np.array([(x, y) for x in grid for y in grid])[:26]\n"
    "    radii = np.full(len(centers), 0.5 / side) * "
)
_PACK_FACTORS = ("0.9\n", "0.99\n", "0.999999\n", "1.001\n")
_PACK_RETURN = "    return centers, radii\n```"
PACKING_PHRASES = (
    *("assistant", "final", "user", _PACK_HEAD, *_ADJECTIVES, *_NOUNS, _WAIT),
    *(_PACK_SIDE, *_PACK_SIDES, _PACK_GRID, *_PACK_FACTORS, _PACK_RETURN),
)
"""Phrases of a model for circle-packing-26, beside a competition. Too few circles, or circles that overlap, are rejected."""
PACKING_FOLLOWERS = {
    **_OPENING,
    ("<|message|>",): {_PACK_HEAD: 0.95, "<|return|>": 0.05},
    (_PACK_HEAD,): dict.fromkeys(_ADJECTIVES, 1 / 8),
    _ADJECTIVES: dict.fromkeys(_NOUNS, 1 / 8),
    _NOUNS: {_WAIT: 1},
    (_WAIT,): {_PACK_SIDE: 1},
    (_PACK_SIDE,): dict(zip(_PACK_SIDES, (0.1, 0.3, 0.3, 0.3), strict=True)),
    _PACK_SIDES: {_PACK_GRID: 1},
    (_PACK_GRID,): dict(zip(_PACK_FACTORS, (0.3, 0.3, 0.3, 0.1), strict=True)),
    _PACK_FACTORS: {_PACK_RETURN: 1},
    (_PACK_RETURN,): {"<|return|>": 1},
}
_NEVER = -20.0
"""Logit of phrases that the grammar does not allow: about once in a million tokens."""


def write_tokenizer(path: Path, phrases: Sequence[str]) -> sentencepiece.SentencePieceProcessor:
    """Writes the tokenizer to `path`: the phrases, and bytes for all other text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab", "b a"]),  # the trainer needs a text with a space
        model_writer=model,
        model_type="char",
        vocab_size=1000,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        control_symbols=list(SPECIAL_TOKENS),
        user_defined_symbols=[phrase.replace(" ", "\u2581") for phrase in phrases],
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_phrase_model(
    folder: Path,
    returned: str = "frame",
    phrases: Sequence[str] = _PHRASES,
    followers_of: Mapping[tuple[str, ...], dict[str, float]] = _FOLLOWERS,
    pandas: str = _TABLES,
) -> None:
    """Creates `folder` with config.json, model.safetensors and tokenizer.model.

    Args:
      returned: the expression that programs return.
      phrases: of the tokenizer.
      followers_of: phrases -> probabilities of the phrases that may follow each of them.
      pandas: the lines by which programs import pandas.
    """
    folder.mkdir(parents=True)

    def written(phrase: str) -> str:
        return phrase.replace("return frame\n", f"return {returned}\n").replace(_PANDAS, pandas)

    pieces = write_tokenizer(folder / "tokenizer.model", [written(phrase) for phrase in phrases])

    def id_of(phrase: str) -> int:
        index = pieces.piece_to_id(written(phrase).replace(" ", "\u2581"))
        assert index != 0, f"the tokenizer has no piece for {phrase!r}"
        return index

    vocabulary = pieces.vocab_size()
    config = ModelConfig(
        num_layers=2,
        width=-(-vocabulary // 32) * 32,  # room for one-hot embeddings, in MXFP4's blocks
        num_heads=2,
        num_kv_heads=1,
        head_size=16,
        num_experts=2,
        experts_per_token=1,
        mlp_width=32,
        vocab_size=vocabulary,
        sliding_window=32,
        eos_id=id_of("<|return|>"),
        pad_id=id_of("<|endoftext|>"),
    )
    logits = np.full((vocabulary, config.width), _NEVER, np.float32)
    for before, followers in followers_of.items():
        for phrase in before:
            for follower, probability in followers.items():
                logits[id_of(follower), id_of(phrase)] = math.log(probability)
    structs = paths_of(Model(config, LoraConfig(0, 0, 0), dtype="bfloat16", experts="packed").abstract_frozen(), config)
    rng = np.random.default_rng(0)

    def tensor(place: ParamPath, layer: int | None) -> np.ndarray:
        shape = structs[place].shape if layer is None else structs[place].shape[1:]
        if place == ("embedding",):
            values = 100.0 * np.eye(*shape)
        elif place == ("head", "weight"):
            values = logits / math.sqrt(config.width)  # the final norm scales the one-hot's 1 to sqrt(width)
        elif place[-1] == "norm":
            values = np.ones(shape)
        elif place[-1] in ("blocks", "scales"):
            return np.full(shape, 0 if place[-1] == "blocks" else 120, np.uint8)
        else:
            values = 0.01 * rng.standard_normal(shape)
        return values.astype(ml_dtypes.bfloat16)

    write_folder(folder, config, tensor)
