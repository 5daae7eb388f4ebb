"""``prompt_clustering`` as a Triton model: no engine file, the runtime's own function.

An instance on a GPU runs the CUDA kernels there, and reads maps that lie on it where they are; one
on the CPU runs what the settings say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from weaksam_rt.contracts import (
    PROMPT_CLUSTERING,
    ClusteringParameters,
    engine_contract,
)
from weaksam_rt.model_repository import PIPELINE_NAME, read_pipeline_file
from weaksam_rt.prompt_clustering import prompt_backend, prompt_clustering_model
from weaksam_rt.serving.engine_model import answer_requests


class ClusteringModel:
    """Triton's interface to ``prompt_clustering_model``."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the settings that lie beside ``model.py`` and load the kernels.

        Raises:
            BackendUnavailableError: The instance is on a GPU that cannot run them.
        """
        folder = Path(args["model_repository"]) / args["model_version"]
        config = read_pipeline_file(folder / PIPELINE_NAME).config
        self._contract = engine_contract(PROMPT_CLUSTERING, ClusteringParameters())
        clustering = config.clustering
        if args["model_instance_kind"] == "GPU":
            device = int(args["model_instance_device_id"])
            clustering = replace(clustering, backend="cuda", device=device)
        # Now, not at the first request.
        prompt_backend(clustering.backend, clustering.device)
        self._model = partial(prompt_clustering_model, config=clustering)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request: with its outputs, or with its own error."""
        return answer_requests(requests, self._contract, self._model)
