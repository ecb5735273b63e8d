"""Pretrained weights, band by band: TorchGeo's with its own registry, smp's and timm's tags, our checkpoints.

The files are made here and lie where a download would have put them, so that what reads them is what users run.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from ununennium._checkpoint_files import digest_of, text_of
from ununennium.models import RasterModel, create_model, register_model
from ununennium.prediction import load_model
from ununennium.training import CheckpointError, checkpoint, export_weights

ALL = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"]
L2A = [band for band in ALL if band != "B10"]

# TorchGeo's models that timm has too, with arguments that make them small.
SMALL_RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}
SMALL_VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2}
SMALL = {
    "resnet18": SMALL_RESNET,
    "resnet50": SMALL_RESNET,
    "resnet152": SMALL_RESNET,
    "vit_small_patch16_224": SMALL_VIT,
    "vit_base_patch16_224": SMALL_VIT,
    "vit_large_patch16_224": SMALL_VIT,
    "vit_huge_patch14_224": SMALL_VIT,
    "vit_small_patch14_dinov2": SMALL_VIT,
    "vit_base_patch14_dinov2": SMALL_VIT,
}


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return pytest.importorskip("torchgeo.models")


def randomized(module, seed=0):
    """Give a module values that differ everywhere, so that nothing is right by chance."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def put_where_downloads_go(weight, state):
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weight.url).name
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)


def torchgeo_file(weight, model="resnet18", **kwargs):
    """Write a file for a weight of TorchGeo's, without a head, as most of them are; return its tensors."""
    made = timm.create_model(model, in_chans=weight.meta["in_chans"], num_classes=0, **kwargs)
    state = randomized(made).state_dict()
    put_where_downloads_go(weight, state)
    return state


def hub_file(monkeypatch, module, path):
    """Have smp and timm find this module's weights instead of downloading any."""
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)

    def find(repo_id, filename, **kwargs):
        return str(path)

    monkeypatch.setattr(smp.encoders, "hf_hub_download", find)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", find)


def save_checkpoint(folder, model, about=None, averaged=None, averaged_by_default=True):
    info = {} if about is None else {"model": about}
    weights = {}
    if averaged is not None:
        info["averaged"] = {"default": averaged_by_default}
        weights["averaged"] = averaged.state_dict()
    checkpoint.write(folder, checkpoint.Contents(model.state_dict(), {"extra": {}}, info, **weights))
    return folder


