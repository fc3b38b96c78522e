"""scikit-learn metrics for use in competition files. scikit-learn is imported on first use."""

from collections.abc import Iterator

import numpy as np

from discover_jax.tasks.competition import Metric


def _accuracy(answers_R: np.ndarray, predictions_R: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(answers_R, predictions_R))


def _roc_auc(answers_R: np.ndarray, predictions_R: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(answers_R, predictions_R))


def _log_loss(answers_R: np.ndarray, predictions_R: np.ndarray) -> float:
    from sklearn.metrics import log_loss

    # scikit-learn only warns about values that are not probabilities.
    if predictions_R.min() < 0 or predictions_R.max() > 1:
        raise ValueError(f"probabilities must lie in [0, 1]; they go from {predictions_R.min()} to {predictions_R.max()}")
    return float(log_loss(answers_R, predictions_R))


def _root_mean_squared_error(answers_R: np.ndarray, predictions_R: np.ndarray) -> float:
    from sklearn.metrics import root_mean_squared_error

    return float(root_mean_squared_error(answers_R, predictions_R))


def _multiclass_log_loss(answers_RC: np.ndarray, predictions_RC: np.ndarray) -> float:
    return float(_multiclass_losses(answers_RC, predictions_RC).mean())


def _multiclass_losses(answers_RC: np.ndarray, predictions_RC: np.ndarray) -> np.ndarray:
    """-log of the probability of each row's class, after division by the row's sum: -sum_c answers_rc log(p_rc / sum_c p_rc).

    Kaggle's multiclass log loss. Probabilities are cut at float64's epsilon, as scikit-learn does.
    """
    p_RC = predictions_RC.astype(np.float64)
    if p_RC.min() < 0 or p_RC.max() > 1:
        raise ValueError(f"probabilities must lie in [0, 1]; they go from {p_RC.min()} to {p_RC.max()}")
    sums_R = p_RC.sum(axis=1, keepdims=True)
    if not (sums_R > 0).all():
        raise ValueError(f"{int((sums_R <= 0).sum())} rows have no probability greater than 0")
    least = np.finfo(np.float64).eps
    return -(answers_RC * np.log(np.clip(p_RC / sums_R, least, 1 - least))).sum(axis=1)


# ---------------------------------------------------------------------- the same metrics on resampled tables; see Metric.resampled


def _resampled_roc_auc(answers_R: np.ndarray, predictions_R: np.ndarray, counts_BR: np.ndarray) -> np.ndarray:
    """The share of (positive, negative) pairs of rows in the right order; ties count half (Mann and Whitney 1947)."""
    _, classes_R = np.unique(answers_R, return_inverse=True)
    _, places_R = np.unique(predictions_R, return_inverse=True)
    order_R = np.argsort(places_R, kind="stable")
    starts_V = np.flatnonzero(np.diff(places_R[order_R], prepend=-1))  # V distinct predictions in ascending order
    positive_R = classes_R[order_R] == 1
    sorted_BR = counts_BR[:, order_R]
    positives_BV = np.add.reduceat(sorted_BR * positive_R, starts_V, axis=1, dtype=np.float64)
    negatives_BV = np.add.reduceat(sorted_BR * ~positive_R, starts_V, axis=1, dtype=np.float64)
    below_BV = np.cumsum(negatives_BV, axis=1) - negatives_BV
    pairs_B = positives_BV.sum(axis=1) * negatives_BV.sum(axis=1)
    with np.errstate(invalid="ignore"):  # a table with a single class has no pairs and thus no score
        return (positives_BV * (below_BV + negatives_BV / 2)).sum(axis=1) / pairs_B


def _resampled_log_loss(answers_R: np.ndarray, predictions_R: np.ndarray, counts_BR: np.ndarray) -> np.ndarray:
    """Like scikit-learn's log loss, which clips probabilities by the epsilon of their type. A table with a single class has no score."""
    _, classes_R = np.unique(answers_R, return_inverse=True)
    scores_B = _means(_log_losses(answers_R, predictions_R), counts_BR)
    shares_B = _means(classes_R, counts_BR)
    return np.where((shares_B > 0) & (shares_B < 1), scores_B, np.nan)


def _resampled_multiclass_log_loss(answers_RC: np.ndarray, predictions_RC: np.ndarray, counts_BR: np.ndarray) -> np.ndarray:
    return _means(_multiclass_losses(answers_RC, predictions_RC), counts_BR)


def _log_losses(answers_R: np.ndarray, predictions_R: np.ndarray) -> np.ndarray:
    _, classes_R = np.unique(answers_R, return_inverse=True)
    least = np.finfo(predictions_R.dtype if predictions_R.dtype.kind == "f" else np.float64).eps
    p_R = np.clip(predictions_R.astype(np.float64), least, 1 - least)
    return -np.log(np.where(classes_R == 1, p_R, 1 - p_R))


def _resampled_root_mean_squared_error(answers_R: np.ndarray, predictions_R: np.ndarray, counts_BR: np.ndarray) -> np.ndarray:
    return np.sqrt(_means((answers_R.astype(np.float64) - predictions_R.astype(np.float64)) ** 2, counts_BR))


