"""The counter over ONNX graphs beside PyTorch's own over the modules they come from."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.graph_cost import cost_of_model, load_graph
from training.models.detector_adapter import DetectorAdapter
from training.models.sam import build_sam, compact
from training.models.sam_adapters import SamImageEncoderAdapter, SamMaskDecoderAdapter
from training.models.vit_adapter import VitClassifierAdapter
from training.models.weaktr import WeakTr, config_from_json
from training.retraining.faster_rcnn import FasterRcnn, FasterRcnnConfig

DEMO = Path(__file__).parents[3] / "assets" / "demo_models"


def counted_by_torch(module, inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(*inputs)
    return counter.get_total_flops()


def shapes_of(model, inputs):
    names = [value.name for value in model.graph.input]
    return dict(zip(names, (tuple(x.shape) for x in inputs), strict=True))


def pixels(batch, side):
    return torch.zeros(batch, side, side, 3, dtype=torch.uint8)


def prompts(number):
    return (
        torch.rand(1, 128, 32, 32),
        torch.zeros(number, dtype=torch.int32),
        torch.rand(number, 2, 2),
        torch.ones(number, 2, dtype=torch.int32),
    )


@pytest.fixture(scope="module")
def sam():
    return build_sam(compact())


@pytest.mark.parametrize("number", [1, 5])
def test_the_decoder_is_counted_as_torch_counts_it_at_any_number_of_prompts(sam, number):
    model, inputs = load_graph(DEMO / "sam_mask_decoder" / "model.onnx"), prompts(number)
    expected = counted_by_torch(SamMaskDecoderAdapter(sam), inputs)
    assert cost_of_model(model, shapes_of(model, inputs)).flops == pytest.approx(expected, rel=1e-3)


def test_the_encoder_is_counted_as_torch_counts_it(sam):
    model = load_graph(DEMO / "sam_image_encoder" / "model.onnx")
    inputs = (pixels(2, 256), torch.full((2, 2), 256, dtype=torch.int32))
    expected = counted_by_torch(SamImageEncoderAdapter(sam), inputs)
    assert cost_of_model(model, shapes_of(model, inputs)).flops == expected


def test_the_detector_is_counted_as_torch_counts_it():
    model = load_graph(DEMO / "detector" / "model.onnx")
    module = DetectorAdapter(FasterRcnn(FasterRcnnConfig(), num_classes=10))
    expected = counted_by_torch(module, (pixels(1, 320),))
    cost = cost_of_model(model, {"image": (1, 320, 320, 3)})
    assert cost.flops == pytest.approx(expected, rel=1e-2)


def test_the_classifier_is_counted_as_torch_counts_it():
    folder = DEMO / "vit_classifier"
    manifest = json.loads((folder / "manifest.json").read_text())
    config = config_from_json(manifest["passport"]["source"]["config"]["model"])
    module = VitClassifierAdapter(WeakTr(config, len(manifest["parameters"]["class_names"])))
    inputs = (pixels(2, config.vit.image_size),)
    model = load_graph(folder / "model.onnx")
    expected = counted_by_torch(module, inputs)
    assert cost_of_model(model, shapes_of(model, inputs)).flops == pytest.approx(expected, rel=1e-2)


def graph_of(nodes, inputs, outputs):
    def values(shapes):
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]

    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model)
    return model


def test_groups_strides_and_transposed_convolutions_are_counted_as_torch_counts_them():
    module = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, groups=2, dilation=2), nn.ConvTranspose2d(8, 6, 2, stride=2)
    )
    shapes = {"x": (5, 4, 17, 19), "w": (8, 2, 3, 3), "v": (8, 6, 2, 2)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], strides=[2, 2], group=2, dilations=[2, 2]),
        helper.make_node("ConvTranspose", ["h", "v"], ["y"], strides=[2, 2]),
    ]
    model = graph_of(nodes, shapes, {"y": (5, 6, 14, 16)})
    expected = counted_by_torch(module, (torch.rand(5, 4, 17, 19),))
    assert cost_of_model(model, shapes).flops == expected


def test_products_of_every_form_are_counted():
    shapes = {"a": (7, 3), "b": (7, 5), "m": (2, 5, 4), "q": (2, 4, 6)}
    nodes = [
        helper.make_node("Gemm", ["a", "b"], ["g"], transA=1),  # [3, 5], 7 deep
        helper.make_node("MatMul", ["g", "m"], ["p"]),  # [2, 3, 4], 5 deep
        helper.make_node("Einsum", ["p", "q"], ["y"], equation="bik,bkj->bij"),  # 4 deep
    ]
    flops = cost_of_model(graph_of(nodes, shapes, {"y": (2, 3, 6)}), shapes).flops
    assert flops == 2 * (3 * 5 * 7 + 2 * 3 * 4 * 5 + 2 * 3 * 6 * 4)


def test_attention_as_one_operator_counts_both_products():
    shapes = dict.fromkeys("qkv", (2, 4, 10, 8))
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    model = graph_of([node], shapes, {"y": (2, 4, 10, 8)})
    assert cost_of_model(model, shapes).flops == 2 * 2 * (2 * 4 * 10 * 10 * 8)


def test_memory_is_what_lives_at_one_time():
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Abs", ["b"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    cost = cost_of_model(graph_of(nodes, {"x": (100,)}, {"y": (100,)}), {"x": (100,)})
    assert cost.activation_bytes == 3 * 400  # a, and two of b, c and y
    assert cost.io_bytes == 800
    assert cost.weight_bytes == 0


def test_what_does_not_fit_is_said():
    model = load_graph(DEMO / "detector" / "model.onnx")
    with pytest.raises(ValueError, match="no shape for input"):
        cost_of_model(model, {})
    with pytest.raises(ValueError, match="expected 320 there"):
        cost_of_model(model, {"image": (1, 320, 32, 3)})
