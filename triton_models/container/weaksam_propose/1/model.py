"""Serves ``weaksam_propose``."""

from weaksam_rt.serving.pipeline_models import ProposeModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
