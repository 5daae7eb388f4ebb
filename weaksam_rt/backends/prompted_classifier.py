"""``vit_classifier`` and ``prompt_clustering`` as one: a TensorRT engine, and what defines it.

Maps stay on the GPU: of an image the prompts alone come back.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.artifacts import ModelArtifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.backends.tensorrt import TensorRtModel
from weaksam_rt.contracts import (
    PromptedClassifierParameters,
    VitClassifierParameters,
    prompted_classifier_contract,
    prompted_engine_contract,
)
from weaksam_rt.errors import ArtifactError, ContractError, InferenceError
from weaksam_rt.preprocessing import maps_of_classes
from weaksam_rt.prompt_clustering import ClusteringConfig, prompts_from_maps
from weaksam_rt.prompt_clustering.batch import MAX_IMAGE_SIDE
from weaksam_rt.prompt_clustering.config import EnginePromptConfig
from weaksam_rt.prompt_clustering.tensorrt_plugin import config_from_attributes, plugin_attributes


def prompted_parameters(
    classifier: VitClassifierParameters, sam_image_size: int, clustering: ClusteringConfig
) -> PromptedClassifierParameters:
    """A classifier with the rules by which prompts are made of its maps.

    Args:
        classifier: Its sizes.
        sam_image_size: Side of SAM's input in pixels.
        clustering: Windows, thresholds, cluster size.
    """
    config = EnginePromptConfig(num_classes=1, model_size=sam_image_size, clustering=clustering)
    rules: dict[str, Any] = plugin_attributes(config)
    of_classifier = {f.name: getattr(classifier, f.name) for f in fields(classifier)}
    del rules["num_classes"], rules["model_size"]
    return PromptedClassifierParameters(**of_classifier, sam_image_size=sam_image_size, **rules)


def engine_prompt_config(parameters: PromptedClassifierParameters) -> EnginePromptConfig:
    """What the plugin of such an engine is configured with.

    Raises:
        ArtifactError: A rule is out of its range.
    """
    example = EnginePromptConfig(num_classes=1, model_size=1)
    given = {"num_classes": len(parameters.class_names), "model_size": parameters.sam_image_size}
    rules = {n: getattr(parameters, n) for n in plugin_attributes(example) if n not in given}
    return config_from_attributes(given | rules)


class PromptedClassifierModel:
    """The engine on a GPU, callable with the arrays of its contract."""

    def __init__(self, artifact: ModelArtifact, *, device: int = 0) -> None:
        """Open the engine; see ``TensorRtModel``."""
        parameters = artifact.parameters
        if not isinstance(parameters, PromptedClassifierParameters):
            raise ArtifactError(f"{artifact.path}: parameters are not those of {artifact.model}")
        self.contract = artifact.contract
        self._num_classes = len(parameters.class_names)
        self._engine = TensorRtModel(
            artifact, contract=prompted_engine_contract(parameters), device=device
        )

    def __call__(
        self, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run once; raises ``ContractError`` for ill-formed inputs, ``InferenceError`` for the
        rest.
        """
        self.contract.check_inputs(inputs)
        _check_image(inputs, self._num_classes, self.contract.name)
        names = [spec.name for spec in self.contract.outputs] if outputs is None else list(outputs)
        for name in names:
            self.contract.output(name)
        answer = self._engine(inputs, [*names, "counts"])
        num_points = int(answer.pop("counts")[0])
        if num_points < 0:
            raise InferenceError(f"{self.contract.name} refused an image that it should take")
        return {n: a if n == "logits" else a[:num_points] for n, a in answer.items()}


def prompted_classifier_model(
    classifier: ModelFunction, parameters: PromptedClassifierParameters
) -> ModelFunction:
    """The definition: the classifier, then the prompts in NumPy.

    Args:
        classifier: A model of the contract ``vit_classifier``.
        parameters: Of the two together.
    """
    contract = prompted_classifier_contract(parameters)
    clustering = engine_prompt_config(parameters).clustering

    def run(inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        contract.check_inputs(inputs)
        _check_image(inputs, len(parameters.class_names), contract.name)
        answer = classifier({"image": inputs["image"]}, None)
        height, width = (int(side) for side in inputs["image_size"])
        prompts = prompts_from_maps(
            **maps_of_classes(answer, inputs["tag_ids"]),
            class_ids=inputs["tag_ids"],
            image_size=(height, width),
            config=clustering,
        )
        names = [spec.name for spec in contract.outputs] if outputs is None else outputs
        return {n: answer[n] if n == "logits" else getattr(prompts, n) for n in names}

    return run


def _check_image(inputs: Arrays, num_classes: int, model: str) -> None:
    """Raise ``ContractError`` for what the kernels would refuse without a reason."""
    tags, sides, num_passes = inputs["tag_ids"], inputs["image_size"], len(inputs["image"])
    is_known = len(tags) > 0 and tags.min() >= 0 and tags.max() < num_classes
    if not is_known or len(np.unique(tags)) != len(tags):
        raise ContractError(
            f"{model}.tag_ids: expected different classes below {num_classes}, at least one, got "
            f"{tags.tolist()}"
        )
    if not (sides.min() >= 1 and sides.max() <= MAX_IMAGE_SIDE):
        raise ContractError(
            f"{model}.image_size: expected sides in [1, {MAX_IMAGE_SIDE}], got {sides.tolist()}"
        )
    if not 1 <= num_passes <= 2:
        raise ContractError(
            f"{model}.image: expected the image and perhaps its mirror image, got {num_passes}"
        )
