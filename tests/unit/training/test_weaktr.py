import dataclasses
import io

import jaxtyping
import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional

from training.models.vit import (
    ActivationRanges,
    ClassTokenVit,
    VitConfig,
    activation_ranges_from_scales,
    load_deit_,
)
from training.models.vit_adapter import VitClassifierAdapter, load_classifier, save_classifier
from training.models.weaktr import (
    WeakTr,
    WeakTrConfig,
    _pool_by_attention,
    _pool_by_rank,
    attention_layers,
    published_config,
    weaktr_loss,
)
from weaksam_rt.contracts import vit_classifier_contract
from weaksam_rt.errors import ArtifactError

_TOY_VIT = VitConfig(image_size=32, patch_size=8, dim=16, depth=3, num_heads=2, drop_path=0.0)
_TOY = WeakTrConfig(vit=_TOY_VIT)
_WIDE = (-1e3, 1e3)


def _toy(num_classes=3, config=_TOY):
    torch.manual_seed(0)
    return WeakTr(config, num_classes).eval()


def _images(num=2, side=32):
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(1))


def _deit_weights(vit):
    """The weights of a one-token DeiT of the sizes of ``vit``."""
    torch.manual_seed(5)
    return ClassTokenVit(vit, 1).state_dict()


def test_maps_and_logits_have_the_sizes_of_classes_and_patches():
    output = _toy()(_images())
    for logits in (output.class_logits, output.coarse_logits, output.fine_logits):
        assert logits.shape == (2, 3)
    assert output.coarse_maps.shape == output.fine_maps.shape == (2, 3, 4, 4)
    assert output.cross_maps.shape == (2, 3, 2, 3, 4, 4)
    assert output.coarse_maps.min() >= 0
    assert output.fine_maps.min() >= 0


def test_another_image_size_interpolates_the_positions():
    output = _toy()(_images(side=48))
    assert output.fine_maps.shape == (2, 3, 6, 6)


def test_maps_follow_the_formulas():
    """Written out head by head, as in the paper."""
    model, images = _toy(), _images(1)
    output = model(images)
    features = model.vit(images)
    attention = features.attentions[0].flatten(0, 1)
    pooled = attention.mean(dim=(1, 2))
    gate = torch.sigmoid(model.gate.excite.weight @ torch.relu(model.gate.squeeze.weight @ pooled))
    fused = sum(g * a for g, a in zip(gate, attention, strict=True)) / len(attention)
    coarse = torch.relu(model.head(features.patch_tokens))[0]
    weighed = fused[:3, 3:] * coarse.flatten(1)
    fine = torch.stack([fused[3:, 3:] @ row for row in weighed])
    torch.testing.assert_close(output.coarse_maps[0], coarse)
    torch.testing.assert_close(output.fine_maps[0].flatten(1), fine)
    torch.testing.assert_close(output.cross_maps[0, 2, 1].flatten(1), attention[5][:3, 3:])
    torch.testing.assert_close(output.class_logits[0], features.class_tokens[0].mean(dim=1))


def test_mctformer_maps_follow_the_formulas():
    """Class attention of the last three layers on the coarse map, patch attention of all layers."""
    vit = dataclasses.replace(_TOY_VIT, depth=4)
    model = _toy(config=WeakTrConfig(vit=vit, maps="mctformer"))
    images = _images(1)
    output, features = model(images), model.vit(images)
    heads = features.attentions[0].mean(dim=1)  # [layer, t, t]
    attention = sum(heads[layer][:3, 3:] for layer in (1, 2, 3)) / 3
    coarse = torch.relu(model.head(features.patch_tokens))[0].flatten(1)
    affinity = sum(layer[3:, 3:] for layer in heads)
    expected = torch.stack([affinity @ row for row in attention * coarse])
    torch.testing.assert_close(output.fine_maps[0].flatten(1), expected)
    torch.testing.assert_close(
        output.cross_maps[0, 2, 1].flatten(1), features.attentions[0, 2, 1, :3, 3:]
    )
    plus = _toy(config=WeakTrConfig(vit=vit, maps="mctformer_plus"))(images)
    rooted = torch.stack([affinity @ row for row in (attention * coarse).sqrt()])
    torch.testing.assert_close(plus.fine_maps[0].flatten(1), rooted)


