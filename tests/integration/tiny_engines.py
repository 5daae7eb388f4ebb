"""Real engines, small enough to be written by hand, whose answers a test can foretell.

They see pure colours: red, green and blue areas are the three classes. The detector answers with
the box around each, the classifier with their activation maps, SAM with the area whose colour is
that of the prompted point.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from weaksam_rt.artifacts import ModelArtifact, write_manifest
from weaksam_rt.contracts import (
    DETECTOR,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
    DetectorParameters,
    ModelContract,
    Parameters,
    SamParameters,
    VitClassifierParameters,
    engine_contract,
)

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SCORES = {"red": 0.9, "green": 0.8, "blue": 0.7}
CLASS_NAMES = tuple(COLOURS)

DETECTOR_SIZE = 320
VIT_SIZE = 64
SAM_SIZE = 256
MASK_SIZE = 8
_PATCH = 16

PARAMETERS: dict[str, Parameters] = {
    DETECTOR: DetectorParameters(
        image_size=DETECTOR_SIZE, num_candidates=3, class_names=CLASS_NAMES
    ),
    VIT_CLASSIFIER: VitClassifierParameters(
        image_size=VIT_SIZE, map_size=VIT_SIZE // _PATCH, num_cross_maps=2, class_names=CLASS_NAMES
    ),
    SAM_IMAGE_ENCODER: SamParameters(
        image_size=SAM_SIZE, embedding_size=SAM_SIZE // _PATCH, embedding_dim=3
    ),
    SAM_MASK_DECODER: SamParameters(
        image_size=SAM_SIZE, embedding_size=SAM_SIZE // _PATCH, embedding_dim=3
    ),
}


def write_tiny_artifacts(folder: Path) -> list[ModelArtifact]:
    """One artifact for each engine model, each in a folder of its own."""
    return [_write(folder / model, model, parameters) for model, parameters in PARAMETERS.items()]


def write_masking_detector(folder: Path) -> ModelArtifact:
    """The detector with masks of its own: the left half of every box."""
    return _write(folder, DETECTOR, replace(PARAMETERS[DETECTOR], mask_size=MASK_SIZE))


def _write(folder: Path, model: str, parameters: Parameters) -> ModelArtifact:
    graph = _Graph()
    {
        DETECTOR: _masking_detector if getattr(parameters, "mask_size", 0) else _detector,
        VIT_CLASSIFIER: _vit_classifier,
        SAM_IMAGE_ENCODER: _sam_image_encoder,
        SAM_MASK_DECODER: _sam_mask_decoder,
    }[model](graph)
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    onnx.save(graph.model(engine_contract(model, parameters)), path)
    return write_manifest(
        path, model=model, engine="onnxruntime", parameters=parameters, provenance={"by": "hand"}
    )


class _Graph:
    """Nodes in the order in which they are asked for."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray | list | float | int, dtype: type = np.float32) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, to: str | None = None, **attributes: object) -> str:
        """Add one node; its output is called ``to``, or gets a name."""
        name = to or f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def cast(self, value: str, kind: int = TensorProto.FLOAT, to: str | None = None) -> str:
        name = to or f"Cast_{len(self._nodes)}"
        self._nodes.append(helper.make_node("Cast", [value], [name], to=kind))
        return name

    def model(self, contract: ModelContract) -> onnx.ModelProto:
        def values(specs):
            for spec in specs:
                lead = ["batch"] if contract.is_batched else []
                sizes = [
                    f"{spec.name}_{axis}" if size == -1 else size
                    for axis, size in enumerate(spec.shape)
                ]
                kind = {"UINT8": TensorProto.UINT8, "INT32": TensorProto.INT32}.get(
                    spec.dtype, TensorProto.FLOAT
                )
                yield helper.make_tensor_value_info(spec.name, kind, lead + sizes)

        graph = helper.make_graph(
            self._nodes,
            contract.name,
            list(values(contract.inputs)),
            list(values(contract.outputs)),
            self._constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        return model


def _colour_masks(g: _Graph) -> str:
    """[b, 3, s, s]: 1 where the pixel has one of the colours."""
    image = g.cast(g.op("Transpose", "image", perm=[0, 3, 1, 2]))
    is_high = g.cast(g.op("Greater", image, g.constant(150)))
    num_high = g.op("ReduceSum", is_high, g.constant([1], np.int64), keepdims=1)
    is_pure = g.cast(g.op("Equal", num_high, g.constant(1)))
    return g.op("Mul", is_high, is_pure)


def _detector(g: _Graph) -> None:
    masks = _colour_masks(g)
    far = float(DETECTOR_SIZE)
    edges = []
    for axis in (3, 2):  # x, then y
        shape = [1, 1, 1, DETECTOR_SIZE] if axis == 3 else [1, 1, DETECTOR_SIZE, 1]
        position = np.arange(DETECTOR_SIZE, dtype=np.float32).reshape(shape)
        # Outside the mask the position counts as far for the minimum and as -1 for the maximum.
        outside = g.op("Sub", g.constant(1), masks)
        low = g.op(
            "Add", g.op("Mul", masks, g.constant(position)), g.op("Mul", outside, g.constant(far))
        )
        high = g.op("Sub", g.op("Mul", masks, g.constant(position + 1)), outside)
        axes = g.constant([2, 3], np.int64)
        edges.append(
            (
                g.op("ReduceMin", low, axes, keepdims=0),
                g.op("ReduceMax", high, axes, keepdims=0),
            )
        )
    last = g.constant([-1], np.int64)
    corners = [edges[0][0], edges[1][0], edges[0][1], edges[1][1]]
    boxes = g.op("Concat", *(g.op("Unsqueeze", c, last) for c in corners), axis=2)
    found = g.op("ReduceMax", masks, g.constant([2, 3], np.int64), keepdims=0)
    scores = g.op("Mul", found, g.constant([list(SCORES.values())]))
    g._nodes.append(
        helper.make_node("TopK", [scores, g.constant([3], np.int64)], ["scores", "order"], axis=1)
    )
    order = g.op("Unsqueeze", "order", last)
    wide = g.op("Expand", order, g.constant([1, 1, 4], np.int64))
    g.op("GatherElements", boxes, wide, to="boxes", axis=1)
    g.cast("order", TensorProto.INT32, to="labels")


def _masking_detector(g: _Graph) -> None:
    _detector(g)
    left = np.where(np.arange(MASK_SIZE) < MASK_SIZE // 2, 1, -1) * np.ones((MASK_SIZE, 1))
    nothing = g.op("Mul", "scores", g.constant(0))
    wide = g.op("Unsqueeze", nothing, g.constant([2, 3], np.int64))
    g.op("Add", wide, g.constant(left[None, None]), to="mask_logits")


def _vit_classifier(g: _Graph) -> None:
    maps = g.op(
        "AveragePool", _colour_masks(g), kernel_shape=[_PATCH, _PATCH], strides=[_PATCH, _PATCH]
    )
    g.op("Identity", maps, to="coarse_maps")
    g.op("Mul", maps, maps, to="fine_maps")
    one = g.op("Unsqueeze", maps, g.constant([1], np.int64))
    g.op("Concat", one, one, to="cross_maps", axis=1)
    peak = g.op("ReduceMax", maps, g.constant([2, 3], np.int64), keepdims=0)
    g.op("Sub", g.op("Mul", peak, g.constant(10)), g.constant(5), to="logits")


def _sam_image_encoder(g: _Graph) -> None:
    image = g.cast(g.op("Transpose", "image", perm=[0, 3, 1, 2]))
    scaled = g.op("Div", image, g.constant(255))
    pooled = g.op("AveragePool", scaled, kernel_shape=[_PATCH, _PATCH], strides=[_PATCH, _PATCH])
    # The size plays no part in this encoder, but a graph without it would not fulfil the contract.
    size = g.cast("valid_size")
    nothing = g.op(
        "Mul", g.op("ReduceSum", size, g.constant([1], np.int64), keepdims=1), g.constant(0)
    )
    wide = g.op("Unsqueeze", nothing, g.constant([2, 3], np.int64))
    g.op("Add", pooled, wide, to="image_embeddings")


def _sam_mask_decoder(g: _Graph) -> None:
    side = SAM_SIZE // _PATCH
    # The mean of the points (the centre of a box) chooses a cell of the embedding.
    is_given = g.cast(
        g.op("GreaterOrEqual", "point_labels", g.constant(0, np.int32)),
    )
    last, second = g.constant([-1], np.int64), g.constant([1], np.int64)
    weight = g.op("Unsqueeze", is_given, last)
    total = g.op("ReduceSum", g.op("Mul", "point_coords", weight), second, keepdims=0)
    count = g.op("Max", g.op("ReduceSum", weight, second, keepdims=0), g.constant(1))
    cell = g.op("Floor", g.op("Div", g.op("Div", total, count), g.constant(_PATCH)))
    cell = g.op("Clip", cell, g.constant(0), g.constant(side - 1))
    linear = g.op("ReduceSum", g.op("Mul", cell, g.constant([[1, side]])), last, keepdims=1)
    index = g.cast(linear, TensorProto.INT64)  # [p, 1]
    cells = g.op(
        "Reshape",
        g.op("Gather", "image_embeddings", "image_index", axis=0),
        g.constant([0, 0, side * side], np.int64),
    )
    wide = g.op("Expand", g.op("Unsqueeze", index, second), g.constant([1, 3, 1], np.int64))
    colour = g.op("GatherElements", cells, wide, axis=2)
    distance = g.op("ReduceSum", g.op("Abs", g.op("Sub", cells, colour)), second, keepdims=1)
    logits = g.op("Mul", g.op("Sub", g.constant(0.5), distance), g.constant(20))
    small = g.op("Reshape", logits, g.constant([0, 1, side, side], np.int64))
    large = g.op(
        "Resize", small, "", g.constant([1, 1, 4, 4]), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    g.op("Expand", large, g.constant([1, 4, 1, 1], np.int64), to="low_res_logits")
    none = g.op("Mul", linear, g.constant(0))
    g.op("Add", none, g.constant([[0.95, 0.6, 0.9, 0.93]]), to="iou_predictions")
