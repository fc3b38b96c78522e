"""A problem of your own: 13 points in the unit square, as far apart as possible."""

import numpy as np

from discover_jax.tasks.problem import Evaluation, Problem, Program, Rejection

COUNT = 13


def evaluate(program: Program) -> Evaluation:
    """The smallest distance between two points."""
    points = program.call("run")  # in the sandbox; the value comes back as plain data
    if not isinstance(points, np.ndarray) or points.shape != (COUNT, 2) or points.dtype != np.float64:
        raise Rejection(f"run() must return a float64 array of shape ({COUNT}, 2)")
    if not ((points >= 0) & (points <= 1)).all():  # false for NaN, too
        raise Rejection("a point lies outside the unit square")
    distances = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)) + 2 * np.eye(COUNT)
    i, j = divmod(int(distances.argmin()), COUNT)
    return Evaluation(float(distances.min()), f"The closest points are {i} and {j}.")


PROBLEM = Problem(
    id="far-apart",
    description=f"Place {COUNT} points in the unit square so that the smallest distance between two of them is as large as possible.",
    interface=f"`run()` takes no arguments and returns the points, a float64 array of shape ({COUNT}, 2)",
    score_name="smallest distance",
    seed_program="import numpy as np\n\n\ndef run():\n    return np.random.RandomState(0).rand(13, 2)\n",
    evaluate=evaluate,
)
