"""Trains the apprentice's SentencePiece tokenizer on the corpus. It round-trips any text, and never encodes text as a special token."""

import random
from collections.abc import Iterator
from pathlib import Path

from discover_jax.apprentice.corpus import draw_document
from discover_jax.text.tokenizer import SPECIAL_TOKENS

VOCAB_SIZE = 2048
PAD = "<|endoftext|>"
END = "<|return|>"
DOCUMENTS = 3000
_ASCII = "".join(map(chr, range(33, 127)))
"""Each printable character has a piece, so that programs outside the grammar are not encoded as bytes."""


def train_tokenizer(path: Path, *, seed: int, vocab_size: int = VOCAB_SIZE, documents: int = DOCUMENTS) -> None:
    """Writes a byte-pair SentencePiece model to `path`. Its special tokens are control pieces. The same seed gives the same model.

    A piece may contain spaces and begin with a line break, so frequent lines take few tokens; it never spans two lines. Each digit is a
    piece, so numbers are not limited to the grammar's values.
    """
    import sentencepiece

    with path.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(seed, documents),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            control_symbols=list(SPECIAL_TOKENS),
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            required_chars=_ASCII,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=64,
            max_sentence_length=100_000,
            num_threads=1,
            minloglevel=1,
        )


def _lines(seed: int, documents: int) -> Iterator[str]:
    """Lines of text for the trainer. Each begins with its line break, because the trainer drops one at the end."""
    rng = random.Random(f"tokenizer {seed}")
    yield from _ASCII  # some versions of the trainer fail if no text has a required character
    for _ in range(documents):
        document = draw_document(rng)
        yield from ("user", "assistant", "analysis", "final")
        for text in (document.prompt, document.plan, f"```python\n{document.code}\n```"):
            first, *rest = text.split("\n")
            yield first
            yield from ("\n" + line for line in rest)
