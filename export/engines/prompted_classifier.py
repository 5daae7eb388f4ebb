"""Classifier and prompt chain as one TensorRT engine: ``vit_classifier``'s graph, and behind it the
plugin that turns its maps into prompts on the GPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.agreement import Agreement, agreement, common_share, worst
from export.engines.base import EngineConfig, EngineSource, typed_graph
from export.engines.build import accepted, builder_for, engine_passport
from export.engines.compare import ENGINE_LIMITS, opened_for_comparison
from export.exportable import example_inputs
from export.verify import ParityError
from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.backends.prompted_classifier import (
    engine_prompt_config,
    prompted_classifier_model,
    prompted_parameters,
)
from weaksam_rt.contracts import (
    PROMPT_CLUSTERING,
    PROMPTED_CLASSIFIER,
    VIT_CLASSIFIER,
    PromptedClassifierParameters,
    VitClassifierParameters,
    prompted_engine_contract,
)
from weaksam_rt.errors import ArtifactError, BackendUnavailableError
from weaksam_rt.prompt_clustering import ClusteringConfig
from weaksam_rt.prompt_clustering.tensorrt_plugin import (
    ENGINE_INPUTS,
    ENGINE_OUTPUTS,
    PLUGIN_NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    plugin_attributes,
)
from weaksam_rt.types import PointPrompts

_PREFIX = "prompts::"
"""Of names that are added to the classifier's graph."""
_ELEMENT_TYPES = {"UINT8": TensorProto.UINT8, "INT32": TensorProto.INT32, "FP32": TensorProto.FLOAT}
COMMON_PROMPTS = 0.9
"""Share of the prompts up from which an engine is accepted. Rounded maps move a peak to another
pixel of a plateau now and then."""


def prompted_graph(
    classifier: onnx.ModelProto, parameters: PromptedClassifierParameters
) -> onnx.ModelProto:
    """The classifier's graph with the plugin behind it.

    Args:
        classifier: Of a ``vit_classifier``, in any precision; its outputs are float32.
        parameters: Of the two together.

    Returns:
        A graph of ``prompted_engine_contract``. TensorRT alone reads it: the plugin is an operator
        of the domain ``weaksam_rt``.
    """
    model = onnx.ModelProto()
    model.CopyFrom(classifier)
    graph = model.graph
    contract = prompted_engine_contract(parameters)
    axes = {"image": "passes", "tag_ids": "tags"}
    del graph.input[:]
    for spec in contract.inputs:
        shape = [axes[spec.name] if size == -1 else size for size in spec.shape]
        graph.input.append(
            helper.make_tensor_value_info(spec.name, _ELEMENT_TYPES[spec.dtype], shape)
        )
    graph.node.extend(_map_nodes())
    side = parameters.map_size
    graph.initializer.append(
        numpy_helper.from_array(np.array([0, -1, side, side], np.int64), f"{_PREFIX}shape")
    )
    attributes: dict[str, Any] = plugin_attributes(engine_prompt_config(parameters))
    graph.node.append(
        helper.make_node(
            PLUGIN_NAME,
            [f"{_PREFIX}maps", *ENGINE_INPUTS[1:]],
            list(ENGINE_OUTPUTS),
            name=f"{_PREFIX}plugin",
            domain=PLUGIN_NAMESPACE,
            plugin_version=PLUGIN_VERSION,
            plugin_namespace=PLUGIN_NAMESPACE,
            **attributes,
        )
    )
    model.opset_import.append(helper.make_opsetid(PLUGIN_NAMESPACE, int(PLUGIN_VERSION)))
    del graph.output[:]
    for spec in contract.outputs:
        shape = [f"{spec.name}_{axis}" if n == -1 else n for axis, n in enumerate(spec.shape)]
        graph.output.append(
            helper.make_tensor_value_info(spec.name, _ELEMENT_TYPES[spec.dtype], shape)
        )
    return model


def _map_nodes() -> list[onnx.NodeProto]:
    """Maps of the tags alone, as ``EngineMaps`` wants them: coarse, fine, cross."""
    tags = ENGINE_INPUTS[1]
    parts = {"coarse_maps": 1, "fine_maps": 1, "cross_maps": 2}
    nodes = [
        helper.make_node(
            "Gather", [name, tags], [f"{_PREFIX}{name}"], name=f"{_PREFIX}{name}", axis=axis
        )
        for name, axis in parts.items()
    ]
    flat = f"{_PREFIX}flat_cross_maps"
    nodes.append(
        helper.make_node("Reshape", [f"{_PREFIX}cross_maps", f"{_PREFIX}shape"], [flat], name=flat)
    )
    joined = [f"{_PREFIX}coarse_maps", f"{_PREFIX}fine_maps", flat]
    maps = f"{_PREFIX}maps"
    nodes.append(helper.make_node("Concat", joined, [maps], name=maps, axis=1))
    return nodes


