"""Measurements: each script prints its command, the hardware and its figures."""
