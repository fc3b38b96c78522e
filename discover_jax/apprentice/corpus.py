"""The documents on which the apprentice is trained. Each has a prompt, a short plan and a program.

There are two kinds. One answers with a fresh program from the grammar. The other, an edit, shows a parent program in the prompt and answers
with one or two changes to it, for better or worse. The competition, the metric and the parent's score in the prompt are random and
independent of the program, because the corpus must not teach which programs are good.
"""

import dataclasses
import random

from discover_jax.apprentice import programs
from discover_jax.text.harmony import Message, render
from discover_jax.text.prompts import brief_text
from discover_jax.text.tokenizer import Tokenizer

EDIT_FRACTION = 0.6

_COMPETITIONS = ("spaceship-titanic", "digits-parity")
_METRICS = ("accuracy", "auc", "f1", "log loss", "error rate", "rmse")
_ONSETS = ("b", "c", "ch", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z")
_RIMES = ("a", "al", "an", "ar", "e", "en", "er", "i", "in", "ing", "o", "on", "or", "u", "y")


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: the user's message, the plan for the channel `analysis`, and the program for the channel `final`."""

    prompt: str
    plan: str
    code: str


def draw_document(rng: random.Random) -> Document:
    """Draws a fresh program or an edit, with its prompt."""
    program = programs.sample(rng)
    if rng.random() >= EDIT_FRACTION:
        return Document(_prompt(None, rng), f"plan: {programs.describe(program)}", programs.render(program))
    child, changes = programs.mutate(program, rng)
    return Document(_prompt(programs.render(program), rng), f"change: {'; '.join(changes)}", programs.render(child))


def encode(document: Document, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Token ids of a document, and the length of its prompt. The last id is <|return|>."""
    prompt = render([Message("user", document.prompt)], tokenizer)
    answer = f"```python\n{document.code}\n```"
    reply = render([Message("assistant", document.plan, "analysis"), Message("assistant", answer, "final")], tokenizer)
    # Drop <|start|>assistant at the beginning, because the prompt ends with it, and <|end|><|start|>assistant at the end.
    opening = len(render([], tokenizer))
    return prompt + reply[opening : -opening - 1] + [tokenizer.special("<|return|>")], len(prompt)


def _prompt(parent: str | None, rng: random.Random) -> str:
    competition = rng.choice(_COMPETITIONS) if rng.random() < 0.2 else f"{_word(rng)}-{_word(rng)}"
    metric = rng.choice(_METRICS) if rng.random() < 0.6 else _word(rng)
    score = rng.choice((rng.random(), rng.uniform(0.4, 0.9), rng.lognormvariate(0, 2)))
    return brief_text(competition, metric, rng.random() < 0.5, None if parent is None else (parent, score))


def _word(rng: random.Random) -> str:
    """An invented name, sometimes with a number, like the name of a competition."""
    syllables = (rng.choice(_ONSETS) + rng.choice(_RIMES) for _ in range(rng.randint(1, 4)))
    return "".join(syllables) + rng.choice(("", "", "", str(rng.randint(1, 2030))))
