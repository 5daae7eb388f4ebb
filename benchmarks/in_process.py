"""The served work in this process: the same pipeline on the same engines, each call timed."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.graph_cost import GraphCost, cost_of_model, load_graph
from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.client.messages import Call, detect_call, propose_call, segment_call
from weaksam_rt.contracts import PROMPT_CLUSTERING
from weaksam_rt.errors import InferenceError
from weaksam_rt.images import DecodedImage, decode_image, decode_reduced
from weaksam_rt.model_repository import ExportedModels, pipeline_models
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.prompt_clustering import prompt_clustering_model

PipelineName = Literal["detect", "propose", "segment"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCall:
    """One call of a model."""

    model: str
    milliseconds: float
    shapes: Shapes
    """Of its inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One request's work in this process, in milliseconds."""

    decode: float
    """Bytes to pixels."""
    pipeline: float
    """Pixels to the result, models included."""
    calls: tuple[EngineCall, ...]

    @property
    def between_the_models(self) -> float:
        """What the pipeline does itself: resize, pack, boxes, suppression."""
        return self.pipeline - sum(call.milliseconds for call in self.calls)

    def by_model(self) -> dict[str, float]:
        """Milliseconds of all calls of each model, in the order of their first calls."""
        spent: dict[str, float] = defaultdict(float)
        for call in self.calls:
            spent[call.model] += call.milliseconds
        return dict(spent)


class RecordingBackend:
    """An ``InferenceBackend`` over functions that remembers every call."""

    def __init__(self, models: Mapping[str, ModelFunction]) -> None:
        """Serve ``models`` by name."""
        self._models = dict(models)
        self.calls: list[EngineCall] = []

    async def infer(
        self, model: str, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """See ``InferenceBackend.infer``."""
        if model not in self._models:
            raise InferenceError(f"no model {model!r} here; there are {sorted(self._models)}")
        start = time.perf_counter()
        answer = self._models[model](inputs, outputs)
        spent = 1e3 * (time.perf_counter() - start)
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        self.calls.append(EngineCall(model=model, milliseconds=spent, shapes=shapes))
        return answer


class TracedPipeline:
    """One of the three pipelines in this process, from an image's bytes to a result."""

    def __init__(self, exported: ExportedModels, name: PipelineName, *, threads: int = 0) -> None:
        """Open the engines as a server does, with ``threads`` threads; 0: all cores."""
        self._name = name
        by_model = {artifact.model: artifact for artifact in exported.artifacts}
        engines: dict[str, ModelFunction] = {
            model: open_engine(artifact, num_threads=threads)
            for model, artifact in by_model.items()
        }
        engines[PROMPT_CLUSTERING] = partial(
            prompt_clustering_model, config=exported.config.clustering
        )
        self._backend = RecordingBackend(engines)
        self._pipeline = WeakSamPipeline(self._backend, pipeline_models(by_model), exported.config)

    async def trace(self, data: bytes) -> Trace:
        """Do the work of one request on an encoded image."""
        self._backend.calls.clear()
        start = time.perf_counter()
        image = self._decode(data)
        decoded = time.perf_counter()
        await self._work(image)
        done = time.perf_counter()
        return Trace(
            decode=1e3 * (decoded - start),
            pipeline=1e3 * (done - decoded),
            calls=tuple(self._backend.calls),
        )

    def _decode(self, data: bytes) -> DecodedImage:
        if self._name == "detect":
            return decode_reduced(data, self._pipeline.longest_side_seen(with_masks=False))
        pixels = decode_image(data)
        return DecodedImage(pixels=pixels, image_size=(pixels.shape[0], pixels.shape[1]))

    async def _work(self, image: DecodedImage) -> object:
        match self._name:
            case "detect":
                return await self._pipeline.detect(image.pixels, image_size=image.image_size)
            case "propose":
                return await self._pipeline.propose(image.pixels)
            case "segment":
                return await self._pipeline.segment(image.pixels, **_middle(image.image_size))


def call_of(name: PipelineName, data: bytes) -> Call[Any]:
    """The request that asks a server for the same."""
    match name:
        case "detect":
            return detect_call(data)
        case "propose":
            return propose_call(data)
        case "segment":
            height, width, _ = decode_image(data).shape
            return segment_call(data, **_middle((height, width)))


def costs_of_calls(
    calls: Sequence[EngineCall], artifacts: Sequence[ModelArtifact]
) -> dict[str, list[GraphCost]]:
    """Costs of every call, by model; models without an engine file are left out."""
    graphs = {artifact.model: load_graph(artifact.path) for artifact in artifacts}
    known: dict[tuple[str, str], GraphCost] = {}
    costs: dict[str, list[GraphCost]] = {}
    for call in calls:
        if call.model not in graphs:
            continue
        key = (call.model, str(sorted(call.shapes.items())))
        if key not in known:
            known[key] = cost_of_model(graphs[call.model], call.shapes)
        costs.setdefault(call.model, []).append(known[key])
    return costs


def _middle(image_size: tuple[int, int]) -> dict[str, Any]:
    """One point prompt in the middle of the image."""
    height, width = image_size
    return {
        "point_coords": np.array([[[width / 2, height / 2]]], np.float32),
        "point_labels": np.ones((1, 1), np.int32),
    }
