"""Named settings of the whole chain; a variant is a ``dataclasses.replace``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from training.data.augment import published_augment
from training.generate_proposals import ProposalRecipe
from training.generate_pseudo_labels import PseudoLabelRecipe
from training.generate_pseudo_masks import PseudoMaskRecipe
from training.models.weaktr import published_config
from training.models.wsod_detector import WsodDetectorConfig
from training.retrain_detector import DetectorRecipe
from training.retraining.roi_drop import RoiDropConfig
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
    pseudo_masks: PseudoMaskRecipe = field(default_factory=PseudoMaskRecipe)
    """Pseudo boxes to pseudo masks; by ``training.run --masks`` only."""
    mask_channels: int = 64
    """Width of the mask head that ``detector`` then gets."""

    def with_masks(self) -> "ChainRecipe":
        """The same settings with a mask head: Faster R-CNN becomes Mask R-CNN."""
        model = replace(self.detector.model, mask_channels=self.mask_channels)
        return replace(self, detector=replace(self.detector, model=model))

    def with_seed(self, seed: int) -> "ChainRecipe":
        """The same settings with another seed in every stage that draws random numbers."""
        return replace(
            self,
            classifier=replace(self.classifier, seed=seed),
            wsod=replace(self.wsod, seed=seed),
            detector=replace(self.detector, seed=seed),
        )


def _proposals(
    points_per_side: int, min_side_px: float, crops_per_side: tuple[int, ...] = ()
) -> ProposalRecipe:
    # The published 0.3 keeps one box of each neighbourhood, by a score that a small SAM
    # cannot give.
    settings = ProposalConfig(
        points_per_side=points_per_side,
        crops_per_side=crops_per_side,
        min_side_px=min_side_px,
        grid_nms_thresh=0.7,
        max_prompts_per_call=8,  # 64 prompts leave the cache: 1.17 s an image instead of 0.76 s
    )
    return ProposalRecipe(pipeline=PipelineConfig(proposals=settings), mixed_precision=True)


def scenes() -> ChainRecipe:
    """Generated scenes of ``training.generate_scenes`` (600 training and 200 validation images).

    Command:
        ``python -m training.generate_scenes --output scenes``, then ``python -m training.run scenes
        --data scenes/train --val scenes/val --output runs/scenes --sam SAM --trunk-weights
        SQUEEZENET --vit-weights DEIT --no-val-proposals --rounds 2 --supervised``.
    Hardware and time:
        2 CPU cores; the time was not kept. A detector takes 9 minutes of one thread, at 461 ms for
        a step of four images (``benchmarks/results/training.md``).
    Expected score:
        Ours, one seed (``benchmarks/results/weak_chain_scenes.md``): AP50 60.2 after the first
        round and 67.6 after the second, CorLoc 78.0 and 81.8; the same detector on true boxes 81.5
        and 91.7. The SAM of that run saw masks of these training images, without classes. The paper
        has none.
    """
    return ChainRecipe(
        classifier=ClassifierRecipe(epochs=8),
        proposals=_proposals(8, 12.0),
        detector=DetectorRecipe(epochs=8),
    )


def animals7() -> ChainRecipe:
    """Photographs with one large animal class each (698 training and 210 validation images).

    Command:
        ``python -m training.run animals7 --data animals7/train --val animals7/val --output
        runs/animals7 --sam SAM --trunk-weights SQUEEZENET --vit-weights DEIT --no-val-proposals
        --supervised``.
    Hardware and time:
        2 CPU cores; the time was not kept. A detector takes 8 minutes of one thread, at 461 ms for
        a step of four images (``benchmarks/results/training.md``).
    Expected score:
        Ours, three seeds of what follows the proposals
        (``benchmarks/results/weak_chain_animals7.md``): AP50 74.3 ± 0.5, CorLoc 89.9 ± 0.9; the
        same detector on true boxes 77.7 ± 0.9 and 90.2 ± 0.1. The SAM of that run saw masks of
        these training images, without classes. The paper has none.
    """
    return ChainRecipe(proposals=_proposals(8, 20.0), detector=DetectorRecipe(epochs=6))


def demo() -> ChainRecipe:
    """The committed demo models: animals, people, cats and dogs on 991 photographs and others
    without them.

    Command:
        In ``assets/README.md``, with the making of its data.
    Hardware and time:
        2 CPU cores: 8 minutes for the classifier, 15 for the last detector (the manifests in
        ``assets/demo_models``); the time of the parts between was not kept.
    Expected score:
        Ours, one seed, 308 images of ``demo/val`` (the detector's manifest): AP50 53.3, CorLoc 77.2
        after two rounds; the classifier's tags have a mean average precision of 87.2. The paper has
        none.
    """
    return replace(
        animals7(),
        classifier=ClassifierRecipe(epochs=4),
        detector=DetectorRecipe(epochs=6, repeat_thresh=0.1),  # few cats, few dogs
    )


def folder() -> ChainRecipe:
    """Your own images with tags; made for some hundred to some thousand photographs.

    Command:
        ``python -m training.tag_file`` for training and validation images, then ``python -m
        training.run folder --data my/train --val my/val --output runs/mine --sam SAM
        --trunk-weights SQUEEZENET --vit-weights DEIT``; without ``--vit-weights`` the classifier
        starts from nothing.
    Hardware and time:
        Any; not measured. It differs from ``animals7`` in 4 times as many grid prompts an image and
        12 epochs of the detector instead of 6.
    Expected score:
        None: your images decide. With tags alone for the validation images nothing that compares
        boxes is reported.
    """
    return ChainRecipe(proposals=_proposals(16, 20.0))


def aquarium() -> ChainRecipe:
    """Underwater photographs with many small objects of 7 classes (448 training and 127 validation
    images).

    Command:
        ``python -m training.run aquarium --data aquarium/train --val aquarium/val --output
        runs/aquarium --sam SAM --trunk-weights SQUEEZENET --vit-weights DEIT --no-val-proposals
        --supervised --skip-bad``; one training image shows nothing and has no tags, so it is left
        out.
    Hardware and time:
        2 CPU cores, shared: 36 minutes for the proposals (``--proposal-workers 2``),
        3 for the first detector, 9 for the last and 17 for it on true boxes, one thread each.
    Expected score:
        Ours, three seeds of what follows the proposals
        (``benchmarks/results/weak_chain_aquarium.md``): AP50 8.5 ± 1.1, CorLoc 21.2 ± 5.6; the same
        detector on true boxes, one seed, 36.8 and 65.1. Grid prompts in crops lift the recall of
        the proposals at IoU 0.5 from 19.7 to 35.2, and hardly the last score (8.2 ± 1.3 without):
        sharks and penguins come with tanks and pools, and their tags go there. The paper has none.
    """
    return ChainRecipe(
        proposals=_proposals(16, 12.0, crops_per_side=(2, 3)),
        wsod=WsodRecipe(method="mist"),  # an image has many objects of a class
        detector=DetectorRecipe(epochs=12, repeat_thresh=0.1),
    )


def _published(*, wsod_epochs: int, detector_epochs: int, roi_drop: RoiDropConfig) -> ChainRecipe:
    """The published method with the published schedules, on this project's light detectors.

    What differs from the paper whatever the recipe says:

    - Both detectors: a SqueezeNet trunk instead of VGG16 and ResNet-50; one square input, of 416
      pixels in the first and 320 in the second, instead of short sides of 480 to 1200; AdamW whose
      rate falls along a cosine, instead of Adam and SGD in steps; gradients clipped to a norm of 5.
    - The first: a frozen trunk, no DropBlock, whose cells of so many proposals (100 kB each) few
      disks can hold, and a test of two passes (one size, mirrored) instead of 14. VGG16, more sizes
      and DropBlock are one ``replace`` away.
    - The second: 64 RoIs an image for the loss instead of 512, and a test of one pass instead of
      all sizes and their mirror images.

    The classifier's images are varied as published (crops, RandAugment, erasing;
    ``training.train_classifier --num-workers`` divides that among processes). So the paper's scores
    are what the *method* reached, not what these settings promise.

    Source:
        WeakSAM (arXiv:2402.14812) and its released configurations: MIST trained for the stated
        number of images, RoI drop by the stated thresholds; the classifier as WeakTr trains it.
    """
    return ChainRecipe(
        classifier=ClassifierRecipe(
            model=published_config(),
            augment=published_augment(),
            background_weight=0.0,
            head_rate_factor=1.0,
            first_rate=1e-6,
            last_rate=1e-5,
            max_gradient_norm=None,
            epochs=60,
            batch_size=64,
            learning_rate=5e-5,  # 4e-4 for 512 images a step
            weight_decay=0.03,
            warmup_share=5 / 60,
        ),
        proposals=ProposalRecipe(maps="published"),
        wsod=WsodRecipe(
            model=WsodDetectorConfig(box_regression=True),
            method="mist",
            epochs=wsod_epochs,
            images_per_step=8,
            warmup_steps=200,
            min_side_px=20.0,
        ),
        detector=DetectorRecipe(epochs=detector_epochs, batch_size=16, roi_drop=roi_drop),
    )


def voc07() -> ChainRecipe:
    """Pascal VOC 2007, trained on the tags of trainval (5,011 images), evaluated on test (4,952).

    Command:
        ``python -m training.convert_data voc --devkit VOCdevkit --output data/voc07_trainval`` and
        the same with ``--split test --output data/voc07_test``; then ``python -m training.run
        voc07 --data data/voc07_trainval --val data/voc07_test --output runs/voc07
        --sam sam_vit_h_4b8939.pth --vit-weights DEIT_SMALL --trunk-weights SQUEEZENET``
    Hardware and time:
        Not run at this size by us, and the paper's times are unknown. The proposals decide, with
        1,024 grid prompts an image. By our estimate a compact SAM on 2 CPU cores takes at most 1.5
        days (16 times the 0.8 s an image of ``animals7``); the official ViT-H wants a GPU. The
        first detector keeps about 12 kB a proposal in a file.
    Expected score:
        The paper's, AP50 by 11 points: 67.4 for MIST on WeakSAM's proposals, 71.8 after Faster
        R-CNN with RoI drop (ResNet-50). Its classifier saw the tags of VOC 2012; here it sees those
        of ``--data`` only.
    """
    drop = RoiDropConfig(
        classification_thresh=4.0, regression_thresh=4.0, start_fraction=2000 / 9000
    )
    return _published(wsod_epochs=48, detector_epochs=29, roi_drop=drop)


def voc12() -> ChainRecipe:
    """Pascal VOC 2012, trained on the tags of trainval (11,540 images).

    Command:
        As ``voc07``, with ``--year 2012``, and ``--skip-bad`` for ``training.run``: images whose
        objects are all difficult have no tags and are left out. The test set has no public boxes:
        for figures of your own use ``--split train`` and ``--split val``.
    Hardware and time:
        As ``voc07``, for 2.3 times as many training images; not run at this size by us.
    Expected score:
        The paper's, AP50 on the test server: 66.9 for MIST, 69.2 after Faster R-CNN with RoI drop.
        The released configuration of this set has RoI drop switched off; the paper has it on.
        With ``--masks`` and ``--sam sam_vit_h_4b8939.pth``, Mask R-CNN (ResNet-50) on pseudo masks
        of the train_aug images, the paper's mask AP25 / 50 / 70 / 75 on val: 70.3 / 59.6 / 43.1 /
        36.2. True masks of val: ``training.convert_data voc --year 2012 --split val --masks``.
    """
    drop = RoiDropConfig(
        classification_thresh=4.0, regression_thresh=4.0, start_fraction=4000 / 16000
    )
    return _published(wsod_epochs=22, detector_epochs=22, roi_drop=drop)


def coco14() -> ChainRecipe:
    """COCO 2014, trained on the tags of train2014 (82,783 images), evaluated on val2014.

    Command:
        ``python -m training.convert_data coco --root COCO --split train2014 --output
        data/coco14_train`` and the same for val2014; then ``python -m training.run coco14
        ... --skip-bad``, the rest as for ``voc07``; 702 training images have no annotations, so no
        tags, and are left out.
    Hardware and time:
        Not run at this size by us. By the estimate of ``voc07`` the proposals of all 123,287 images
        take a compact SAM 18 days on 2 CPU cores: divide them among machines (``--shard`` or
        ``--ray`` of ``generate_proposals``). The first detector keeps the descriptions of all
        proposals in a file: about 12 kB each, so some 150 GB of disk at 150 proposals an image.
    Expected score:
        The paper's, COCO AP / AP50 / AP75: 22.9 / 35.2 / 24.6 for MIST, 23.8 / 38.5 / 25.1 after
        Faster R-CNN with RoI drop.
    """
    drop = RoiDropConfig(
        classification_thresh=5.0, regression_thresh=4.0, start_fraction=10000 / 85000
    )
    return _published(wsod_epochs=12, detector_epochs=16, roi_drop=drop)


def coco17() -> ChainRecipe:
    """COCO 2017, trained on the tags of train2017 (118,287 images), evaluated on val2017.

    Command:
        As ``coco14``, with ``--split train2017`` and ``--split val2017``, and ``--skip-bad``: here
        1,021 training images have no annotations.
    Hardware and time:
        As ``coco14``, for 1.4 times as many images; not run at this size by us.
    Expected score:
        The paper has no box AP on this set. With ``--masks``: its mask AP / AP50 / AP75 of Mask
        R-CNN (ResNet-50) on val2017 are 20.6 / 33.9 / 22.0.
    """
    drop = RoiDropConfig(
        classification_thresh=5.0, regression_thresh=4.0, start_fraction=10000 / 85000
    )
    return _published(wsod_epochs=12, detector_epochs=12, roi_drop=drop)


RECIPES: Mapping[str, Callable[[], ChainRecipe]] = {
    recipe.__name__: recipe
    for recipe in (scenes, animals7, demo, folder, aquarium, voc07, voc12, coco14, coco17)
}
