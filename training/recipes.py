"""Named settings of the whole chain; a variant is a ``dataclasses.replace``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from training.generate_proposals import ProposalRecipe
from training.generate_pseudo_labels import PseudoLabelRecipe
from training.retrain_detector import DetectorRecipe
from training.train_classifier import ClassifierRecipe
from training.train_wsod import WsodRecipe
from weaksam_rt.config import PipelineConfig
from weaksam_rt.proposals import ProposalConfig


@dataclass(frozen=True, kw_only=True)
class ChainRecipe:
    """From tagged images to a detector: the settings of every stage."""

    classifier: ClassifierRecipe = field(default_factory=ClassifierRecipe)
    """Tags to activation maps."""
    proposals: ProposalRecipe = field(default_factory=ProposalRecipe)
    """Maps and SAM to proposals."""
    wsod: WsodRecipe = field(default_factory=WsodRecipe)
    """Proposals and tags to detections."""
    pseudo_labels: PseudoLabelRecipe = field(default_factory=PseudoLabelRecipe)
    """Detections to pseudo ground truth."""
    detector: DetectorRecipe = field(default_factory=DetectorRecipe)
    """Pseudo ground truth to a detector."""

    def with_seed(self, seed: int) -> "ChainRecipe":
        """The same settings with another seed in every stage that draws random numbers."""
        return replace(
            self,
            classifier=replace(self.classifier, seed=seed),
            wsod=replace(self.wsod, seed=seed),
            detector=replace(self.detector, seed=seed),
        )


def _proposals(points_per_side: int, min_side_px: float) -> ProposalRecipe:
    # The published 0.3 keeps one box of each neighbourhood, by a score that a small SAM
    # cannot give.
    settings = ProposalConfig(
        points_per_side=points_per_side,
        min_side_px=min_side_px,
        grid_nms_thresh=0.7,
        max_prompts_per_call=8,  # 64 prompts leave the cache: 1.17 s an image instead of 0.76 s
    )
    return ProposalRecipe(pipeline=PipelineConfig(proposals=settings), mixed_precision=True)


def scenes() -> ChainRecipe:
    """Generated scenes of ``training.generate_scenes`` (600 training and 200 validation images)."""
    return ChainRecipe(
        classifier=ClassifierRecipe(epochs=8),
        proposals=_proposals(8, 12.0),
        detector=DetectorRecipe(epochs=8),
    )


def animals7() -> ChainRecipe:
    """Photographs with one large animal class each (698 training and 210 validation images)."""
    return ChainRecipe(proposals=_proposals(8, 20.0), detector=DetectorRecipe(epochs=6))


def demo() -> ChainRecipe:
    """The committed demo models: animals, people, cats and dogs on 991 photographs and others
    without them.
    """
    return replace(
        animals7(),
        classifier=ClassifierRecipe(epochs=4),
        detector=DetectorRecipe(epochs=6, repeat_thresh=0.1),  # few cats, few dogs
    )


def folder() -> ChainRecipe:
    """Your own images with tags; made for some hundred to some thousand photographs."""
    return ChainRecipe(proposals=_proposals(16, 20.0))


RECIPES: Mapping[str, Callable[[], ChainRecipe]] = {
    recipe.__name__: recipe for recipe in (scenes, animals7, demo, folder)
}
