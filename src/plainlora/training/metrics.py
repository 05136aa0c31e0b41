"""Accuracy, F1 and confusion matrix of a classifier, measured by its trainer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch.nn import functional
from transformers import EvalPrediction

from plainlora.errors import UserError
from plainlora.training.trainers import ClassifierTrainer


def judge_rows(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """`(batch, classes)` -> `(batch, 2)`: each row's predicted class and cross-entropy (nats).

    For `preprocess_logits_for_metrics`, so that no logits accumulate and the loss is known for each row. Trainer's own
    is a mean over batches, including rows that are repeated to fill them.
    """
    logits = (logits[0] if isinstance(logits, tuple) else logits).float()
    loss = functional.cross_entropy(logits, labels, reduction="none")
    return torch.stack([logits.argmax(-1).float(), loss], dim=-1)


def score(prediction: EvalPrediction, classes: int) -> dict[str, float]:
    """Accuracy, and F1: of the second class if there are two, else the mean over the classes (dimensionless).

    Args:
        prediction: The results of `judge_rows` for all rows.
        classes: Number of classes.
    """
    truth, chosen = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)[:, 0].astype(int)
    kind = "binary" if classes == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(truth, chosen)),
        "f1": float(f1_score(truth, chosen, average=kind, zero_division=0.0)),
    }


@dataclass(frozen=True)
class Scores:
    """A classifier's scores on some rows.

    Attributes:
        loss: Mean cross-entropy in nats per row.
        accuracy: Share of rows classified correctly.
        f1: See `score`.
        confusion: `confusion[i][j]` rows of class i were classified as class j.
    """

    loss: float
    accuracy: float
    f1: float
    confusion: list[list[int]]


def measure(trainer: ClassifierTrainer, rows: Dataset, classes: int, trained: bool) -> Scores:
    """Classifies every row, over all processes.

    Args:
        trainer: A trainer with `judge_rows`.
        rows: The rows to classify.
        classes: Number of classes.
        trained: Whether the model has its trained weights, so that the evaluation at the last step can be reused.

    Raises:
        UserError: The loss is not finite, so the predicted classes mean nothing.
    """
    known = trainer.last_evaluation() if trained and rows is trainer.eval_dataset else None
    output = known if known is not None else trainer.predict(rows)
    judged = np.asarray(output.predictions)
    if not np.isfinite(judged[:, 1]).all():
        raise UserError(
            f"the loss of {len(rows)} rows is not finite, so they were not classified; lower learning_rate (now "
            f"{trainer.args.learning_rate:g}) or train in float32"
        )
    found = score(EvalPrediction(judged, np.asarray(output.label_ids)), classes)
    table = confusion_matrix(output.label_ids, judged[:, 0].astype(int), labels=range(classes))
    return Scores(float(judged[:, 1].mean()), found["accuracy"], found["f1"], table.tolist())


def flatten(scores: dict[str, Scores], suffix: str = "") -> dict[str, Any]:
    """`{"test": Scores}` -> `{"test_accuracy": ..., "test_f1": ..., "test_loss": ..., "test_confusion": ...}`."""
    return {f"{split}_{name}{suffix}": value for split, found in scores.items() for name, value in vars(found).items()}
