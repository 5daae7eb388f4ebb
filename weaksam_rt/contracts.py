"""The contract of every served model: names, dtypes, shapes and limits of its tensors.

This is the only place where they are written. Export, server configuration, server code and client
read them from here. Shapes leave out the batch axis; -1 is a size that varies from call to call.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.class_activation_map import CAM_PEAKS, CROSS_PEAKS
from weaksam_rt.errors import ContractError

DETECTOR = "detector"
VIT_CLASSIFIER = "vit_classifier"
PROMPT_CLUSTERING = "prompt_clustering"
SAM_IMAGE_ENCODER = "sam_image_encoder"
SAM_MASK_DECODER = "sam_mask_decoder"
PROMPTED_CLASSIFIER = "prompted_classifier"
"""``vit_classifier`` and ``prompt_clustering`` as one TensorRT engine."""

NUM_MASK_TOKENS = 4
"""SAM's masks per prompt: 0 is the single-mask answer, 1 to 3 are the multimask answers."""

_NUMPY_DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "BYTES": np.object_,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One input or output."""

    name: str
    dtype: str
    """Triton's name: BOOL, UINT8, INT32, INT64, FP32 or BYTES."""
    shape: tuple[int, ...]
    """Without the batch axis; -1 varies."""
    description: str
    optional: bool = False
    """Inputs only: the model has a default."""

    def __post_init__(self) -> None:
        if self.dtype not in _NUMPY_DTYPES:
            raise ValueError(f"{self.name}: dtype {self.dtype}, expected one of {[*_NUMPY_DTYPES]}")

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of the arrays; BYTES are object arrays of ``bytes``."""
        return np.dtype(_NUMPY_DTYPES[self.dtype])

    def check(self, array: NDArray[Any], *, model: str, batched: bool) -> None:
        """Raise ``ContractError`` unless ``array`` has this dtype, rank and fixed sizes."""
        shape = array.shape[1:] if batched else array.shape
        rank_fits = array.ndim == len(self.shape) + batched
        sizes_fit = rank_fits and all(
            want in (-1, got) for want, got in zip(self.shape, shape, strict=True)
        )
        if array.dtype != self.numpy_dtype or not sizes_fit:
            expected = (["batch"] if batched else []) + [
                "any" if size == -1 else size for size in self.shape
            ]
            raise ContractError(
                f"{model}.{self.name}: expected {self.dtype} [{', '.join(map(str, expected))}], "
                f"got {array.dtype} {list(array.shape)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelContract:
    """What a served model takes and gives."""

    name: str
    description: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    """Largest first axis of one execution; 0: tensors have no batch axis."""

    def input(self, name: str) -> TensorSpec:
        """The input called ``name``; raises ``ContractError`` that lists the inputs."""
        return _named(self.inputs, name, f"{self.name} has no input")

    def output(self, name: str) -> TensorSpec:
        """The output called ``name``; raises ``ContractError`` that lists the outputs."""
        return _named(self.outputs, name, f"{self.name} has no output")

    def check_inputs(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Raise ``ContractError`` for a missing, unknown or ill-formed input or too large a
        batch.
        """
        for name in arrays:
            self.input(name)
        for spec in self.inputs:
            if spec.name in arrays:
                spec.check(arrays[spec.name], model=self.name, batched=self.is_batched)
            elif not spec.optional:
                raise ContractError(f"{self.name}: input {spec.name} ({spec.dtype}) is missing")
        self._check_batch(arrays)

    def check_outputs(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Raise ``ContractError`` for an unknown or ill-formed output."""
        for name, array in arrays.items():
            self.output(name).check(array, model=self.name, batched=self.is_batched)

    @property
    def is_batched(self) -> bool:
        """Every tensor has a batch axis in front."""
        return self.max_batch_size > 0

    def _check_batch(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        if not self.is_batched:
            return
        sizes = {name: len(array) for name, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            raise ContractError(f"{self.name}: inputs differ in batch size: {sizes}")
        if any(size > self.max_batch_size for size in sizes.values()):
            raise ContractError(
                f"{self.name}: batch of {max(sizes.values())}, at most {self.max_batch_size}"
            )


def _named(specs: tuple[TensorSpec, ...], name: str, complaint: str) -> TensorSpec:
    for spec in specs:
        if spec.name == name:
            return spec
    raise ContractError(f"{complaint} {name!r}; it has {[spec.name for spec in specs]}")


# ---------------------------------------------------------------------------------------------
# Parameters: what a contract depends on besides the model's name. They live in each manifest.
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorParameters:
    """Sizes of an exported detector."""

    image_size: int
    """Side of the square input in pixels; the longest image side is scaled to it."""
    num_candidates: int
    """Boxes it always returns, before suppression."""
    class_names: tuple[str, ...]
    mask_size: int = 0
    """Side of the mask that it returns for each box; 0: it returns boxes only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VitClassifierParameters:
    """Sizes of an exported classification ViT."""

    image_size: int
    """Side of the square input in pixels; both image sides are scaled to it."""
    map_size: int
    """Side of the activation maps."""
    num_cross_maps: int
    """Attention maps per class: heads times chosen layers."""
    class_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptedClassifierParameters:
    """Sizes of a classification ViT and the rules by which its engine makes prompts."""

    image_size: int
    """As in ``VitClassifierParameters``, and so the next three."""
    map_size: int
    num_cross_maps: int
    class_names: tuple[str, ...]
    sam_image_size: int
    """Side of SAM's input in pixels, in which prompts are packed for it."""
    points_per_cluster: int = 5
    """As in ``ClusteringConfig``; the next ones as in ``PeakConfig``."""
    cam_kernel_size: int = CAM_PEAKS.kernel_size
    cam_value_thresh: float = CAM_PEAKS.value_thresh
    cam_max_candidates: int = CAM_PEAKS.max_candidates
    cam_is_l2: int = 0
    cross_kernel_size: int = CROSS_PEAKS.kernel_size
    cross_value_thresh: float = CROSS_PEAKS.value_thresh
    cross_max_candidates: int = CROSS_PEAKS.max_candidates
    cross_is_l2: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamParameters:
    """Sizes of an exported SAM; encoder and decoder of one model share them."""

    image_size: int
    """Side of the square input in pixels; the longest image side is scaled to it."""
    embedding_size: int
    """Side of the image embedding."""
    embedding_dim: int
    """Channels of the image embedding."""

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution masks."""
        return 4 * self.embedding_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusteringParameters:
    """Prompt clustering has no sizes of its own."""


Parameters = (
    DetectorParameters
    | VitClassifierParameters
    | PromptedClassifierParameters
    | SamParameters
    | ClusteringParameters
)


# ---------------------------------------------------------------------------------------------
# Engine models
# ---------------------------------------------------------------------------------------------


def _tensor(
    name: str, dtype: str, shape: tuple[int, ...], description: str, *, optional: bool = False
) -> TensorSpec:
    return TensorSpec(
        name=name, dtype=dtype, shape=shape, description=description, optional=optional
    )


def _image_input(image_size: int, frame: str) -> TensorSpec:
    return _tensor(
        "image",
        "UINT8",
        (image_size, image_size, 3),
        f"RGB pixels in [0, 255], {frame}; normalisation is inside the model",
    )


def detector_contract(parameters: DetectorParameters) -> ModelContract:
    """Contract of ``detector``: a dense graph; suppression is left to the runtime."""
    candidates = parameters.num_candidates
    masks: tuple[TensorSpec, ...] = ()
    if parameters.mask_size:
        masks = (
            _tensor(
                "mask_logits",
                "FP32",
                (candidates, parameters.mask_size, parameters.mask_size),
                "the mask of each box's own class on a grid over the box; above 0 is inside",
            ),
        )
    return ModelContract(
        name=DETECTOR,
        description="Detection candidates of letterboxed images, before suppression.",
        inputs=(_image_input(parameters.image_size, "top-left aligned, padded with zeros"),),
        outputs=(
            _tensor("boxes", "FP32", (candidates, 4), "XYXY in pixels of the model frame"),
            _tensor("scores", "FP32", (candidates,), "class probability in [0, 1], descending"),
            _tensor("labels", "INT32", (candidates,), "0-based class, without background"),
            *masks,
        ),
        max_batch_size=8,
    )


def vit_classifier_contract(parameters: VitClassifierParameters) -> ModelContract:
    """Contract of ``vit_classifier``."""
    num_classes, side = len(parameters.class_names), parameters.map_size
    class_maps = (num_classes, side, side)
    return ModelContract(
        name=VIT_CLASSIFIER,
        description="Image-level logits and the maps that point prompts come from.",
        inputs=(_image_input(parameters.image_size, "both sides scaled to the model's"),),
        outputs=(
            _tensor(
                "logits",
                "FP32",
                (num_classes,),
                "class-token logits; a class counts as present above -0.5",
            ),
            _tensor("coarse_maps", "FP32", class_maps, "class activation maps, at least 0"),
            _tensor(
                "fine_maps",
                "FP32",
                class_maps,
                "class activation maps refined by patch attention, at least 0",
            ),
            _tensor(
                "cross_maps",
                "FP32",
                (parameters.num_cross_maps, *class_maps),
                "class-to-patch attention of each chosen layer and head",
            ),
        ),
        max_batch_size=8,
    )


_PROMPT_OUTPUTS = (
    _tensor("points", "FP32", (-1, 2), "(x, y) in pixels of the original image"),
    _tensor("scores", "FP32", (-1,), "activation in [0, 1]"),
    _tensor("class_ids", "INT32", (-1,), "class, -1 for cross"),
    _tensor("sources", "INT32", (-1,), "PromptSource: 1 coarse, 2 fine, 3 cross"),
)
_ORIGINAL_SIZE = _tensor("image_size", "INT32", (2,), "(height, width) of the original image")


def prompt_clustering_contract(parameters: ClusteringParameters) -> ModelContract:
    """Contract of ``prompt_clustering``; one image a call, classes that are present only."""
    del parameters
    return ModelContract(
        name=PROMPT_CLUSTERING,
        description="Activation maps of one image to point prompts.",
        inputs=(
            _tensor(
                "coarse_maps",
                "FP32",
                (-1, -1, -1),
                "[classes, h, w], summed over test-time passes, not normalised",
            ),
            _tensor("fine_maps", "FP32", (-1, -1, -1), "as coarse_maps"),
            _tensor("cross_maps", "FP32", (-1, -1, -1, -1), "[layers and heads, classes, h, w]"),
            _tensor("class_ids", "INT32", (-1,), "class of each map"),
            _ORIGINAL_SIZE,
        ),
        outputs=_PROMPT_OUTPUTS,
        max_batch_size=0,
    )


def prompted_classifier_contract(parameters: PromptedClassifierParameters) -> ModelContract:
    """Contract of ``prompted_classifier``; one image a call, whose tags are known."""
    side = parameters.image_size
    return ModelContract(
        name=PROMPTED_CLASSIFIER,
        description="An image and its tags to logits and point prompts, in one engine.",
        inputs=(
            _tensor(
                "image",
                "UINT8",
                (-1, side, side, 3),
                "as of vit_classifier: the image and, if wanted, its mirror image",
            ),
            _tensor("tag_ids", "INT32", (-1,), "classes in the image, at least one, all different"),
            _ORIGINAL_SIZE,
        ),
        outputs=(
            _tensor("logits", "FP32", (-1, len(parameters.class_names)), "as of vit_classifier"),
            *_PROMPT_OUTPUTS,
        ),
        max_batch_size=0,
    )


def prompted_engine_contract(parameters: PromptedClassifierParameters) -> ModelContract:
    """What the engine of ``prompted_classifier`` itself gives: outputs with room for all prompts
    that there may be, and how many there are.
    """
    served = prompted_classifier_contract(parameters)
    counts = _tensor("counts", "INT32", (3,), "points, SAM's prompts and their points; or -1 each")
    return replace(served, outputs=(*served.outputs, counts))


def sam_image_encoder_contract(parameters: SamParameters) -> ModelContract:
    """Contract of ``sam_image_encoder``."""
    return ModelContract(
        name=SAM_IMAGE_ENCODER,
        description="SAM's image embedding; the expensive half, once per image.",
        inputs=(
            _image_input(parameters.image_size, "top-left aligned; padding is ignored"),
            _tensor(
                "valid_size", "INT32", (2,), "(height, width) of the image inside the model frame"
            ),
        ),
        outputs=(_embedding_spec(parameters, ()),),
        max_batch_size=8,
    )


def sam_mask_decoder_contract(parameters: SamParameters) -> ModelContract:
    """Contract of ``sam_mask_decoder``: many prompts of many images in one call.

    Prompts and images are two different axes, so there is no batch axis that Triton could
    concatenate; whoever calls packs the prompts (``weaksam_rt.prompts``).
    """
    mask_size = parameters.mask_size
    return ModelContract(
        name=SAM_MASK_DECODER,
        description="Masks from image embeddings and packed prompts.",
        inputs=(
            _embedding_spec(parameters, (-1,)),
            _tensor("image_index", "INT32", (-1,), "[prompts], the image of each prompt"),
            _tensor(
                "point_coords",
                "FP32",
                (-1, -1, 2),
                "[prompts, points, 2], (x, y) in the model frame",
            ),
            _tensor(
                "point_labels",
                "INT32",
                (-1, -1),
                "1 object, 0 background, -1 padding, 2 and 3 the corners of a box",
            ),
        ),
        outputs=(
            _tensor(
                "low_res_logits",
                "FP32",
                (-1, NUM_MASK_TOKENS, mask_size, mask_size),
                "mask logits over the model frame; above 0 is inside",
            ),
            _tensor(
                "iou_predictions",
                "FP32",
                (-1, NUM_MASK_TOKENS),
                "SAM's own estimate of each mask's IoU",
            ),
        ),
        max_batch_size=0,
    )


def _embedding_spec(parameters: SamParameters, leading: tuple[int, ...]) -> TensorSpec:
    side = parameters.embedding_size
    return _tensor(
        "image_embeddings",
        "FP32",
        (*leading, parameters.embedding_dim, side, side),
        "SAM's image embeddings",
    )


# ---------------------------------------------------------------------------------------------
# Pipeline models: what clients call. One image a request.
# ---------------------------------------------------------------------------------------------

_ENCODED_IMAGE = _tensor(
    "image", "BYTES", (1,), "one JPEG, PNG or WebP file's bytes; EXIF orientation is applied"
)
_IMAGE_SIZE = _tensor(
    "image_size",
    "INT32",
    (2,),
    "(height, width) of the upright image that boxes and masks refer to",
)

WEAKSAM_DETECT = ModelContract(
    name="weaksam_detect",
    description="Image bytes to boxes, labels, scores and, if asked for, masks.",
    inputs=(
        _ENCODED_IMAGE,
        _tensor("score_thresh", "FP32", (1,), "lowest score to return, in [0, 1]", optional=True),
        _tensor(
            "max_detections", "INT32", (1,), "most detections to return, at least 1", optional=True
        ),
        _tensor(
            "with_masks",
            "BOOL",
            (1,),
            "also masks: the detector's own if it has some, else SAM prompted with every box",
            optional=True,
        ),
    ),
    outputs=(
        _tensor("boxes", "FP32", (-1, 4), "XYXY in pixels"),
        _tensor("scores", "FP32", (-1,), "in [0, 1], best first"),
        _tensor("labels", "INT32", (-1,), "0-based class"),
        _tensor("label_names", "BYTES", (-1,), "class name, UTF-8"),
        _tensor(
            "mask_counts",
            "BYTES",
            (-1,),
            "COCO RLE counts of each mask; no elements unless with_masks",
        ),
        _IMAGE_SIZE,
    ),
    max_batch_size=8,
)

WEAKSAM_PROPOSE = ModelContract(
    name="weaksam_propose",
    description="Image bytes and, if known, tags to class-agnostic proposals.",
    inputs=(
        _ENCODED_IMAGE,
        _tensor(
            "tags",
            "BYTES",
            (-1,),
            "class names in the image, UTF-8; left out: the classifier decides",
            optional=True,
        ),
    ),
    outputs=(
        _tensor("boxes", "FP32", (-1, 4), "XYXY in pixels"),
        _tensor("scores", "FP32", (-1,), "SAM's predicted IoU"),
        _tensor("sources", "INT32", (-1,), "PromptSource: 0 grid, 1 coarse, 2 fine, 3 cross"),
        _tensor("used_tags", "BYTES", (-1,), "tags given or predicted"),
        _IMAGE_SIZE,
    ),
    max_batch_size=8,
)

WEAKSAM_SEGMENT = ModelContract(
    name="weaksam_segment",
    description="Image bytes and points or boxes to masks.",
    inputs=(
        _ENCODED_IMAGE,
        _tensor(
            "point_coords",
            "FP32",
            (-1, -1, 2),
            "[prompts, points, 2], (x, y) in pixels of the upright image",
            optional=True,
        ),
        _tensor(
            "point_labels",
            "INT32",
            (-1, -1),
            "[prompts, points], 1 object, 0 background",
            optional=True,
        ),
        _tensor(
            "boxes",
            "FP32",
            (-1, 4),
            "[prompts, 4], XYXY in pixels; with points: one box for each prompt",
            optional=True,
        ),
        _tensor(
            "multimask", "BOOL", (1,), "three masks for each prompt instead of one", optional=True
        ),
    ),
    outputs=(
        _tensor("mask_counts", "BYTES", (-1, -1), "[prompts, masks], COCO RLE counts"),
        _tensor(
            "boxes",
            "FP32",
            (-1, -1, 4),
            "[prompts, masks, 4], XYXY around each mask; zeros for an empty one",
        ),
        _tensor("scores", "FP32", (-1, -1), "[prompts, masks], SAM's predicted IoU"),
        _tensor(
            "stability_scores",
            "FP32",
            (-1, -1),
            "[prompts, masks], IoU between a stricter and a looser threshold",
        ),
        _IMAGE_SIZE,
    ),
    max_batch_size=8,
)

PIPELINE_CONTRACTS = {
    contract.name: contract for contract in (WEAKSAM_DETECT, WEAKSAM_PROPOSE, WEAKSAM_SEGMENT)
}

MEMBERS_OF_PIPELINE = {
    WEAKSAM_DETECT.name: (DETECTOR, SAM_IMAGE_ENCODER, SAM_MASK_DECODER),
    WEAKSAM_PROPOSE.name: (
        VIT_CLASSIFIER, PROMPT_CLUSTERING, SAM_IMAGE_ENCODER, SAM_MASK_DECODER,
    ),
    WEAKSAM_SEGMENT.name: (SAM_IMAGE_ENCODER, SAM_MASK_DECODER),
}  # fmt: skip
"""Which models each pipeline calls. ``weaksam_detect`` needs SAM only for masks, and not even then
where the detector has masks of its own."""


def engine_contract(model: str, parameters: Parameters) -> ModelContract:
    """The contract of an engine model.

    Raises:
        ContractError: No such model, or parameters of another model.
    """
    match model, parameters:
        case "detector", DetectorParameters():
            return detector_contract(parameters)
        case "vit_classifier", VitClassifierParameters():
            return vit_classifier_contract(parameters)
        case "prompted_classifier", PromptedClassifierParameters():
            return prompted_classifier_contract(parameters)
        case "prompt_clustering", ClusteringParameters():
            return prompt_clustering_contract(parameters)
        case "sam_image_encoder", SamParameters():
            return sam_image_encoder_contract(parameters)
        case "sam_mask_decoder", SamParameters():
            return sam_mask_decoder_contract(parameters)
    raise ContractError(f"no engine model {model!r} with {type(parameters).__name__}")


_PARAMETERS_OF_MODEL: dict[str, type[Parameters]] = {
    DETECTOR: DetectorParameters,
    VIT_CLASSIFIER: VitClassifierParameters,
    PROMPT_CLUSTERING: ClusteringParameters,
    SAM_IMAGE_ENCODER: SamParameters,
    SAM_MASK_DECODER: SamParameters,
    PROMPTED_CLASSIFIER: PromptedClassifierParameters,
}

ENGINE_MODELS = tuple(_PARAMETERS_OF_MODEL)


def parameters_to_json(parameters: Parameters) -> dict[str, Any]:
    """Plain values for a manifest, without what has its default: a model that does not use a newer
    field is described as ever.
    """
    return {
        field.name: getattr(parameters, field.name)
        for field in fields(parameters)
        if getattr(parameters, field.name) != field.default
    }


def parameters_from_json(model: str, content: Mapping[str, Any]) -> Parameters:
    """Typed parameters of ``model`` from a manifest's JSON.

    Raises:
        ContractError: No such model, or a field is missing, unknown or of another type.
    """
    if model not in _PARAMETERS_OF_MODEL:
        raise ContractError(f"no engine model {model!r}; there are {list(ENGINE_MODELS)}")
    kind = _PARAMETERS_OF_MODEL[model]
    wanted = {field.name: field.type for field in fields(kind)}
    required = {field.name for field in fields(kind) if field.default is MISSING}
    if not required <= set(content) <= set(wanted):
        raise ContractError(f"{model}: parameters {sorted(content)}, expected {sorted(wanted)}")
    values: dict[str, Any] = {}
    for name, value in content.items():
        is_names = isinstance(value, list) and all(isinstance(v, str) for v in value)
        numbers = (int, float) if wanted[name] is float else (int,)
        if not (is_names if name == "class_names" else type(value) in numbers and value > 0):
            raise ContractError(f"{model}: parameter {name} is {value!r}, expected {wanted[name]}")
        values[name] = tuple(value) if name == "class_names" else value
    return kind(**values)
