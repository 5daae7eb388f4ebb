"""Trained modules behind the runtime's backend protocol: training runs the very same
``weaksam_rt.pipeline`` as serving.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor, nn

from training.models.sam_adapters import SamImageEncoderAdapter, SamMaskDecoderAdapter
from training.models.vit_adapter import LoadedClassifier
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.local import LocalBackend, ModelFunction
from weaksam_rt.contracts import (
    PROMPT_CLUSTERING,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
    ModelContract,
    SamParameters,
    sam_image_encoder_contract,
    sam_mask_decoder_contract,
    vit_classifier_contract,
)
from weaksam_rt.pipeline import PipelineModels
from weaksam_rt.prompt_clustering import ClusteringConfig, prompt_clustering_model


class TorchModel:
    """A contract-shaped module as a model function, the torch sister of ``OnnxRuntimeModel``."""

    def __init__(
        self,
        module: nn.Module,
        contract: ModelContract,
        *,
        device: str = "cpu",
        mixed_precision: bool = False,
    ) -> None:
        """Take over ``module``: it is moved to ``device`` and switched to evaluation.

        Args:
            module: Takes the contract's inputs in order, gives its outputs in order (a tuple, or
                one tensor).
            contract: What goes in and out; checked on every call.
            device: A torch device, for example ``cuda``.
            mixed_precision: bfloat16 autocast; outputs keep the contract's dtypes.
        """
        self._mixed_precision = mixed_precision
        self.contract = contract
        self._module = module.eval().to(device)
        self._device = device

    def __call__(
        self, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run once; raises ``ContractError`` for ill-formed inputs and unknown outputs."""
        autocast = torch.autocast(
            torch.device(self._device).type, dtype=torch.bfloat16, enabled=self._mixed_precision
        )
        with autocast:
            return call_on_arrays(self._module, self.contract, inputs, outputs, self._device)


def call_on_arrays(
    call: Callable[..., Tensor | Sequence[Tensor]],
    contract: ModelContract,
    inputs: Arrays,
    outputs: Sequence[str] | None,
    device: str,
) -> dict[str, NDArray[Any]]:
    """What computes on tensors as a function of arrays.

    Args:
        call: Takes the contract's inputs in order, gives its outputs in order (a sequence, or one
            tensor).
        contract: What goes in and out.
        inputs: By name.
        outputs: Names of the outputs wanted; None: all.
        device: A torch device.

    Raises:
        ContractError: Inputs are ill-formed, or there is no such output.
    """
    contract.check_inputs(inputs)
    names = [spec.name for spec in contract.outputs]
    wanted = names if outputs is None else [contract.output(n).name for n in outputs]
    # Copied: an array may be read-only, which no tensor is.
    tensors = [torch.from_numpy(inputs[s.name].copy()).to(device) for s in contract.inputs]
    with torch.inference_mode():
        results = call(*tensors)
    results = (results,) if isinstance(results, Tensor) else results
    found = dict(zip(names, results, strict=True))
    return {name: _as_array(found[name]) for name in wanted}


def _as_array(tensor: Tensor) -> NDArray[Any]:
    """NumPy has no bfloat16."""
    is_half = tensor.dtype == torch.bfloat16
    array: NDArray[Any] = (tensor.float() if is_half else tensor).cpu().numpy()
    return array


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModels:
    """What a ``WeakSamPipeline`` needs."""

    backend: LocalBackend
    models: PipelineModels


def proposal_models(
    classifier: LoadedClassifier,
    sam: Sam,
    clustering: ClusteringConfig,
    *,
    device: str = "cpu",
    mixed_precision: bool = False,
) -> TrainedModels:
    """The models of ``WeakSamPipeline.propose`` and ``segment``, in this process.

    Args:
        classifier: From ``load_classifier``.
        sam: From ``load_sam``.
        clustering: Settings of prompt clustering.
        device: A torch device; clustering stays on the CPU.
        mixed_precision: bfloat16 for SAM; the classifier's maps stay exact.
    """
    vit = classifier.served()
    vit_parameters = vit.parameters_of_contract(classifier.class_names)
    sam_parameters = _sam_parameters(sam)
    functions: dict[str, ModelFunction] = {
        VIT_CLASSIFIER: TorchModel(vit, vit_classifier_contract(vit_parameters), device=device),
        PROMPT_CLUSTERING: partial(prompt_clustering_model, config=clustering),
        **_sam_functions(sam, sam_parameters, device, mixed_precision=mixed_precision),
    }
    return TrainedModels(
        backend=LocalBackend(functions),
        models=PipelineModels(vit_classifier=vit_parameters, sam=sam_parameters),
    )


def sam_models(sam: Sam, *, device: str = "cpu", mixed_precision: bool = False) -> TrainedModels:
    """The models of ``WeakSamPipeline.segment`` alone, in this process; see ``proposal_models``."""
    parameters = _sam_parameters(sam)
    functions = _sam_functions(sam, parameters, device, mixed_precision=mixed_precision)
    return TrainedModels(backend=LocalBackend(functions), models=PipelineModels(sam=parameters))


def _sam_parameters(sam: Sam) -> SamParameters:
    return SamParameters(
        image_size=sam.image_encoder.img_size,
        embedding_size=sam.prompt_encoder.image_embedding_size[0],
        embedding_dim=sam.prompt_encoder.embed_dim,
    )


def _sam_functions(
    sam: Sam, parameters: SamParameters, device: str, *, mixed_precision: bool
) -> dict[str, ModelFunction]:
    return {
        SAM_IMAGE_ENCODER: TorchModel(
            SamImageEncoderAdapter(sam),
            sam_image_encoder_contract(parameters),
            device=device,
            mixed_precision=mixed_precision,
        ),
        SAM_MASK_DECODER: TorchModel(
            SamMaskDecoderAdapter(sam),
            sam_mask_decoder_contract(parameters),
            device=device,
            mixed_precision=mixed_precision,
        ),
    }
