"""The runtime of WeakSAM detection: everything that serving needs, and nothing that needs torch."""

__version__ = "0.1.0"
