"""Serves ``prompt_clustering``."""

from weaksam_rt.serving.clustering_model import ClusteringModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
