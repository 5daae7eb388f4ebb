from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.__main__ import export_model
from export.exportable import Exportable
from export.onnx_from_module import onnx_from_module
from export.verify import FP32, ParityError, parity
from weaksam_rt.artifacts import load_artifact, write_manifest
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.contracts import DetectorParameters, detector_contract
from weaksam_rt.errors import ArtifactError, ContractError

_PARAMETERS = DetectorParameters(image_size=16, num_candidates=4, class_names=("a", "b"))


class _ToyDetector(nn.Module):
    """Four boxes whose numbers depend on the pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4 * 6)

    def forward(self, image):
        values = self.linear(image.float().mean(dim=(1, 2)) / 255).unflatten(1, (4, 6))
        return values[..., :4] * 16, values[..., 4].sigmoid(), (values[..., 5] > 0).to(torch.int32)


def _image(batch, seed=0):
    rng = np.random.default_rng(seed)
    return {"image": rng.integers(0, 256, (batch, 16, 16, 3), dtype=np.uint8)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("detector")
    module, contract = _ToyDetector(), detector_contract(_PARAMETERS)
    example = {"image": torch.from_numpy(_image(2)["image"])}
    onnx_from_module(module, contract, example, directory / "model.onnx")
    artifact = write_manifest(
        directory / "model.onnx",
        model="detector",
        engine="onnxruntime",
        parameters=_PARAMETERS,
        provenance={"note": "toy"},
    )
    return module, contract, artifact


def test_an_export_agrees_with_pytorch_at_every_batch_size(exported):
    module, contract, artifact = exported
    inputs = [_image(batch, seed=batch) for batch in (1, 2, 5, 8)]
    report = parity(module, OnnxRuntimeModel(artifact), contract, inputs, FP32)
    assert set(report) == {"boxes", "scores", "labels"}
    assert report["boxes"]["num_elements"] == 16 * 4 * 4
    assert report["boxes"]["max_abs_error"] < 1e-5


def test_the_file_says_nothing_about_the_machine_that_made_it(exported):
    content = exported[2].path.read_bytes()
    assert str(Path(__file__).resolve().parent).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_an_export_of_other_weights_is_refused(exported):
    _, contract, artifact = exported
    other = _ToyDetector()
    with torch.no_grad():
        other.linear.weight.add_(0.1)
    with pytest.raises(ParityError, match=r"detector\.(boxes|scores)"):
        parity(other, OnnxRuntimeModel(artifact), contract, [_image(2)], FP32)


def test_the_runtime_refuses_what_the_contract_does_not_allow(exported):
    model = OnnxRuntimeModel(exported[2])
    with pytest.raises(ContractError, match=r"expected UINT8 \[batch, 16, 16, 3\], got float32"):
        model({"image": np.zeros((1, 16, 16, 3), np.float32)})
    with pytest.raises(ContractError, match="at most 8"):
        model(_image(9))
    with pytest.raises(ContractError, match="no output 'masks'"):
        model(_image(1), ["masks"])
    assert set(model(_image(1), ["scores"])) == {"scores"}


def test_a_damaged_file_is_refused_before_it_is_opened(exported, tmp_path):
    for name in ("model.onnx", "manifest.json"):
        (tmp_path / name).write_bytes((exported[2].path.parent / name).read_bytes())
    content = bytearray((tmp_path / "model.onnx").read_bytes())
    content[100] ^= 1
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged or foreign"):
        load_artifact(tmp_path)


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "model": "detector"}']
)
def test_a_foreign_manifest_is_refused_in_one_line(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError, match="export the model again"):
        load_artifact(tmp_path)


def _exportable(module):
    return Exportable(
        model="detector",
        module=module,
        parameters=_PARAMETERS,
        inputs=(_image(2), _image(1)),
        tolerance=FP32,
        source={"file": "toy"},
    )


def test_a_verified_export_carries_its_parity_and_versions(tmp_path):
    artifact = export_model(_exportable(_ToyDetector()), tmp_path)
    assert artifact.provenance["parity"]["scores"]["max_abs_error"] < 1e-5
    assert {"torch", "onnxruntime"} <= set(artifact.provenance["versions"])
    assert load_artifact(tmp_path) == artifact


class _DriftingDetector(_ToyDetector):
    """Its weights change between export and comparison, so that the two cannot agree."""

    num_calls = 0

    def forward(self, image):
        drift = 0.0
        if not torch.compiler.is_compiling():
            type(self).num_calls += 1
            drift = 0.05
        boxes, scores, labels = super().forward(image)
        return boxes + drift, scores, labels


def test_an_export_that_disagrees_leaves_nothing_that_could_be_served(tmp_path):
    with pytest.raises(ParityError, match=r"detector\.boxes"):
        export_model(_exportable(_DriftingDetector()), tmp_path)
    assert _DriftingDetector.num_calls > 0
    with pytest.raises(ArtifactError):
        load_artifact(tmp_path)


class _WideDetector(_ToyDetector):
    """Enough weights for float16 storage to matter."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(3, 8000), nn.ReLU(), nn.Linear(8000, 3))

    def forward(self, image):
        mean = image.float().mean(dim=(1, 2), keepdim=True) / 255
        return super().forward((self.wide(mean) * 255).expand_as(image))


def test_half_weights_halve_the_file_and_still_agree(tmp_path):
    full = export_model(_exportable(_WideDetector()), tmp_path / "full")
    half = export_model(_exportable(_WideDetector()), tmp_path / "half", half_weights=True)
    assert half.path.stat().st_size < 0.7 * full.path.stat().st_size
    assert half.provenance["parity"]["boxes"]["max_abs_error"] < 1e-5
    assert half.provenance["exporter"]["half_weights"]


def test_weights_beyond_float16_are_refused_by_name(tmp_path):
    module = _WideDetector()
    with torch.no_grad():
        module.linear.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"linear\.bias"):
        export_model(_exportable(module), tmp_path, half_weights=True)