def rewrite(folder, change, *, sealed=True):
    """Change what a checkpoint's manifest says, and seal it anew with its digest, or leave the old one."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    seal = manifest.pop("sha256")
    change(manifest)
    manifest["sha256"] = digest_of(manifest) if sealed else seal
    (folder / "manifest.json").write_bytes(text_of(manifest))


def first_convolution(model):
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight.detach()


def respelt(name, place):
    padded = re.sub(r"(?<=[Bb])(\d)(?!\d)", r"0\1", name)
    return [name, padded, name.lower(), padded.upper()][place % 4]


# TorchGeo's weights


def test_the_small_models_are_all_that_torchgeo_and_timm_share(zoo):
    both = set(zoo.list_models()) & set(timm.list_models())
    assert {model for model in both if has_weights(zoo, model)} == set(SMALL)


def has_weights(zoo, model):
    try:
        return bool(zoo.get_model_weights(model))
    except KeyError:
        return False


@pytest.mark.parametrize("model", SMALL)
def test_each_weight_of_torchgeo_is_mapped_filter_by_filter(model, zoo):
    num_mapped = 0
    for weight in zoo.get_model_weights(model):
        if (bands := weight.meta.get("bands")) is None:
            continue
        arguments = SMALL[model] | {key: weight.meta[key] for key in ("img_size",) if key in weight.meta}
        state = torchgeo_file(weight, model, **arguments)
        places = torch.randperm(len(bands), generator=torch.Generator().manual_seed(1))[: max(2, len(bands) - 1)]
        asked = [respelt(bands[place], i) for i, place in enumerate(places)]
        made = create_model(model, len(asked), 4, weights=weight.name, bands=asked, **SMALL[model])

        pretrained = next(t for n, t in state.items() if n in ("conv1.weight", "patch_embed.proj.weight"))
        for filters, band, place in zip(first_convolution(made).unbind(1), asked, places, strict=True):
            assert torch.equal(filters, pretrained[:, place]), (weight, band)
            num_mapped += 1
        others = {n: t for n, t in made.state_dict().items() if n not in ("conv1.weight", "patch_embed.proj.weight")}
        assert {n for n, t in others.items() if n not in state or not torch.equal(t, state[n])} == {
            n for n in others if n.startswith(("fc.", "head."))
        }
    assert num_mapped >= 14  # those of one weight of Sentinel-2 and one of Sentinel-1


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
def test_thirteen_bands_go_into_twelve_of_a_unet(encoder, zoo):
    weight = zoo.ResNet18_Weights.SENTINEL2_ALL_MOCO
    state = torchgeo_file(weight)
    model = create_model(f"unet_{encoder}", 12, 10, weights="SENTINEL2_ALL_MOCO", bands=L2A)
    own = {n.removeprefix("encoder.").removeprefix("model."): t for n, t in model.encoder.state_dict().items()}
    assert own.keys() == state.keys()
    assert torch.equal(own.pop("conv1.weight"), state["conv1.weight"][:, [*range(10), 11, 12]])
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())
    assert model(torch.randn(2, 12, 32, 32)).shape == (2, 10, 32, 32)


def test_a_shallow_encoder_leaves_out_what_it_lacks(zoo):
    state = torchgeo_file(zoo.ResNet18_Weights.SENTINEL2_ALL_MOCO)
    model = create_model(
        "unet_tu-resnet18", 12, 2, "SENTINEL2_ALL_MOCO", L2A, encoder_depth=3, decoder_channels=(8, 8, 8)
    )
    own = model.encoder.model.state_dict()
    assert not any(name.startswith("layer4") for name in own)
    assert all(torch.equal(own[name], state[name]) for name in own if name != "conv1.weight")


def test_a_vision_transformer_as_encoder(zoo):
    weight = zoo.ViTSmall16_Weights.SENTINEL2_ALL_MOCO
    state = torchgeo_file(weight, "vit_small_patch16_224")
    model = create_model("dpt_vit_small_patch16_224", 12, 10, weights=str(weight), bands=L2A)
    own = model.encoder.model.state_dict()
    assert torch.equal(own["patch_embed.proj.weight"], state["patch_embed.proj.weight"][:, [*range(10), 11, 12]])
    assert torch.equal(own["pos_embed"], state["pos_embed"])
    assert torch.equal(own["blocks.11.mlp.fc2.weight"], state["blocks.11.mlp.fc2.weight"])


def test_without_names_the_bands_are_the_pretrained_in_their_order(zoo):
    state = torchgeo_file(zoo.ResNet18_Weights.SENTINEL2_ALL_MOCO)
    model = create_model("resnet18", 13, 2, weights="SENTINEL2_ALL_MOCO")
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("unmatched", ["mean", "zero"])
def test_bands_without_a_namesake_by_choice(unmatched, zoo):
    state = torchgeo_file(zoo.ResNet18_Weights.SENTINEL2_ALL_MOCO)
    model = create_model("resnet18", 3, 2, "SENTINEL2_ALL_MOCO", ["VV", "B04", "DEM"], unmatched=unmatched)
    expected = state["conv1.weight"].mean(1) if unmatched == "mean" else torch.zeros(64, 7, 7)
    assert torch.equal(model.conv1.weight[:, 0], expected)
    assert torch.equal(model.conv1.weight[:, 1], state["conv1.weight"][:, 3])
    assert torch.equal(model.conv1.weight[:, 2], expected)


def test_common_names_are_sentinel2s_only(zoo):
    state = torchgeo_file(zoo.ResNet18_Weights.SENTINEL2_RGB_MOCO)
    model = create_model("resnet18", 3, 2, "SENTINEL2_RGB_MOCO", ["red", "blue", "green"])
    assert torch.equal(model.conv1.weight, state["conv1.weight"][:, [0, 2, 1]])
    with pytest.raises(ValueError, match="Unmatched: red"):
        create_model("resnet18", 2, 2, "LANDSAT_OLI_TIRS_TOA_MOCO", ["red", "B5"])


def test_weights_that_do_not_name_their_bands(zoo):
    weight = zoo.ResNet50_Weights.FMOW_RGB_GASSL
    state = torchgeo_file(weight, "resnet50", **SMALL["resnet50"])
    model = create_model("resnet50", 3, 2, weights="FMOW_RGB_GASSL", **SMALL["resnet50"])
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("name", ["resnet18", "unet_resnet18"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("layer3.1.bn2.weight"), r"Missing in it: \S*layer3\.1\.bn2\.weight\. Unknown.*: none"),
        (lambda state: state.update({"layer5.weight": torch.ones(1)}), r"Missing in it: none.*: \S*layer5\.weight\."),
        (
            lambda state: state.update({"layer4.1.bn2.weight": torch.ones(9)}),
            r"layer4\.1\.bn2\.weight \(9,\), not \(512,\)",
        ),
    ],
)
def test_a_file_that_is_not_the_encoders_is_refused(name, spoil, message, zoo):
    weight = zoo.ResNet18_Weights.SENTINEL2_ALL_MOCO
    state = torchgeo_file(weight)
    spoil(state)
    put_where_downloads_go(weight, state)
    with pytest.raises(ValueError, match=rf"ResNet18_Weights\.SENTINEL2_ALL_MOCO does not fit the model.*{message}"):
        create_model(name, 13, 2, weights="SENTINEL2_ALL_MOCO")


def test_a_head_in_the_file_is_not_taken(zoo):
    weight = zoo.ResNet18_Weights.SENTINEL2_ALL_MOCO
    state = torchgeo_file(weight)
    put_where_downloads_go(weight, state | {"fc.weight": torch.ones(2, 512), "fc.bias": torch.ones(2)})
    model = create_model("resnet18", 13, 2, weights="SENTINEL2_ALL_MOCO")
    assert not torch.equal(model.fc.bias, torch.ones(2))


def test_a_file_that_would_run_code_is_refused(zoo):
    weight = zoo.ResNet18_Weights.SENTINEL2_ALL_MOCO
    put_where_downloads_go(weight, {"conv1.weight": Path("anything that is not a tensor")})
    with pytest.raises(Exception, match="Weights only load failed"):
        create_model("resnet18", 13, 2, weights="SENTINEL2_ALL_MOCO")


def test_the_config_leads_to_the_same_model_without_weights(zoo):
    weight = zoo.ViTSmall14_DINOv2_Weights.SENTINEL2_ALL_SOFTCON  # made for another size than timm's default
    kwargs = SMALL["vit_small_patch14_dinov2"]
    torchgeo_file(weight, "vit_small_patch14_dinov2", img_size=224, **kwargs)
    model = create_model("vit_small_patch14_dinov2", 12, 2, "SENTINEL2_ALL_SOFTCON", L2A, **kwargs)
    config = model.model_config
    assert config == {"name": "vit_small_patch14_dinov2", "in_channels": 12, "num_classes": 2, "img_size": 224} | kwargs
    put_where_downloads_go(weight, {})
    again = create_model(**config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(torch.ones(1, 12, 224, 224)), model.eval()(torch.ones(1, 12, 224, 224)))


def test_without_torchgeo_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchgeo.models", None)
    with pytest.raises(ImportError, match=r'SENTINEL2_ALL_MOCO.*pip install "ununennium\[torchgeo\]"'):
        create_model("unet_resnet18", 12, 2, weights="SENTINEL2_ALL_MOCO", bands=L2A)


@pytest.mark.parametrize(
    ("name", "in_channels", "weights", "bands", "message"),
    [
        ("unet_resnet18", 12, "SENTINEL2_ALL_MOCO", None, r"13 bands \(B1, .*B12\), but in_channels is 12.*bands="),
        ("unet_resnet18", 3, "SENTINEL2_ALL_MOCO", ["B2", "VV", "x"], "Unmatched: VV, x. Matched: B2. Its bands: B1"),
        ("unet_resnet18", 1, "SENTINEL2_ALL_MOCO", ["VV"], 'Matched: none.*unmatched="mean".*unmatched="zero"'),
        ("unet_resnet18", 2, "SENTINEL2_ALL_MOCO", ["B8", "nir"], "'B8' and 'nir' are both B8"),
        ("unet_resnet18", 3, "SENTINEL2_ALL_MOCO", ["B2"], "1 names, but in_channels is 3"),
        ("unet_resnet18", 13, "SENTINEL3_ALL_MOCO", None, "no SENTINEL3_ALL_MOCO for resnet18; it has: .*_SECO"),
        ("unet_resnet18", 13, "ResNet50_Weights.SENTINEL2_ALL_MOCO", None, "into resnet18; it is for resnet50"),
        ("unet_resnet34", 13, "ResNet18_Weights.SENTINEL2_ALL_MOCO", None, "into resnet34; it is for resnet18"),
        ("unet_resnet18", 13, "Swin_T_Weights.CITYSCAPES_SEMSEG", None, "resnet18. TorchGeo has weights for: resnet18"),
        ("unet_resnet18", 13, "Nonsense.SENTINEL2_ALL_MOCO", None, "resnet18. TorchGeo has weights for: resnet18"),
        ("unet_resnet34", 13, "SENTINEL2_ALL_MOCO", None, "no weights for resnet34; it has some for: resnet18, "),
        ("resnet50", 4, "FMOW_RGB_GASSL", None, "for 3 bands and does not say for which.*in_channels=4: only with 3"),
        ("resnet50", 3, "FMOW_RGB_GASSL", ["red", "green", "blue"], "does not say which bands.*leave bands out"),
        ("unet_resnet18", 12, "sentinel2_all_moco", None, 'Unknown weights.*such as "SENTINEL2_ALL_MOCO"'),
        ("unet_resnet18", 3, "imagenet", ["B4", "B3", "B8"], "1 of 3 bands have no namesake in imagenet.*: B8"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_downloaded(name, in_channels, weights, bands, message, zoo):
    with pytest.raises(ValueError, match=message):
        create_model(name, in_channels, 2, weights=weights, bands=bands)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="unmatched must be one of 'raise', 'mean', 'zero', got 'skip'"):
        create_model("resnet18", 3, 2, unmatched="skip")
    with pytest.raises(TypeError, match="weights must be a name or a path, got 7"):
        create_model("resnet18", 3, 2, weights=7)
    with pytest.raises(TypeError, match="sequence of names"):
        create_model("resnet18", 2, 2, bands="B2")
    assert create_model("test_resnet", 2, 2, bands=["B2", "B3"]).model_config.keys() == {
        "name",
        "in_channels",
        "num_classes",
    }


# Photographs' weights: red, green, blue


def test_without_names_rgb_filters_are_repeated(monkeypatch, tmp_path):
    reference = randomized(smp.encoders.get_encoder("resnet18", weights=None))
    hub_file(monkeypatch, reference, tmp_path / "rgb.safetensors")
    model = create_model("unet_resnet18", 5, 2, weights="imagenet")
    expected = reference.conv1.weight[:, [0, 1, 2, 0, 1]] * 3 / 5
    torch.testing.assert_close(model.encoder.conv1.weight, expected)
    assert torch.equal(model.encoder.layer4[1].conv2.weight, reference.layer4[1].conv2.weight)


@pytest.mark.parametrize(
    ("bands", "places"),
    [
        (["B4", "B3", "B2"], [0, 1, 2]),
        (["blue", "green", "red"], [2, 1, 0]),
        (["B02", "b03", "Red", "B8"], [2, 1, 0, None]),
        (["VV", "B3"], [None, 1]),
    ],
)
@pytest.mark.parametrize("name", ["unet_resnet18", "unet_tu-test_resnet", "test_resnet"])
def test_rgb_filters_by_name(name, bands, places, monkeypatch, tmp_path):
    reference = randomized(
        timm.create_model("test_resnet", num_classes=1000)
        if "test" in name
        else smp.encoders.get_encoder("resnet18", weights=None)
    )
    hub_file(monkeypatch, reference, tmp_path / "rgb.safetensors")
    model = create_model(name, len(bands), 1000, "imagenet", bands, unmatched="zero")
    wanted, got = first_convolution(reference), first_convolution(model)
    for place, filters in zip(places, got.unbind(1), strict=True):
        assert torch.equal(filters, torch.zeros_like(filters) if place is None else wanted[:, place])
    backbone = {"unet_resnet18": "encoder", "unet_tu-test_resnet": "encoder.model"}.get(name, "")
    own, pretrained = model.get_submodule(backbone).state_dict(), reference.state_dict()
    assert sum(not torch.equal(tensor, pretrained[n]) for n, tensor in own.items()) == (bands != ["B4", "B3", "B2"])


def test_every_branch_of_a_first_layer_takes_the_bands(monkeypatch, tmp_path):
    reference = randomized(timm.create_model("fastvit_t8"))
    hub_file(monkeypatch, reference, tmp_path / "rgb.safetensors")
    model = create_model("fastvit_t8", 2, 1000, "imagenet", ["blue", "red"])
    own, pretrained = model.state_dict(), reference.state_dict()
    changed = {name for name in own if own[name].shape != pretrained[name].shape}
    assert len(changed) == 2
    for name, tensor in own.items():
        assert torch.equal(tensor, pretrained[name][:, [2, 0]] if name in changed else pretrained[name]), name


def test_a_first_layer_that_has_no_filter_a_band_is_refused(monkeypatch, tmp_path):
    kwargs = {"layers": [1, 1, 1, 1]}
    reference = timm.create_model("tresnet_m", **kwargs)  # puts blocks of four by four pixels into channels first
    hub_file(monkeypatch, reference, tmp_path / "rgb.safetensors")
    with pytest.raises(ValueError, match=r"body\.conv1\.conv\.weight has the shape \(64, 48, 3, 3\).*leave bands out"):
        create_model("tresnet_m", 4, 1000, "imagenet", ["B2", "B3", "B4", "B8"], unmatched="zero", **kwargs)


# Checkpoints


@pytest.fixture
def trained():
    return randomized(create_model("unet_resnet18", 4, 3))


BANDS = ["B2", "B3", "B4", "B8"]


@pytest.mark.parametrize(
    "spell", [Path, str, lambda path: path / "model.safetensors", lambda p: f"{p}/model.safetensors"]
)
def test_a_checkpoint_of_a_raster_model_is_read_by_name(spell, trained, tmp_path):
    raster = RasterModel(trained, BANDS, mean=[9.0] * 4, std=[7.0] * 4)
    folder = save_checkpoint(tmp_path / "step", raster, raster.model_config)
    model = create_model("unet_resnet18", 3, 3, weights=spell(folder), bands=["b08", "b03", "b02"])
    own, pretrained = model.state_dict(), trained.state_dict()
    name = "encoder.conv1.weight"
    assert torch.equal(own.pop(name), pretrained[name][:, [3, 1, 0]])
    assert all(torch.equal(tensor, pretrained[name]) for name, tensor in own.items())
    assert model.model_config == {"name": "unet_resnet18", "in_channels": 3, "num_classes": 3}


def test_a_checkpoint_that_the_trainer_wrote(tmp_path):
    from ununennium.training import CheckpointCallback, Trainer

    register_model("head", lambda in_channels, num_classes, weights: nn.Conv2d(in_channels, num_classes, 1))
    raster = RasterModel(create_model("head", 2, 3), ["B4", "B8"])
    data = [(torch.randn(2, 8, 8), torch.zeros(8, 8, dtype=torch.long)) for _ in range(2)]
    Trainer(
        raster,
        torch.optim.SGD(raster.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        DataLoader(data, batch_size=2),
        callbacks=[CheckpointCallback(tmp_path, monitor="train_loss")],
        device="cpu",
    ).fit(epochs=1)
    model = create_model("head", 2, 3, weights=tmp_path / "last", bands=["B8", "B4"])
    assert torch.equal(model.weight, raster.network.weight[:, [1, 0]])
    assert torch.equal(model.bias, raster.network.bias)
    with pytest.raises(CheckpointError, match=rf"folder of checkpoints; name one of them, {tmp_path / 'last'}"):
        create_model("head", 2, 3, weights=tmp_path)


def test_a_checkpoint_without_bands_is_taken_as_it_is(trained, tmp_path):
    folder = save_checkpoint(tmp_path / "step", trained, trained.model_config)
    model = create_model("unet_resnet18", 4, 3, weights=folder)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"does not say which bands it was trained on.*leave bands out"):
        create_model("unet_resnet18", 4, 3, weights=folder, bands=BANDS)
    with pytest.raises(ValueError, match=r"conv1\.weight \(64, 4, 7, 7\), not \(64, 5, 7, 7\).*in_channels has to be"):
        create_model("unet_resnet18", 5, 3, weights=folder)


def test_a_head_of_other_classes_starts_anew_and_all_else_is_taken(trained, tmp_path):
    folder = save_checkpoint(tmp_path / "step", trained)
    torch.manual_seed(5)
    model = create_model("unet_resnet18", 4, 6, weights=folder)
    torch.manual_seed(5)
    fresh = create_model("unet_resnet18", 4, 6)
    for name, tensor in model.state_dict().items():
        source = fresh if name.startswith("segmentation_head.") else trained
        assert torch.equal(tensor, source.state_dict()[name]), name


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("name", ["unet_tu-test_resnet", "test_resnet"])
def test_a_file_of_an_encoder(name, with_head, tmp_path):
    encoder = randomized(timm.create_model("test_resnet", in_chans=4, num_classes=5 if with_head else 0))
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", metadata={"model": json.dumps({"bands": BANDS})})
    model = create_model(name, 2, 3, tmp_path / "encoder.safetensors", ["B8", "B2"])
    backbone = model if name == "test_resnet" else model.encoder.model
    for name, tensor in backbone.state_dict().items():
        if not name.startswith("fc."):
            pretrained = encoder.state_dict()[name]
            assert torch.equal(tensor, pretrained[:, [3, 0]] if tensor.shape != pretrained.shape else pretrained)


def test_a_raster_models_file_without_a_manifest(trained, tmp_path):
    raster = RasterModel(trained, BANDS)
    save_file(raster.state_dict(), tmp_path / "model.safetensors")
    model = create_model("unet_resnet18", 4, 3, weights=tmp_path / "model.safetensors")
    assert torch.equal(model.encoder.conv1.weight, trained.encoder.conv1.weight)


def damage(folder):
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, folder / "model.safetensors")


def lengthen(folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b" ")


def shard(folder):
    (folder / "model.safetensors").rename(folder / "model.0.safetensors")
    rewrite(folder, lambda it: it["files"].update({"model.0.safetensors": it["files"].pop("model.safetensors")}))


def swap_bands(folder):
    rewrite(folder, lambda it: it["model"].update(bands=BANDS[::-1]), sealed=False)


def swap_bands_in_the_text(folder):
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"B2", b"B?").replace(b"B8", b"B2").replace(b"B?", b"B8"))


@pytest.mark.parametrize("spell", [Path, lambda path: path / "model.safetensors"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage, "model.safetensors is damaged: size or SHA-256 differ"),
        (lengthen, "model.safetensors is damaged: size or SHA-256 differ"),
        (swap_bands, "manifest.json is damaged"),
        (swap_bands_in_the_text, "manifest.json is damaged"),
        (lambda folder: rewrite(folder, lambda it: it.update(format=99)), r"has format version 99.*up to \d.*upgrade"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors can't be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: rewrite(folder, lambda it: it["files"].pop("model.safetensors")), "no file of the checkpoint"),
    ],
)  # fmt: skip
def test_a_checkpoint_is_verified_as_load_model_does_it(spoil, message, spell, tmp_path):
    folder = save_checkpoint(tmp_path / "step", create_model("test_resnet", 4, 3), {"bands": BANDS})
    assert create_model("test_resnet", 4, 3, weights=spell(folder)) is not None
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        create_model("test_resnet", 4, 3, weights=spell(folder))
    with pytest.raises(CheckpointError):
        load_model(folder, create_model("test_resnet", 4, 3))


def test_a_sharded_checkpoint_says_how_it_is_made_one_file(tmp_path):
    model = create_model("test_resnet", 4, 3)
    folder = save_checkpoint(tmp_path / "step", model, {"bands": BANDS})
    shard(folder)
    with pytest.raises(CheckpointError, match=r"is sharded over processes \(model\.0\.safetensors\).*export_weights"):
        create_model("test_resnet", 4, 3, weights=folder)
    one = create_model("test_resnet", 4, 3, weights=export_weights(folder, tmp_path / "one.safetensors"), bands=BANDS)
    assert torch.equal(first_convolution(one), first_convolution(model))


def test_a_folder_without_a_manifest_is_no_checkpoint_and_its_file_is_a_file(tmp_path):
    model = create_model("test_resnet", 4, 3)
    folder = save_checkpoint(tmp_path / "step", model, {"bands": BANDS})
    (folder / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint at .*step: a checkpoint is a folder with a manifest\.json"
    ):
        create_model("test_resnet", 4, 3, weights=folder)
    made = create_model("test_resnet", 4, 3, weights=folder / "model.safetensors")
    assert torch.equal(first_convolution(made), first_convolution(model))


@pytest.mark.parametrize("by_default", [True, False])
def test_averaged_weights_are_taken_where_load_model_takes_them(by_default, tmp_path):
    raw, averaged = (randomized(create_model("test_resnet", 4, 3), seed) for seed in (1, 2))
    folder = save_checkpoint(tmp_path / "step", raw, None, averaged, by_default)
    wanted = {folder: averaged if by_default else raw}
    wanted |= {folder / "model.safetensors": raw, folder / "averaged.safetensors": averaged}
    for path, model in wanted.items():
        made = create_model("test_resnet", 4, 3, weights=path)
        assert torch.equal(first_convolution(made), first_convolution(model)), path
    (folder / "averaged.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"averaged\.safetensors is damaged"):
        create_model("test_resnet", 4, 3, weights=folder / "averaged.safetensors")


def test_a_file_that_is_no_safetensors_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(ValueError, match=r"x\.safetensors can't be read as a safetensors file"):
        create_model("test_resnet", 4, 3, weights=tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ("checkpoints/best", CheckpointError),
        (Path("nowhere"), CheckpointError),
        ("nowhere.safetensors", FileNotFoundError),
        ("nowhere/model.safetensors", FileNotFoundError),
    ],
)
def test_a_path_with_nothing_there(weights, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(str(weights))):
        create_model("test_resnet", 4, 3, weights=weights)


def test_another_models_checkpoint_is_refused(trained, tmp_path):
    folder = save_checkpoint(tmp_path / "step", RasterModel(trained, BANDS), {"bands": BANDS})
    with pytest.raises(ValueError, match=r"step does not fit.*Missing in it: decoder\S+.* and \d+ more.*arguments"):
        create_model("fpn_resnet18", 4, 3, weights=folder)
    with pytest.raises(ValueError, match=r"decoder\S+ \(\d+.*Create the model with the arguments"):
        create_model("unet_resnet18", 4, 3, weights=folder, decoder_channels=(8, 8, 8, 8, 8))
