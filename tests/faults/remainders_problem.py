"""A problem for the phrase model, beside the competition in remainders.py: the same labels, which a function checks."""

from discover_jax.tasks.problem import Evaluation, Problem, Program, Record, Rejection

ROWS = 40
SEED_PROGRAM = f"def run():\n    print('all ones')\n    return [1] * {ROWS}\n"


def evaluate(program: Program) -> Evaluation:
    labels = program.call("run")
    if not (isinstance(labels, list) and len(labels) == ROWS and all(type(label) is int for label in labels)):
        raise Rejection(f"run() must return {ROWS} integers")
    wrong = sum(label != (row % 7 < 3) for row, label in enumerate(labels))
    return Evaluation(1 - wrong / ROWS / 3, f"{wrong} labels are wrong", {"wrong": wrong})


PROBLEM = Problem(
    id="labels",
    description="Find the labels.",
    evaluate=evaluate,
    interface="`run()` takes no arguments and returns a list of integers",
    seed_program=SEED_PROGRAM,
    records=(Record("all right", 1.0, "the rule in this file"),),
    files={"sample_submission.csv": "id,y\n" + "".join(f"{row},1\n" for row in range(ROWS))},
)