def test_mctformer_learns_everything_it_has_from_two_losses():
    config = WeakTrConfig(vit=_TOY_VIT, maps="mctformer", coarse_pool="rank")
    model = _toy(config=config).train()
    loss, parts = weaktr_loss(model(_images()), torch.tensor([[1.0, 0, 0], [0, 1, 1]]))
    loss.backward()
    assert set(parts) == {"class", "coarse"}
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_rank_pool_weighs_each_patch_less_than_the_next_better_one():
    activation = torch.tensor([[[[1.0, 4.0], [2.0, 3.0]]]])
    expected = (4 + 3 / 2 + 2 / 4 + 1 / 8) / (1 + 1 / 2 + 1 / 4 + 1 / 8)
    assert _pool_by_rank(activation, 0.5).item() == pytest.approx(expected)
    assert _pool_by_rank(activation, 1.0).item() == pytest.approx(2.5)


def test_the_published_network_is_a_deit_small_without_a_final_norm():
    config = published_config()
    assert (config.vit.dim, config.vit.depth, config.vit.num_heads) == (384, 12, 6)
    assert (config.gate_reduction, config.gate_pool) == (4, "avg")
    model = _toy(config=published_config(_TOY_VIT))
    assert not any(name.startswith("vit.norm.") for name in model.state_dict())
    tokens = model.vit(_images()).class_tokens
    torch.testing.assert_close(model(_images()).class_logits, tokens.mean(dim=2))
    assert tokens.mean(dim=2).std() > 0


def test_the_mean_readout_learns_without_the_final_norm_and_hardly_with_it():
    """The mean of a normed token is the same for all tokens until the norm's own weights differ."""
    images, tags = _images(), torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    losses = {}
    for has_norm in (False, True):
        config = published_config(_TOY_VIT)
        vit = dataclasses.replace(config.vit, final_norm=has_norm)
        model = _toy(config=dataclasses.replace(config, vit=vit)).train()
        start = model(images).class_logits
        assert (start.std() < 1e-6) == has_norm
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(30):
            loss = functional.multilabel_soft_margin_loss(model(images).class_logits, tags)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[has_norm] = loss.item()
    assert losses[False] < 0.5 * losses[True]


