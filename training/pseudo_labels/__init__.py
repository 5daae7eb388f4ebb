"""From detections of a weakly-supervised detector to boxes that another detector trains on."""
