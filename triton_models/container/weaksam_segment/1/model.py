"""Serves ``weaksam_segment``."""

from weaksam_rt.serving.pipeline_models import SegmentModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