def test_positions_are_interpolated_at_the_published_scale():
    """The scale is that of a map a tenth of a patch larger; cells and their number stay."""
    vit = _toy(config=published_config(_TOY_VIT)).vit
    grid = vit.pos_embed[:, 3:].transpose(1, 2).unflatten(2, (4, 4))
    expected = functional.interpolate(grid, scale_factor=(6.1 / 4, 5.1 / 4), mode="bicubic")
    found = vit._positions(6, 5)
    assert torch.equal(found[:, :3], vit.pos_embed[:, :3])
    torch.testing.assert_close(found[:, 3:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(vit._positions(4, 4), vit.pos_embed)


def test_average_pooling_makes_the_gate_blind_to_the_image_and_maximum_pooling_does_not():
    torch.manual_seed(0)
    attention = (3 * torch.randn(2, 6, 5, 5)).softmax(dim=-1)
    for pool, is_blind in (("avg", True), ("max", False)):
        model = _toy(config=dataclasses.replace(_TOY, gate_reduction=1, gate_pool=pool))
        weights = model.gate(attention)
        assert torch.allclose(weights[0], weights[1], atol=1e-7) == is_blind


def test_the_fine_loss_trains_only_the_gate():
    model = _toy()
    model(_images()).fine_logits.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"gate.squeeze.weight", "gate.excite.weight"}


def test_the_loss_reaches_every_parameter():
    model = _toy().train()
    loss, parts = weaktr_loss(model(_images()), torch.tensor([[1.0, 0, 0], [0, 1, 1]]))
    loss.backward()
    assert set(parts) == {"class", "coarse", "fine"}
    assert loss.item() == pytest.approx(sum(parts.values()), rel=1e-5)
    dead = [name for name, p in model.named_parameters() if p.grad is None]
    assert dead == []


def test_two_images_can_be_learned_by_heart():
    model = _toy(config=dataclasses.replace(_TOY, class_readout="linear")).train()
    images, tags = _images(), torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(40):
        loss, _ = weaktr_loss(model(images), tags)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    output = model(images)
    assert ((output.class_logits > 0) == (tags > 0)).all()
    assert ((output.coarse_logits > 0) == (tags > 0)).all()


def test_the_learned_readout_starts_as_the_mean():
    mean, linear = (
        _toy(config=dataclasses.replace(_TOY, class_readout=kind)) for kind in ("mean", "linear")
    )
    linear.load_state_dict(mean.state_dict(), strict=False)
    torch.testing.assert_close(
        linear(_images()).class_logits, mean(_images()).class_logits, atol=1e-5, rtol=1e-4
    )


def test_attention_pooling_asks_where_a_class_token_looks_and_where_it_does_not():
    activation = torch.tensor([[[[4.0, 0.0, -2.0]]]])
    attention = torch.tensor([[[[0.6, 0.2, 0.2]]]])
    attended, unattended = _pool_by_attention(activation, attention)
    assert attended.item() == pytest.approx(0.6 * 4 - 0.2 * 2)
    assert unattended.item() == pytest.approx(-1.0)


def test_attention_pooling_leaves_the_maps_alone_and_adds_a_loss():
    mean, attention = (
        _toy(config=dataclasses.replace(_TOY, coarse_pool=pool)) for pool in ("mean", "attention")
    )
    torch.testing.assert_close(mean(_images()).coarse_maps, attention(_images()).coarse_maps)
    tags = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    total, parts = weaktr_loss(attention(_images()), tags, background_weight=2.0)
    assert "background" not in weaktr_loss(mean(_images()), tags)[1]
    silent = functional.multilabel_soft_margin_loss(
        attention(_images()).background_logits, torch.zeros(2, 3)
    )
    assert parts["background"] == pytest.approx(2 * silent.item(), rel=1e-5)
    assert total.item() == pytest.approx(sum(parts.values()), rel=1e-5)


def test_a_deit_gives_every_class_its_token_and_position():
    weights = _deit_weights(_TOY_VIT)
    vit = ClassTokenVit(_TOY_VIT, 3)
    load_deit_(vit, weights | {"head.weight": torch.zeros(2, 16)})
    torch.testing.assert_close(vit.cls_token[0, 2], weights["cls_token"][0, 0])
    torch.testing.assert_close(vit.pos_embed[0, 2], weights["pos_embed"][0, 0])
    torch.testing.assert_close(vit.pos_embed[0, 3:], weights["pos_embed"][0, 1:])


def test_a_single_class_token_computes_what_the_deit_computes():
    weights = _deit_weights(_TOY_VIT)
    ours, deit = ClassTokenVit(_TOY_VIT, 1), ClassTokenVit(_TOY_VIT, 1)
    deit.load_state_dict(weights)
    load_deit_(ours, weights)
    torch.testing.assert_close(
        ours.eval()(_images()).class_tokens, deit.eval()(_images()).class_tokens
    )


def test_weights_of_another_size_are_refused_by_name():
    weights = _deit_weights(dataclasses.replace(_TOY_VIT, dim=32))
    with pytest.raises(ValueError, match="patch_embed"):
        load_deit_(ClassTokenVit(_TOY_VIT, 3), weights)
    with pytest.raises(ValueError, match=r"not a DeiT's.*missing"):
        load_deit_(ClassTokenVit(_TOY_VIT, 3), {})


def _ranges(**narrow):
    names = [f.name for f in dataclasses.fields(ActivationRanges)]
    return ActivationRanges(**{name: narrow.get(name, _WIDE) for name in names})


def test_wide_ranges_change_nothing_and_each_narrow_one_does():
    images = _images()
    plain = _toy(config=_TOY)(images).class_logits

    def bounded(ranges):
        vit = dataclasses.replace(_TOY_VIT, activation_ranges=(ranges,) * 3)
        return _toy(config=WeakTrConfig(vit=vit))(images).class_logits

    torch.testing.assert_close(bounded(_ranges()), plain)
    for field in dataclasses.fields(ActivationRanges):
        narrow = bounded(_ranges(**{field.name: (-1e-3, 1e-3)}))
        assert not torch.allclose(narrow, plain), field.name


def test_ranges_follow_from_the_scales_of_a_quantised_network():
    (ranges,) = activation_ranges_from_scales(torch.tensor([[0.5, 100.0, 2.0, 8.0, 1.0]]))
    assert ranges.norm1 == ranges.context == ranges.norm2 == (-4.0, 3.0)
    assert ranges.query_key == (-2.0, 1.5)
    assert ranges.value == (-8.0, 6.0)
    assert ranges.attention == (0.0, pytest.approx(0.07))
    assert ranges.hidden == (-0.125, 0.75)


def test_peaks_come_from_layers_8_and_9_of_12():
    assert attention_layers(12) == (8, 9)
    assert attention_layers(4) == (2,)
    assert attention_layers(1) == (0,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 33}, "multiple"),
        ({"num_heads": 3}, "multiple"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"activation_ranges": (_ranges(),)}, "3 blocks"),
        ({"activation_ranges": (_ranges(),) * 3, "timm_model": "vit"}, "own blocks"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(_TOY_VIT, **wrong)


# --- the adapter and its file ---------------------------------------------------------------------


def _pixels(num):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)


