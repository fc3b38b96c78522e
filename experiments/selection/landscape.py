"""A simulated search with a known truth: lineages of programs, scores on rows, copies, failures and collapse. Many runs at once.

Rows are easy, open or hopeless. All programs get hopeless rows wrong; only broken programs get easy rows wrong; the open rows decide. A
program gets a share of the open rows right, so its true score is (share of easy rows) x easy + (share of open rows) x open. An edit makes
the child lose some of the open rows that its parent gets right, and gain some of the others. This holds on every set of rows, by binomial
draws: of r open rows that the parent gets right, c ~ Binomial(r, loss) are lost, and of the w others, b ~ Binomial(w, gain) are gained.
Only counts are stored, but they are distributed as if every row were simulated: scores, their noise, and paired differences with the
correlation that shared rows give. All programs of a run share the numbers of easy and of open rows.

Programs without a parent are edits of a hidden ancestor, so that they share the difficulty of the rows, too.

Axes: R runs, N programs, G groups of a step, K programs of a group, S sets of rows.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from discover_jax.archive.posterior import Normal, difference_of_counts, estimate_prior, lineage_posterior, priors_of_steps

SETS = 5
"""Sets of rows: one that gives the score, and four others, as many as five folds of a table allow."""

FAILED = -1.0
"""The value of a failed program. It can be neither a parent nor chosen."""


@dataclasses.dataclass(frozen=True)
class Landscape:
    """What a search is like; the defaults resemble the measurements in docs/results.md (see README.md).

    Attributes:
      groups, group_size: programs of a step.
      rows: of a score; 1,565 rows give a score of 0.8 a standard deviation of 0.010.
      easy, open: shares of the rows of these kinds.
      ancestor: probability that the hidden ancestor gets an open row right.
      root_changed: share of the open rows whose answer differs between the ancestor and a program without a parent.
      root_loss: mean true loss of a program without a parent (gamma distribution of shape 1.2).
      changed, changed_spread: median share of the open rows whose answer an edit changes, and the standard deviation of its logarithm.
      helpful: probability that an edit improves the true score.
      tilt: size of the true step: of the open rows that an edit changes, the share |N(0, tilt^2)| more are gained than lost if it is
        helpful, and more are lost than gained otherwise.
      broken: probability that an edit breaks the program, which then loses 0.05 or more.
      failed: probability that a program has no score.
      copies: probability that a child only copies its parent, in the first and in the last step. A growing one is a collapse.
    """

    groups: int = 4
    group_size: int = 8
    rows: int = 1565
    easy: float = 0.65
    open: float = 0.20
    ancestor: float = 0.70
    root_changed: float = 0.4
    root_loss: float = 0.05
    changed: float = 0.035
    changed_spread: float = 0.7
    helpful: float = 0.03
    tilt: float = 0.45
    broken: float = 0.07
    failed: float = 0.01
    copies: tuple[float, float] = (0.05, 0.05)

    def truth(self, easy: np.ndarray, open: np.ndarray) -> np.ndarray:
        """The true score of a program that gets these shares of the easy and of the open rows right."""
        return self.easy * easy + self.open * open


@dataclasses.dataclass
class Runs:
    """All programs of R runs so far, in the order in which they were written.

    Attributes:
      parents_RN: position of the parent, -1 if there is none.
      valid_RN, copy_RN: whether a program has a score, and whether it is a copy of its parent.
      easy_RN, open_RN: true shares of the easy and of the open rows that a program gets right.
      easy_counts_RNS, open_counts_RNS: rows that it gets right, of each set. The first set gives the score; the others serve for further
        runs of finalists.
      gained_RN, lost_RN: rows of the first set that only the child gets right, and rows that only the parent gets right.
    """

    parents_RN: np.ndarray
    valid_RN: np.ndarray
    copy_RN: np.ndarray
    easy_RN: np.ndarray
    open_RN: np.ndarray
    easy_counts_RNS: np.ndarray
    open_counts_RNS: np.ndarray
    gained_RN: np.ndarray
    lost_RN: np.ndarray

    def extended(self, other: "Runs") -> "Runs":
        """With the programs of one more step."""
        return Runs(**{name: np.concatenate([mine, getattr(other, name)], axis=1) for name, mine in vars(self).items()})

    def first(self, programs: int) -> "Runs":
        """Only the first programs of each run."""
        return Runs(**{name: mine[:, :programs] for name, mine in vars(self).items()})

    def scores(self, rows: int) -> np.ndarray:
        """Scores on each set of rows [R, N, S]; `FAILED` for failures."""
        return np.where(self.valid_RN[..., None], (self.easy_counts_RNS + self.open_counts_RNS) / rows, FAILED)


Selector = Callable[[Runs, int, np.random.Generator], np.ndarray]
"""(runs so far, groups, generator) -> positions of the parents [R, G]."""


def search(landscape: Landscape, select: Selector, *, runs: int, steps: int, seed: int) -> Runs:
    """R runs of a search. With the same seed, every search draws the same rows and edits; only its parents differ."""
    rng = np.random.default_rng([seed, 0, 2])
    easy_R1S = rng.binomial(landscape.rows, landscape.easy, (runs, 1, SETS))
    open_R1S = rng.binomial(landscape.rows - easy_R1S, landscape.open / (1.0 - landscape.easy))
    size = landscape.groups * landscape.group_size
    ancestor = _ancestor(landscape, rng, easy_R1S, open_R1S)
    found = _children(landscape, ancestor, np.full((runs, size), -1), open_R1S, step=0, steps=steps, seed=seed)
    for step in range(1, steps):
        parents_RG = select(found, landscape.groups, np.random.default_rng([seed, step, 1]))
        parents_RN = np.repeat(parents_RG, landscape.group_size, axis=1)
        found = found.extended(_children(landscape, found, parents_RN, open_R1S, step=step, steps=steps, seed=seed))
    return found


def posterior(found: Runs, rows: int) -> Normal:
    """Posterior mean and variance of every program [R, N] from the first set of rows, with priors estimated in each run.

    Failures have mean `FAILED` and variance 0.
    """
    scores_RN = (found.easy_counts_RNS[..., 0] + found.open_counts_RNS[..., 0]) / rows
    noise_RN = scores_RN * (1.0 - scores_RN) / rows
    differences = difference_of_counts(found.gained_RN, found.lost_RN, rows)
    rooted_RN = found.parents_RN < 0
    runs, programs = scores_RN.shape
    root_mean, root_variance, step_mean, step_variance = np.zeros((4, runs, programs))
    for run in range(runs):
        first, later = found.valid_RN[run] & rooted_RN[run], found.valid_RN[run] & ~rooted_RN[run]
        root_mean[run], root_variance[run] = estimate_prior(scores_RN[run, first], noise_RN[run, first])
        step_mean[run, later], step_variance[run, later] = priors_of_steps(differences.mean[run, later], differences.variance[run, later])
    # All runs as one list of programs, without the failures, which say nothing.
    valid = found.valid_RN.ravel()
    place = np.cumsum(valid) - 1
    offsets = np.arange(runs)[:, None] * programs
    parents = np.where(rooted_RN, -1, place[np.where(rooted_RN, 0, found.parents_RN + offsets)]).ravel()[valid]
    estimates = lineage_posterior(
        parents,
        Normal(scores_RN.ravel()[valid], noise_RN.ravel()[valid]),
        differences.variance.ravel()[valid],
        root=Normal(root_mean.ravel()[valid], root_variance.ravel()[valid]),
        step=Normal(step_mean.ravel()[valid], step_variance.ravel()[valid]),
    )
    mean_RN, variance_RN = np.full(scores_RN.shape, FAILED), np.zeros(scores_RN.shape)
    mean_RN[found.valid_RN], variance_RN[found.valid_RN] = estimates
    return Normal(mean_RN, variance_RN)


def _ancestor(landscape: Landscape, rng: np.random.Generator, easy_R1S: np.ndarray, open_R1S: np.ndarray) -> Runs:
    zero = np.zeros(easy_R1S.shape[:2])
    right_R1S, none = rng.binomial(open_R1S, landscape.ancestor), zero.astype(int)
    return Runs(none - 1, zero == 0, zero == 1, zero + 1.0, zero + landscape.ancestor, easy_R1S, right_R1S, none, none)


def _children(landscape: Landscape, found: Runs, parents_RN: np.ndarray, open_R1S: np.ndarray, *, step: int, steps: int, seed: int) -> Runs:
    """The programs of one step. In the first step, `found` holds only the ancestor, and its children count as programs without a parent."""
    rng = np.random.default_rng([seed, step, 0])
    shape, first = parents_RN.shape, step == 0
    failed_RN, copies_RN, breaks_RN = rng.random((3, *shape))
    changed_RN = landscape.changed * np.exp(landscape.changed_spread * rng.standard_normal(shape))
    tilt_RN = np.abs(landscape.tilt * rng.standard_normal(shape)) * np.where(rng.random(shape) < landscape.helpful, 1.0, -1.0)
    root_loss_RN, break_loss_RN = rng.gamma(1.2, landscape.root_loss / 1.2, shape), 0.05 + rng.exponential(0.05, shape)

    at = np.zeros(shape, int) if first else parents_RN
    easy, right = (np.take_along_axis(array, at, axis=1) for array in (found.easy_RN, found.open_RN))
    easy_count, right_count = (np.take_along_axis(array, at[..., None], axis=1) for array in (found.easy_counts_RNS, found.open_counts_RNS))
    share = landscape.copies[0] + (landscape.copies[1] - landscape.copies[0]) * step / max(steps - 1, 1)
    copy_RN = np.zeros(shape, bool) if first else copies_RN < share
    if first:
        changed_RN, tilt_RN, lost_RN = np.full(shape, landscape.root_changed), np.zeros(shape), root_loss_RN
    else:
        lost_RN = np.where(breaks_RN < landscape.broken, break_loss_RN, 0.0)
    changed_RN = np.minimum(changed_RN, 0.8)
    # An edit that changes the share q of the open rows and their true share by d gains (q + d) / 2 and loses (q - d) / 2 of them.
    tilt_RN = np.clip(tilt_RN, -1.0, 1.0)
    gain_RN = np.where(copy_RN, 0.0, np.clip(changed_RN * (1 + tilt_RN) / 2 / np.maximum(1 - right, 1e-9), 0.0, 1.0))
    loss_RN = np.where(copy_RN, 0.0, np.clip(changed_RN * (1 - tilt_RN) / 2 / np.maximum(right, 1e-9), 0.0, 1.0))
    damage_RN = np.where(copy_RN, 0.0, np.minimum(lost_RN / landscape.easy / np.maximum(easy, 1e-9), 1.0))
    gained = rng.binomial(open_R1S - right_count, gain_RN[..., None])
    lost, damaged = rng.binomial(right_count, loss_RN[..., None]), rng.binomial(easy_count, damage_RN[..., None])
    return Runs(
        parents_RN,
        failed_RN >= landscape.failed,
        copy_RN,
        easy * (1 - damage_RN),
        right + (1 - right) * gain_RN - right * loss_RN,
        easy_count - damaged,
        right_count + gained - lost,
        gained[..., 0],
        (lost + damaged)[..., 0],
    )
