"""Metrics by scikit-learn, ready to be named in a competition's file. scikit-learn is imported when one is first computed."""

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

    # scikit-learn only warns of numbers that are no probabilities.
    if predictions_R.min() < 0 or predictions_R.max() > 1:
        raise ValueError(f"probabilities must lie in [0, 1]; they go from {predictions_R.min()} to {predictions_R.max()}")
    return float(log_loss(answers_R, predictions_R))


def _root_mean_squared_error(answers_R: np.ndarray, predictions_R: np.ndarray) -> float:
    from sklearn.metrics import root_mean_squared_error

    return float(root_mean_squared_error(answers_R, predictions_R))


ACCURACY = Metric("accuracy", higher_is_better=True, function=_accuracy, proportion=True)
ROC_AUC = Metric("area under the ROC curve", higher_is_better=True, function=_roc_auc)
LOG_LOSS = Metric("log loss", higher_is_better=False, function=_log_loss)
RMSE = Metric("root mean squared error", higher_is_better=False, function=_root_mean_squared_error)