def test_the_adapter_keeps_its_contract():
    adapter = VitClassifierAdapter(_toy())
    contract = vit_classifier_contract(adapter.parameters_of_contract(("a", "b", "c")))
    outputs = adapter(torch.from_numpy(_pixels(2)))
    arrays = {
        spec.name: tensor.detach().numpy()
        for spec, tensor in zip(contract.outputs, outputs, strict=True)
    }
    contract.check_inputs({"image": _pixels(2)})
    contract.check_outputs(arrays)
    assert arrays["cross_maps"].shape[1] == 2, "one layer of two heads"


def test_cross_maps_are_ordered_by_layer_then_head():
    model = _toy()
    adapter = VitClassifierAdapter(model, layers=(0, 2))
    cross = adapter(torch.from_numpy(_pixels(1)))[3]
    all_maps = VitClassifierAdapter(model, layers=(0, 1, 2))(torch.from_numpy(_pixels(1)))[3]
    torch.testing.assert_close(cross, all_maps[:, [0, 1, 4, 5]])
    with pytest.raises(ValueError, match="layers 0 to 2"):
        VitClassifierAdapter(model, layers=(3,))


@pytest.fixture
def without_shape_checks():
    """The checks compare sizes, and a comparison fixes a size while a graph is traced."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_exported_graph_agrees_for_any_batch_size():
    ranges = (_ranges(hidden=(-0.1, 0.2), attention=(0.0, 0.06)),) * 3
    vit = dataclasses.replace(_TOY_VIT, activation_ranges=ranges)
    adapter = VitClassifierAdapter(_toy(config=WeakTrConfig(vit=vit))).eval()
    names = ["logits", "coarse_maps", "fine_maps", "cross_maps"]
    program = torch.onnx.export(
        adapter,
        (torch.from_numpy(_pixels(2)),),
        dynamo=True,
        input_names=["image"],
        output_names=names,
        dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=8)}},
        verbose=False,
    )
    buffer = io.BytesIO()
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    for num in (1, 3):
        pixels = _pixels(num)
        found = session.run(names, {"image": pixels})
        with torch.inference_mode():
            expected = adapter(torch.from_numpy(pixels))
        for name, got, want in zip(names, found, expected, strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_saved_classifier_answers_the_same(tmp_path):
    vit = dataclasses.replace(_TOY_VIT, activation_ranges=(_ranges(hidden=(-0.1, 0.2)),) * 3)
    model = _toy(config=WeakTrConfig(vit=vit, gate_pool="max"))
    save_classifier(tmp_path / "c.safetensors", model, ("a", "b", "c"))
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert loaded.class_names == ("a", "b", "c")
    assert loaded.model.config == model.config
    torch.testing.assert_close(loaded.model(_images()).fine_maps, model(_images()).fine_maps)


def test_class_tokens_without_a_name_are_attended_to_and_not_served(tmp_path):
    model = _toy()
    save_classifier(tmp_path / "c.safetensors", model, ("a", "", "c"))
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert loaded.class_names == ("a", "c")
    everything = VitClassifierAdapter(model)(torch.from_numpy(_pixels(2)))
    served = loaded.served()(torch.from_numpy(_pixels(2)))
    for all_classes, some in zip(everything[:3], served[:3], strict=True):
        torch.testing.assert_close(some, all_classes[:, [0, 2]])
    torch.testing.assert_close(served[3], everything[3][:, :, [0, 2]])


def test_a_file_that_holds_no_classifier_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_classifier(path, _toy(), ("a", "b", "c"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"c\.safetensors"):
        load_classifier(path)
    with pytest.raises(ValueError, match="2 class names"):
        save_classifier(path, _toy(), ("a", "b"))
