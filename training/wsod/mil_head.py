"""Multiple-instance learning on proposals: which boxes explain the tags of the image?"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_MARGIN = 1e-6
"""Keeps probabilities off 0 and 1, where the logarithm has no gradient."""


class MilHead(nn.Module):
    """Two streams over the RoIs of one image: what is it (softmax over classes), and which RoI
    shows it (softmax over RoIs).

    Source:
        WSDDN (arXiv:1511.02853), section 3.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.classification = nn.Linear(in_features, num_classes)
        self.detection = nn.Linear(in_features, num_classes)

    def forward(
        self, inside: Float[Tensor, "n d"], around: Float[Tensor, "n d"] | None = None
    ) -> Float[Tensor, "n c"]:
        """Scores of the RoIs of one image, in [0, 1]; they sum to at most 1 over the RoIs.

        Args:
            inside: Features of the RoIs.
            around: Features of their surroundings: the detection stream then asks how much more
                of the class is inside than around. None: it asks for the inside alone.
        """
        by_class = self.classification(inside).softmax(dim=1)
        evidence = self.detection(inside)
        if around is not None:
            evidence = evidence - self.detection(around)
        return by_class * evidence.softmax(dim=0)


def image_loss(scores: Float[Tensor, "n c"], tags: Float[Tensor, " c"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of the image's class scores, summed over the classes.

    Args:
        scores: Of ``MilHead``; an image's score of a class is the sum over its RoIs.
        tags: 1 where the class is in the image, else 0.

    Source:
        WSDDN (arXiv:1511.02853), section 3, and OICR. MIST's released code, which WeakSAM uses,
        takes the mean over the classes and background, whose target is 0; here background has no
        score, and the sum weighs this loss C + 1 times as much beside the refinements.
    """
    of_image = scores.sum(dim=0).clamp(_MARGIN, 1 - _MARGIN)
    return functional.binary_cross_entropy(of_image, tags, reduction="sum")
