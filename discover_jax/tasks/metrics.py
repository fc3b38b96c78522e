"""scikit-learn metrics for use in competition files. scikit-learn is imported on first use."""

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


def _log_loss_influence(answers_R: np.ndarray, predictions_R: np.ndarray) -> np.ndarray:
    losses_R = _log_losses(answers_R, predictions_R)
    return losses_R - losses_R.mean()


def _root_mean_squared_error_influence(answers_R: np.ndarray, predictions_R: np.ndarray) -> np.ndarray:
    """The derivative of the root at the mean of squares, times the deviation of the row's square."""
    squares_R = (answers_R.astype(np.float64) - predictions_R.astype(np.float64)) ** 2
    mean = squares_R.mean()
    return (squares_R - mean) / (2 * np.sqrt(mean)) if mean else np.zeros(len(squares_R))


ACCURACY = Metric("accuracy", higher_is_better=True, function=_accuracy, proportion=True, influence=correct_rows)
ROC_AUC = Metric(
    "area under the ROC curve", higher_is_better=True, function=_roc_auc, resampled=_resampled_roc_auc, influence=_roc_auc_influence
)
LOG_LOSS = Metric("log loss", higher_is_better=False, function=_log_loss, resampled=_resampled_log_loss, influence=_log_loss_influence)
RMSE = Metric(
    "root mean squared error",
    higher_is_better=False,
    function=_root_mean_squared_error,
    resampled=_resampled_root_mean_squared_error,
    influence=_root_mean_squared_error_influence,
)
