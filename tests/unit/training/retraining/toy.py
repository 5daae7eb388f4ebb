"""The smallest detector that is one."""

from training.retraining.faster_rcnn import FasterRcnnConfig

TOY = FasterRcnnConfig(
    image_size=64,
    neck_channels=16,
    roi_channels=16,
    head_width=32,
    anchor_sizes=((12,), (24,), (44,)),
    rois_per_image=16,
    proposals_per_image=50,
)
