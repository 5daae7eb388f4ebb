"""From a checkpoint to a verified engine with a manifest."""