def build_prompted_classifier(
    source: ModelArtifact,
    directory: Path,
    *,
    sam_image_size: int,
    clustering: ClusteringConfig,
    config: EngineConfig,
) -> ModelArtifact:
    """Build the engine on this machine's GPU, compare it with the two models, and write its
    manifest.

    Args:
        source: A ``vit_classifier`` of ``export_model``.
        directory: Gets ``model.plan`` and ``manifest.json``.
        sam_image_size: Side in pixels of the input of the SAM that is prompted.
        clustering: How maps become prompts; it is fixed in the engine.
        config: Precision of the classifier, profiles.

    Raises:
        BackendUnavailableError: TensorRT or the GPU is not here.
        EngineBuildError: TensorRT refuses the graph.
        ParityError: The engine's prompts are not those of the two models.
        ArtifactError: ``source`` is no ONNX classifier.
        ValueError: ``config`` asks for what this engine has not, or ``directory`` is the source's.
    """
    parameters = source.parameters
    if source.model != VIT_CLASSIFIER or not isinstance(parameters, VitClassifierParameters):
        raise ArtifactError(f"{source.path} is a {source.model}, expected a {VIT_CLASSIFIER}")
    if source.engine != "onnxruntime":
        raise ArtifactError(f"{source.path} is for {source.engine}; engines are built from ONNX")
    if config.refittable or config.precision in ("int8", "fp8"):
        raise ValueError(
            f"a {PROMPTED_CLASSIFIER} is built in fp32, fp16 or bf16 and not refittable, got "
            f"{config.precision}{', refittable' if config.refittable else ''}"
        )
    if directory.resolve() == source.path.parent.resolve():
        raise ValueError(f"{directory} holds the model that the engine is built from")
    builder = builder_for("tensorrt")
    try:
        builder.check(config)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            f"{PROMPTED_CLASSIFIER} is built by TensorRT alone, on the GPU that serves it; "
            f"elsewhere serve {VIT_CLASSIFIER} and {PROMPT_CLUSTERING} ({error})"
        ) from error
    together = prompted_parameters(parameters, sam_image_size, clustering)
    classifier = EngineSource(
        model=VIT_CLASSIFIER, parameters=parameters, graph=onnx.load(source.path)
    )
    origin = EngineSource(
        model=PROMPTED_CLASSIFIER,
        parameters=together,
        graph=prompted_graph(typed_graph(classifier, config), together),
    )
    path = directory / builder.file_name
    # The precision is in the graph by now.
    built = builder.build(origin, replace(config, precision="fp32"), path)
    built = replace(built, precision=config.precision)
    reference = prompted_classifier_model(OnnxRuntimeModel(source), together)

    def compare(unverified: ModelArtifact) -> Agreement:
        limit = ENGINE_LIMITS[config.precision]
        inputs = example_inputs(PROMPTED_CLASSIFIER, together)
        return compare_prompts(opened_for_comparison(unverified), reference, inputs, limit)

    return accepted(path, origin, engine_passport(source, "tensorrt", built, config, {}), compare)


def compare_prompts(
    engine: ModelFunction, reference: ModelFunction, inputs: Sequence[Arrays], limit: float
) -> Agreement:
    """How far an engine's logits are from the definition's, on the worst of several images.

    Args:
        engine: Of ``prompted_classifier``.
        reference: Likewise.
        inputs: Of the contract.
        limit: Distance (``Agreement``) of the logits up to which the engine is accepted.

    Raises:
        ParityError: Logits are too far away, or fewer than ``COMMON_PROMPTS`` of the prompts are
            the same.
    """
    found = []
    for arrays in inputs:
        expected, got = reference(arrays, None), engine(arrays, None)
        one = agreement(
            PROMPTED_CLASSIFIER, {"logits": expected["logits"]}, {"logits": got["logits"]}
        )
        share = common_share([(_prompts(expected), _prompts(got))])
        if not (one.finite and one.distance <= limit and share >= COMMON_PROMPTS):
            raise ParityError(
                f"{PROMPTED_CLASSIFIER}: logits at a distance of {one.distance:.3g} and "
                f"{share:.0%} of the prompts in common with the two models, up to {limit:g} and "
                f"from {COMMON_PROMPTS:.0%} is accepted"
            )
        found.append(one)
    return worst(found)


def _prompts(answer: Arrays) -> PointPrompts:
    names = ("points", "scores", "class_ids", "sources")
    return PointPrompts(**{name: answer[name] for name in names})
