"""Metrics on boxes: VOC AP, COCO AP, CorLoc, proposal recall. They read truth; no training does."""
