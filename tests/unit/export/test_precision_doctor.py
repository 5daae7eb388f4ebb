"""The precision doctor on a SAM encoder whose normalisations overflow in float16."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.__main__ import doctor, export_model
from export.exportable import sam_exportables
from export.graph_model import GraphModel
from export.mixed_precision import KeepFp32, emulated, expand_normalizations, lower_precision
from export.precision_doctor import diagnose, layer_findings, minimal, shortest_beginning
from training.models.sam import SamConfig, VitEncoderConfig, build_sam, save_sam

_CONFIG = SamConfig(
    encoder=VitEncoderConfig(depth=2, width=32, num_heads=2, global_blocks=(1,), window_size=3),
    image_size=64,
    embed_dim=32,
    num_heads=2,
    mlp_dim=32,
)
_SCALE = 1000.0


def scale_residual_stream_(encoder, factor):
    """Multiply everything that is added to the residual stream; each normalisation divides it out
    again, so the answer stays what it was while the squares in between grow by ``factor ** 2``.
    """
    with torch.no_grad():
        encoder.pos_embed.mul_(factor)
        writers = [encoder.patch_embed.proj]
        for block in encoder.blocks:
            writers += [block.attn.proj, block.mlp.lin2]
        for layer in writers:
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """The same SAM encoder with its residual stream as it is and scaled."""
    found = {}
    for name in ("usual", "scaled"):
        torch.manual_seed(0)
        sam = build_sam(_CONFIG)
        if name == "scaled":
            scale_residual_stream_(sam.image_encoder, _SCALE)
        root = tmp_path_factory.mktemp(name)
        save_sam(root / "sam.safetensors", sam, _CONFIG)
        encoder, _ = sam_exportables(root / "sam.safetensors")
        encoder = dataclasses.replace(encoder, inputs=encoder.inputs[:2])
        found[name] = (export_model(encoder, root / encoder.model), encoder.inputs[1:])
    return found


def _answer(encoders, name, precision="fp32", keep=()):
    artifact, inputs = encoders[name]
    graph = expand_normalizations(onnx.load(artifact.path))
    mixed = lower_precision(graph, precision, KeepFp32(nodes=frozenset(keep)))
    return GraphModel(emulated(mixed))(inputs[0])["image_embeddings"]


def test_scaling_the_residual_stream_changes_float32_hardly_and_float16_altogether(encoders):
    usual, scaled = _answer(encoders, "usual"), _answer(encoders, "scaled")
    np.testing.assert_allclose(scaled, usual, atol=2e-3)
    np.testing.assert_allclose(_answer(encoders, "usual", "fp16"), usual, atol=0.05)
    ill = _answer(encoders, "scaled", "fp16")
    assert not np.isfinite(ill).all() or np.abs(ill - usual).max() > 0.5


@pytest.fixture(scope="module")
def diagnosis(encoders):
    artifact, inputs = encoders["scaled"]
    return diagnose(onnx.load(artifact.path), artifact.model, inputs, precision="fp16")


def test_the_doctor_finds_the_normalisations_and_heals_them(encoders, diagnosis):
    assert diagnosis.lowered.distance > diagnosis.limit
    assert diagnosis.is_well
    assert diagnosis.treated.distance <= diagnosis.limit
    assert len(diagnosis.keep) < 0.2 * diagnosis.num_nodes
    # Four fused ones, whose answer becomes zero, and SAM's own in the neck, whose squares overflow.
    fused = {f.node for f in diagnosis.findings if f.op_type == "Normalization" and f.error > 0.5}
    overflowing = {f.node for f in diagnosis.findings if not f.finite}
    assert len(fused) == 4
    assert overflowing
    assert fused | overflowing == set(diagnosis.keep)
    healed = _answer(encoders, "scaled", "fp16", diagnosis.keep)
    np.testing.assert_allclose(healed, _answer(encoders, "scaled"), atol=0.05)


def test_no_proposed_node_can_be_left_out(encoders, diagnosis):
    expected = _answer(encoders, "scaled")
    for node in diagnosis.keep:
        without = _answer(encoders, "scaled", "fp16", set(diagnosis.keep) - {node})
        worse = np.linalg.norm(without - expected) / np.linalg.norm(expected)
        assert not worse <= diagnosis.limit


def test_a_well_model_and_bfloat16_need_no_treatment(encoders):
    for name, precision in (("usual", "fp16"), ("scaled", "bf16")):
        artifact, inputs = encoders[name]
        found = diagnose(
            onnx.load(artifact.path), artifact.model, inputs, precision=precision, limit=0.05
        )
        assert found.keep == ()
        assert found.trials == 1
        assert 0 < found.lowered.distance < 0.05


def test_layers_are_examined_on_the_activations_of_float32(encoders):
    artifact, inputs = encoders["scaled"]
    findings = layer_findings(onnx.load(artifact.path), inputs[0], precision="fp16")
    by_kind = {}
    for finding in findings:
        by_kind.setdefault(finding.op_type, []).append(finding)
    assert all(finding.error > 0.5 for finding in by_kind["Normalization"])
    # What comes behind a broken layer is not itself broken.
    assert all(f.finite and f.error < 0.01 for f in by_kind["MatMul"] + by_kind["Conv"])


def test_the_command_writes_what_the_engines_command_reads(encoders, tmp_path, capsys):
    artifact, _ = encoders["scaled"]
    doctor(artifact.path.parent, precision="fp16", output=tmp_path / "sam_image_encoder.json")
    report = json.loads((tmp_path / "sam_image_encoder.json").read_text())
    assert report["precision"] == "fp16"
    assert report["keep"]
    assert "keep in float32" in capsys.readouterr().out


@given(needed=st.sets(st.integers(0, 30), max_size=6))
def test_minimal_and_shortest_beginning_find_exactly_what_is_needed(needed):
    ranked = [str(i) for i in range(31)]
    required = {str(i) for i in needed}

    def heals(nodes):
        return required <= set(nodes)

    beginning = shortest_beginning(ranked, heals)
    assert heals(beginning)
    assert len(beginning) == max(1, max(needed, default=0) + 1)
    assert set(minimal(beginning, heals)) == required
