"""New weights in an exported graph, and what is refused."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export.__main__ import export_model
from export.accept import accept_onnx
from export.exportable import Exportable
from export.refit import RefitError, refit_onnx, renamed_weights, tensorrt_refit_refusal
from export.verify import FP32, ParityError
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.contracts import DetectorParameters

PARAMETERS = DetectorParameters(image_size=16, num_candidates=16, class_names=("cat", "dog"))


class ToyDetector(nn.Module):
    """Has what real models have: plain weights, a normalisation that the exporter reshapes, a
    matrix that it transposes, and a buffer that is no weight.
    """

    def __init__(self, seed, width=8):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.GroupNorm(2, width)
        self.head = nn.Linear(width, 6)
        self.register_buffer("mean", torch.tensor([10.0, 20.0, 30.0]), persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, image):
        pixels = (image.float() - self.mean) / 255
        features = self.norm(self.conv(pixels.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)
        values = self.head(features)
        corners = values[..., :4].sigmoid() * 8
        boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:] + 1], dim=-1)
        return boxes, values[..., 4].sigmoid(), (values[..., 5] > 0).to(torch.int32)


def exportable(module):
    rng = np.random.default_rng(0)
    inputs = [{"image": rng.integers(0, 256, (b, 16, 16, 3), dtype=np.uint8)} for b in (2, 1)]
    return Exportable(
        model="detector",
        module=module.eval(),
        parameters=PARAMETERS,
        inputs=tuple(inputs),
        tolerance=FP32,
        source={"file": "toy"},
    )


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    return export_model(exportable(ToyDetector(0)), tmp_path_factory.mktemp("live"))


def test_an_export_records_which_constants_are_weights(live):
    module = ToyDetector(0)
    renamed = {"norm.weight", "norm.bias", "head.weight^T"}
    assert set(live.passport.weights.values()) == renamed
    assert renamed_weights(live.path, module) == live.passport.weights


def test_a_refit_gives_the_engine_that_an_export_would_give(live, tmp_path):
    new = exportable(ToyDetector(1))
    assert refit_onnx(live, new.module, tmp_path / "model.onnx") == 6
    refitted = accept_onnx(tmp_path / "model.onnx", new, {})
    assert refitted.passport.worst_parity < 1e-5
    fresh = export_model(exportable(ToyDetector(1)), tmp_path / "fresh")
    a, b = (OnnxRuntimeModel(engine)(new.inputs[0]) for engine in (refitted, fresh))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    old = OnnxRuntimeModel(live)(new.inputs[0])
    assert np.abs(old["boxes"] - a["boxes"]).max() > 0.1


def test_weights_that_did_not_get_into_the_engine_are_noticed(live, tmp_path):
    """The verdict at the end does not believe the refit."""
    new = exportable(ToyDetector(1))
    refit_onnx(live, ToyDetector(2), tmp_path / "model.onnx")
    with pytest.raises(ParityError):
        accept_onnx(tmp_path / "model.onnx", new, {})
    assert not (tmp_path / "manifest.json").exists()


def test_another_topology_is_refused_in_one_line(live, tmp_path):
    with pytest.raises(RefitError, match=r"conv\.weight: .*\[10, 3, 4, 4\].*\[8, 3, 4, 4\]"):
        refit_onnx(live, ToyDetector(0, width=10), tmp_path / "model.onnx")

    class Deeper(ToyDetector):
        def __init__(self):
            super().__init__(0)
            self.extra = nn.Linear(2, 2)

    with pytest.raises(RefitError, match=r"2 weights have no place .*extra\.bias, extra\.weight"):
        refit_onnx(live, Deeper(), tmp_path / "model.onnx")

    class Shallower(ToyDetector):
        def __init__(self):
            super().__init__(0)
            self.norm = nn.Identity()

    with pytest.raises(RefitError, match=r"norm\.\w+ is not in the checkpoint"):
        refit_onnx(live, Shallower(), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_ambiguous_constants_are_not_guessed(tmp_path):
    """An untrained normalisation is all ones and zeros: nothing tells its two weights apart."""
    module = ToyDetector(0)
    nn.init.ones_(module.norm.weight)
    nn.init.ones_(module.norm.bias)
    untrained = export_model(exportable(module), tmp_path)
    assert set(untrained.passport.weights.values()) == {"head.weight^T"}
    with pytest.raises(RefitError, match="have no place in the engine"):
        refit_onnx(untrained, ToyDetector(1), tmp_path / "new.onnx")


def test_half_weights_are_stored_without_loss_or_not_at_all(tmp_path):
    wide = export_model(exportable(ToyDetector(0, width=64)), tmp_path / "half", half_weights=True)
    stored = {t.name: t.data_type for t in onnx.load(wide.path).graph.initializer}
    assert stored["conv.weight.half"] == onnx.TensorProto.FLOAT16
    new = ToyDetector(1, width=64)
    with pytest.raises(RefitError, match=r"conv\.weight\.half: .* would change the weight"):
        refit_onnx(wide, new, tmp_path / "model.onnx")
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.copy_(parameter.half().float())
    refit_onnx(wide, new, tmp_path / "model.onnx")
    assert accept_onnx(tmp_path / "model.onnx", exportable(new), {}).passport.worst_parity < 1e-5


@pytest.mark.parametrize("version", ["11.3.0", "11.3.0.14", "11.3.9"])
def test_refits_of_tensorrt_11_3_are_refused(version):
    assert "build the engine again" in tensorrt_refit_refusal(version)


@pytest.mark.parametrize("version", ["10.13.3", "11.2.1", "11.4.0.106", "11.30.0", "1.3.0"])
def test_refits_of_other_tensorrts_are_not(version):
    assert tensorrt_refit_refusal(version) is None
