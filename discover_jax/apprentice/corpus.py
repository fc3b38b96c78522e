"""Documents that the apprentice learns from: a prompt, a short plan, a program.

Two kinds. A fresh program is drawn from the grammar. An edit shows a parent program in the prompt and answers with one or two changes of
it, better or worse alike. What the prompt says of the competition, its metric and the parent's score is drawn at random and has no
bearing on the program: which programs are good is not for the corpus to teach.
"""

import dataclasses
import random

from discover_jax.apprentice import programs
from discover_jax.text.harmony import Message, render
from discover_jax.text.prompts import brief_text
from discover_jax.text.tokenizer import Tokenizer

EDIT_FRACTION = 0.6

_COMPETITIONS = ("spaceship-titanic", "digits-parity")
_FIRST = (
    "airline bank bird boston call car city cloud coin credit crop diabetes email energy film flower forest game glass heart hotel".split()
)
_FIRST += (
    "house income insurance iris leaf loan mail market mushroom news ocean penguin phone planet plant playground porto review road".split()
)
_FIRST += (
    "sensor ship shop signal song star store student survey tabular taxi telecom titanic toxic traffic user vehicle water wine".split()
)
_SECOND = "2021 2024 age challenge churn classification cover customers default detection disease failure forecast fraud getting".split()
_SECOND += "label level outcome playground prediction price quality rating response risk s3e1 s4e2 safety sales satisfaction score".split()
_SECOND += "segment sentiment species spread started status subscription survival target trend type value yield".split()
_METRICS = "accuracy auc roc-auc f1 macro-f1 log-loss brier error balanced-accuracy kappa mcc precision recall gini map rmse mae r2".split()
_METRICS += ["accuracy score", "area under the ROC curve", "error rate", "quadratic weighted kappa", "root mean squared error"]


@dataclasses.dataclass(frozen=True)
class Document:
    """One example: the user's text, the plan for the channel `analysis`, and the program for the channel `final`."""

    prompt: str
    plan: str
    code: str


def draw_document(rng: random.Random) -> Document:
    """Draws a fresh program or an edit with a prompt to it."""
    program = programs.sample(rng)
    if rng.random() >= EDIT_FRACTION:
        return Document(_prompt(None, rng), f"plan: {programs.describe(program)}", programs.render(program))
    child, changes = programs.mutate(program, rng)
    return Document(_prompt(programs.render(program), rng), f"change: {'; '.join(changes)}", programs.render(child))


def encode(document: Document, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Token ids of a whole document and the number of them that are the prompt's; the last id is <|return|>."""
    prompt = render([Message("user", document.prompt)], tokenizer)
    answer = f"```python\n{document.code}\n```"
    reply = render([Message("assistant", document.plan, "analysis"), Message("assistant", answer, "final")], tokenizer)
    # `render` opens with <|start|>assistant, which the prompt already ends in, and closes with <|end|><|start|>assistant.
    opening = len(render([], tokenizer))
    return prompt + reply[opening : -opening - 1] + [tokenizer.special("<|return|>")], len(prompt)


def _prompt(parent: str | None, rng: random.Random) -> str:
    if rng.random() < 0.2:
        competition = rng.choice(_COMPETITIONS)
    else:
        competition = f"{rng.choice(_FIRST)}-{rng.choice(_SECOND)}"
    score = rng.choice((rng.random(), rng.random(), rng.uniform(0.4, 0.9), rng.lognormvariate(0, 2)))
    return brief_text(competition, rng.choice(_METRICS), rng.random() < 0.5, None if parent is None else (parent, score))