def _means(values_R: np.ndarray, counts_BR: np.ndarray) -> np.ndarray:
    return (counts_BR @ values_R.astype(np.float64)) / counts_BR.sum(axis=1)


# ---------------------------------------------------------------------- the influence of each row; see Metric.influence


def correct_rows(answers_R: np.ndarray, predictions_R: np.ndarray) -> np.ndarray:
    """1 for each row whose prediction equals the answer, otherwise 0."""
    # numpy compares arrays of unlike types as a whole.
    return np.broadcast_to(np.asarray(answers_R == predictions_R, np.float64), answers_R.shape)


def _roc_auc_influence(answers_R: np.ndarray, predictions_R: np.ndarray) -> np.ndarray:
    """From the components of DeLong et al. (1988): for a row, the share of rows of the other class that are on the right side of it."""
    _, classes_R = np.unique(answers_R, return_inverse=True)
    _, places_R = np.unique(predictions_R, return_inverse=True)
    share_R = np.empty(len(answers_R))
    for is_class, sign in ((classes_R == 1, 1), (classes_R == 0, -1)):
        others = np.sort(sign * places_R[~is_class])
        mine = sign * places_R[is_class]
        share_R[is_class] = (np.searchsorted(others, mine, "left") + np.searchsorted(others, mine, "right")) / (2 * len(others))
    score = share_R[classes_R == 1].mean()
    return (share_R - score) * np.where(classes_R == 1, 1 / np.mean(classes_R == 1), 1 / np.mean(classes_R == 0))


def _multiclass_log_loss_influence(answers_RC: np.ndarray, predictions_RC: np.ndarray) -> np.ndarray:
    losses_R = _multiclass_losses(answers_RC, predictions_RC)
    return losses_R - losses_R.mean()


def _log_loss_influence(answers_R: np.ndarray, predictions_R: np.ndarray) -> np.ndarray:
    losses_R = _log_losses(answers_R, predictions_R)
    return losses_R - losses_R.mean()


def _root_mean_squared_error_influence(answers_R: np.ndarray, predictions_R: np.ndarray) -> np.ndarray:
    """The derivative of the root at the mean of squares, times the deviation of the row's square."""
    squares_R = (answers_R.astype(np.float64) - predictions_R.astype(np.float64)) ** 2
    mean = squares_R.mean()
    return (squares_R - mean) / (2 * np.sqrt(mean)) if mean else np.zeros(len(squares_R))


# ---------------------------------------------------------------------- several columns


def mean_of_columns(metric: Metric) -> Metric:
    """The mean of a metric over the columns of `Competition.target`, if it names several.

    Args:
      metric: of a single column: one of this module, or a user's.
    """

    def columns(answers_RC: np.ndarray, predictions_RC: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # Cells of different types in one array, as of truth values and numbers, get the type of each column again.
        for answers_R, predictions_R in zip(answers_RC.T, predictions_RC.T, strict=True):
            yield _inferred(answers_R), _inferred(predictions_R)

    def function(answers_RC: np.ndarray, predictions_RC: np.ndarray) -> float:
        return float(np.mean([metric.function(*pair) for pair in columns(answers_RC, predictions_RC)]))

    def resampled(answers_RC: np.ndarray, predictions_RC: np.ndarray, counts_BR: np.ndarray) -> np.ndarray:
        assert metric.resampled is not None
        return np.mean([metric.resampled(*pair, counts_BR) for pair in columns(answers_RC, predictions_RC)], axis=0)

    def influence(answers_RC: np.ndarray, predictions_RC: np.ndarray) -> np.ndarray:
        assert metric.influence is not None
        # Of a share of correct rows, `metric.influence` is 1 or 0, which is the influence but for the mean.
        mean_R = np.mean([metric.influence(*pair) for pair in columns(answers_RC, predictions_RC)], axis=0)
        return mean_R - mean_R.mean()

    return Metric(
        f"mean {metric.name} of the columns",
        metric.higher_is_better,
        function,
        resampled=None if metric.resampled is None else resampled,
        influence=None if metric.influence is None else influence,
    )


def _inferred(values_R: np.ndarray) -> np.ndarray:
    return np.array(values_R.tolist()) if values_R.dtype == object else values_R


ACCURACY = Metric("accuracy", higher_is_better=True, function=_accuracy, proportion=True, influence=correct_rows)
ROC_AUC = Metric(
    "area under the ROC curve", higher_is_better=True, function=_roc_auc, resampled=_resampled_roc_auc, influence=_roc_auc_influence
)
MULTICLASS_LOG_LOSS = Metric(
    "multiclass log loss",
    higher_is_better=False,
    function=_multiclass_log_loss,
    resampled=_resampled_multiclass_log_loss,
    influence=_multiclass_log_loss_influence,
)
LOG_LOSS = Metric("log loss", higher_is_better=False, function=_log_loss, resampled=_resampled_log_loss, influence=_log_loss_influence)
RMSE = Metric(
    "root mean squared error",
    higher_is_better=False,
    function=_root_mean_squared_error,
    resampled=_resampled_root_mean_squared_error,
    influence=_root_mean_squared_error_influence,
)
