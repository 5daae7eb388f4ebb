"""Clients of a served pipeline, over gRPC. Needs NumPy and ``tritonclient``; no torch, no GPU."""

from weaksam_rt.client._aio import AsyncWeakSamClient
from weaksam_rt.client._sync import WeakSamClient
from weaksam_rt.client.config import ClientConfig, ClientTls
from weaksam_rt.client.results import (
    DetectOutcome,
    DetectResult,
    EngineSummary,
    ProposeResult,
    ServedModel,
)

__all__ = [
    "AsyncWeakSamClient",
    "ClientConfig",
    "ClientTls",
    "DetectOutcome",
    "DetectResult",
    "EngineSummary",
    "ProposeResult",
    "ServedModel",
    "WeakSamClient",
]
