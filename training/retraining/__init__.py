"""Detectors trained on boxes, true or pseudo, and what protects them from wrong pseudo boxes."""
