"""A problem for the phrase model whose programs append to the list that their parent returned."""

from discover_jax.tasks.problem import Evaluation, Problem, Program, Rejection

ROWS = 5
RETURNED = (
    '(__import__("json").load(open("parent_output.json")) if __import__("os").path.exists("parent_output.json") else [])'
    " + frame['y'].tolist()"
)


def evaluate(program: Program) -> Evaluation:
    labels = program.call("run")
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise Rejection("run() must return integers")
    return Evaluation(len(labels) + sum(labels) / 1000)


PROBLEM = Problem(
    id="growing",
    description="Return a long list.",
    evaluate=evaluate,
    seed_program="def run():\n    return [1]\n",
    files={"sample_submission.csv": "id,y\n" + "".join(f"{row},1\n" for row in range(ROWS))},
    reuse_output=True,
)
