"""Mean average precision of image-level tags."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def tag_average_precision(
    scores: NDArray[np.floating[Any]], tags: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Average precision of each class over images ranked by score.

    Args:
        scores: [n, c], any scale, higher is surer; ties keep the images' order.
        tags: [n, c], the image has the class.

    Returns:
        [c], the mean over a class's images of the precision at their ranks, in [0, 1]; nan for a
        class without images.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    hits = np.take_along_axis(tags, order, axis=0)
    precision = hits.cumsum(axis=0) / np.arange(1, len(hits) + 1)[:, None]
    count = hits.sum(axis=0)
    total = (precision * hits).sum(axis=0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
