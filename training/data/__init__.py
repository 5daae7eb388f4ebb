"""Data sets: COCO-format folders and generated scenes."""
