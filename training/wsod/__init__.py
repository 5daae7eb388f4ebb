"""Weakly-supervised detection on proposals: one paper, one file, pure losses."""
