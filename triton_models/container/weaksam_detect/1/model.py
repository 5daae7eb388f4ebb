"""Serves ``weaksam_detect``."""

from weaksam_rt.serving.pipeline_models import DetectModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
