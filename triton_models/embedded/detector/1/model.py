"""Serves ``detector``."""

from weaksam_rt.serving.engine_model import EngineModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
