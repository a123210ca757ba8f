"""What an answer costs nothing: the accuracies that say nothing of a model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.integer[Any]]


def majority(train: Labels, test: Labels) -> float:
    """Accuracy of always giving the commonest label of the training samples."""
    return float((np.asarray(test) == np.bincount(train).argmax()).mean())


def by_key(train_keys: Labels, train: Labels, test_keys: Labels, test: Labels) -> float:
    """Accuracy of giving, for each key, the label that was commonest with it in training.

    With ListOps the key is the first token: the floor of a model that reads no further. Keys that
    training did not have get the commonest label of all.
    """
    answers = {int(k): np.bincount(train[train_keys == k]).argmax() for k in np.unique(train_keys)}
    common = np.bincount(train).argmax()
    given = np.array([answers.get(int(key), common) for key in test_keys])
    return float((given == np.asarray(test)).mean())


def floors(
    labels: Mapping[str, Labels], keys: Mapping[str, Labels] | None = None
) -> dict[str, dict[str, float]]:
    """Of every split but that for training, from what the training split shows.

    Args:
        labels: by split.
        keys: the first operators of ListOps, by split.

    Returns:
        By split, `majority`, and `first_operator` where there are keys.
    """
    found: dict[str, dict[str, float]] = {}
    for split in labels:
        if split == "train":
            continue
        found[split] = {"majority": majority(labels["train"], labels[split])}
        if keys is not None:
            found[split]["first_operator"] = by_key(
                keys["train"], labels["train"], keys[split], labels[split]
            )
    return found
