"""Documents, their token ids, round trips of the tokenizer, and packing."""

import random
from pathlib import Path

import numpy as np
import pytest

from discover_jax.apprentice import batches, corpus, programs
from discover_jax.apprentice.tokenizer import train_tokenizer
from discover_jax.exceptions import CapacityError
from discover_jax.text import code as code_text
from discover_jax.text import harmony
from discover_jax.text.tokenizer import SPECIAL_TOKENS, SentencePieceTokenizer

SHIPPED = Path(corpus.__file__).parent / "weights" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(SHIPPED)


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [corpus.draw_document(rng) for _ in range(300)]


def test_documents_are_of_both_kinds_and_edits_show_their_parent(documents):
    edits = [d for d in documents if "previous score: " in d.prompt]
    assert 0.4 < len(edits) / len(documents) < 0.8
    for document in documents:
        assert document.prompt.startswith("competition: ")
        if document in edits:
            assert document.plan.startswith("change: ")
            assert document.prompt.endswith("\n```\nimprove run()")
            parent = document.prompt.split("```python\n")[1].split("\n```")[0]
            compile(parent, "parent", "exec")
            assert parent != document.code
        else:
            assert document.plan.startswith("plan: ")
            assert document.prompt.endswith(" is better\nwrite run()")


def test_prompts_do_not_depend_on_the_program():
    """A program comes with any competition, metric, direction and score."""
    prompts = {corpus.draw_document(random.Random(seed)).prompt.split("\n```")[0] for seed in range(200)}
    heads = {prompt.split("\n")[0] for prompt in prompts}
    assert len(heads) > 100
    assert {"competition: spaceship-titanic", "competition: digits-parity"} <= heads
    assert any("higher is better" in prompt for prompt in prompts)
    assert any("lower is better" in prompt for prompt in prompts)


def test_encoded_documents_parse_back_to_their_program(documents, tokenizer):
    for document in documents:
        ids, prompt_length = corpus.encode(document, tokenizer)
        assert ids[:prompt_length] == harmony.render([harmony.Message("user", document.prompt)], tokenizer)
        assert ids[-1] == tokenizer.special("<|return|>")
        reply = harmony.parse(ids[prompt_length:], tokenizer)
        assert reply.thinking == document.plan
        assert not reply.truncated
        assert code_text.extract_program(reply.final, False) == document.code
        assert len(ids) - prompt_length <= 350


AWKWARD = (
    "",
    " ",
    "\n",
    "\n\n  \t\n",
    "\r\n line \r\n",
    "    def run():\n\treturn 1\n",
    "a  b   c    d",
    "▁ ▁▁ \u2581x",
    "naïve café Ünïcödé 日本語 🚀 \u200b\u0000\ufeff",
    "<|end|><|return|><|start|>assistant<|channel|>final<|message|>",
    "<|im_start|> <0x0A> <unk> <s> </s>",
    "<|end|" + "|>",
    "x" * 1000,
    "".join(map(chr, range(256))),
)


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_round_trips_without_special_ids(text, tokenizer):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.special(name) for name in SPECIAL_TOKENS} & set(ids)


def test_random_text_round_trips(tokenizer):
    rng = random.Random(5)
    special = {tokenizer.special(name) for name in SPECIAL_TOKENS}
    for _ in range(300):
        text = "".join(
            rng.choice(
                ("\n", "    ", "\t", "\r", " ", "<|end|>", chr(rng.randint(1, 0xD7FF)), chr(rng.randint(0x10000, 0x10FFFF)), "X[num] =")
            )
            for _ in range(rng.randint(1, 40))
        )
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not special & set(ids)


def test_tokenizer_is_a_function_of_the_seed(tmp_path):
    models = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_tokenizer(tmp_path / name, seed=seed, vocab_size=700, documents=50)
        models.append((tmp_path / name).read_bytes())
    assert models[0] == models[1] != models[2]


@pytest.mark.slow  # the shipped file does not change
def test_the_shipped_tokenizer_can_be_reproduced(tmp_path):
    train_tokenizer(tmp_path / "tokenizer.model", seed=0)
    assert (tmp_path / "tokenizer.model").read_bytes() == SHIPPED.read_bytes()


def test_batches_contain_whole_documents(tokenizer):
    batch = batches.draw_batch(tokenizer, rows=6, row_tokens=512, seed=3, index=7)
    assert batch.tokens_BT.shape == (6, 512)
    filled = batch.segments_BT > 0
    assert filled.mean() > 0.75
    end = tokenizer.special("<|return|>")
    for row in range(6):
        for segment in range(1, batch.segments_BT[row].max() + 1):
            span = np.flatnonzero(batch.segments_BT[row] == segment)
            assert np.array_equal(span, np.arange(span[0], span[-1] + 1))
            assert np.array_equal(batch.positions_BT[row, span], np.arange(len(span)))
            ids = [*batch.tokens_BT[row, span], batch.targets_BT[row, span[-1]]]
            assert np.array_equal(batch.targets_BT[row, span], ids[1:])
            assert ids[-1] == end
            # The mask begins after the prompt: at the first token after <|start|>assistant.
            prompt_length = len(ids) - int(batch.mask_BT[row, span].sum())
            reply = harmony.parse(ids[prompt_length:], tokenizer)
            code = code_text.extract_program(reply.final, False)
            assert code is not None
            compile(code, "reply", "exec")
            assert ids[prompt_length] == tokenizer.special("<|channel|>")
    assert not batch.mask_BT[~filled].any()


def test_batches_depend_on_seed_and_index_not_on_workers(tokenizer):
    expected = [batches.draw_batch(tokenizer, rows=2, row_tokens=512, seed=1, index=i) for i in range(4)]
    with batches.batch_stream(SHIPPED, rows=2, row_tokens=512, seed=1, workers=2) as next_batch:
        for batch in expected:
            got = next_batch()
            for name, array in vars(batch).items():
                assert np.array_equal(array, getattr(got, name)), name
    assert not np.array_equal(expected[0].tokens_BT, expected[1].tokens_BT)


def test_a_row_too_short_for_a_document_is_refused(tokenizer):
    with pytest.raises(CapacityError, match=r"\b64\b.*row_tokens"):
        batches.draw_batch(tokenizer, rows=2, row_tokens=64, seed=0, index=0)


def test_the_longest_documents_fit_the_row():
    """The longest documents are edits of the longest parents, with the most features and models."""
    tokenizer = SentencePieceTokenizer(SHIPPED)
    rng = random.Random(9)
    longest = max((programs.sample(rng) for _ in range(3000)), key=lambda p: len(tokenizer.encode(programs.render(p))))
    assert 2 * len(tokenizer.encode(programs.render(longest))) + 80 < 512
