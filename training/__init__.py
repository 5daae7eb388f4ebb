"""From tagged images to a trained detector; run the stages as ``python -m training.<stage>``."""
