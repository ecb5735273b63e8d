import copy
import functools
import json
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

import ununennium.models
from ununennium.models import RasterModel, _registry, create_model, list_models, register_model


def make_head(in_channels, num_classes, weights, **kwargs):
    return nn.Conv2d(in_channels, num_classes, 1, **kwargs)


def encoder_in_use(model):
    """The encoder's own class, or timm's name for it, tag included."""
    return getattr(model.encoder, "name", type(model.encoder).__name__)


def test_exports_are_exactly_the_public_names():
    assert ununennium.models.__all__ == ["RasterModel", "create_model", "list_models", "register_model"]


def test_importing_and_registering_leave_the_heavy_libraries_alone():
    script = """
import sys
from ununennium.models import register_model
register_model("tiny", lambda **kwargs: None)
heavy = {"segmentation_models_pytorch", "timm", "torchvision", "torchgeo", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("architecture", sorted(smp.MODEL_ARCHITECTURES_MAPPING))
def test_every_architecture_gives_logits_of_the_input_size(architecture):
    encoder = "test_vit" if architecture == "dpt" else "resnet18"
    assert f"{architecture}_{encoder}" in list_models(f"{architecture}_*")
    size = {"dpt": 160, "pan": 128}.get(architecture, 64)  # test_vit takes one size; PAN pools to 1/128
    model = create_model(f"{architecture}_{encoder}", in_channels=12, num_classes=7).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 12, size, size))
    assert logits.shape == (1, 7, size, size)
    assert logits.min() < 0 or logits.max() > 1, "an activation has been applied"


@pytest.mark.parametrize("encoder", ["mit_b0", "efficientnet-b0", "convnext_atto", "mobilenetv3_small_050", "dla46_c"])
def test_every_kind_of_encoder_takes_many_bands(encoder):
    assert f"fpn_{encoder}" in list_models("fpn_*")
    model = create_model(f"fpn_{encoder}", in_channels=12, num_classes=3).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 12, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("unet_efficientnet-b0", "EfficientNetEncoder"),
        ("unet_efficientnet_b0", "EfficientNetEncoder"),  # timm's name, but smp's encoder wins
        ("UNet-EfficientNet-B0", "EfficientNetEncoder"),
        ("unet_tu-efficientnet_b0", "efficientnet_b0"),
        ("unet_tu-convnext_atto", "convnext_atto"),
        ("unet_convnext_atto", "convnext_atto"),
        ("UNET_ConvNeXt-Atto", "convnext_atto"),
    ],
)
def test_spellings_mean_the_same_encoder(name, encoder):
    with torch.device("meta"):
        assert encoder_in_use(create_model(name, 4, 2)) == encoder


def test_arguments_reach_the_architecture():
    with torch.device("meta"):
        model = create_model("unet_resnet18", 4, 2, encoder_depth=3, decoder_channels=(24, 16, 8))
    assert model.segmentation_head[0].in_channels == 8


@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto"])
def test_a_misspelt_argument_is_refused(encoder):
    # smp drops what it does not know for its own encoders, which would hide the mistake
    with pytest.raises(ValueError, match=f"unet_{encoder}.*decoder_chanels"):
        create_model(f"unet_{encoder}", 4, 2, decoder_chanels=(24, 16, 8))


@pytest.mark.parametrize("name", ["unet_resnet18", "dpt_test_vit", "unet_test_resnet"])
def test_pretrained_weights_are_asked_for_only_when_named(name, monkeypatch):
    asked = []

    def download(*args, **kwargs):
        asked.append(args or kwargs)
        raise ConnectionError("no network here")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", download)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    create_model(name, 12, 2)
    assert not asked
    with pytest.raises(ConnectionError):  # a failed download is not a refusal by the model
        create_model(name, 12, 2, weights="imagenet")
    assert asked


@pytest.mark.parametrize(
    ("weights", "pretrained"), [("imagenet", "resnet50.a1_in1k"), ("gluon_in1k", "resnet50.gluon_in1k")]
)
def test_a_tag_of_timm_becomes_part_of_the_encoder_name(weights, pretrained, monkeypatch):
    requests = []
    create = timm.create_model

    def record(name, pretrained=False, **kwargs):
        requests.append((name, pretrained))
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", record)
    with torch.device("meta"):
        create_model("unet_tu-resnet50", 12, 2, weights=weights)
    assert requests[-1] == (pretrained, True)


@pytest.mark.parametrize(
    ("name", "weights", "known"),
    [
        ("unet_resnet18", "landsat", "known: imagenet, ssl, swsl"),
        ("unet_convnext_atto", "landsat", "known: d2_in1k"),
        ("dpt_vit_base_patch16_clip_quickgelu_224", "imagenet", "known: metaclip_2pt5b, metaclip_400m, openai"),
        ("unet_tu-resnet32ts", "landsat", "known: ra2_in1k"),
        ("unet_tu-vovnet57a", "imagenet", "known: none"),
        ("resnet18", "landsat", "known: a1_in1k, "),
        ("vovnet57a", "imagenet", "known: none"),
    ],
)
def test_unknown_weights_are_answered_with_the_known(name, weights, known):
    with pytest.raises(ValueError, match=known):
        create_model(name, 12, 2, weights=weights)


@pytest.mark.parametrize(
    ("name", "nearest", "pattern"),
    [
        ("unet_resnet5O", "known: unet_resnet50,", "unet_*"),
        ("fpn_convnxt_tiny", "fpn_convnext_tiny", "fpn_*"),
        ("unt_resnet50", "known: unet_resnet50,", "unet_*"),
        ("resnet50_unet", "known: unet_resnet50,", "unet_*"),
        ("convnext_tny_unet", "unet_convnext_tiny", "unet_*"),
        ("unet", "known: unet_resnet34.", "unet_*"),
        ("dpt", "known: dpt_vit_base_patch16_224. list_models", "dpt_*"),
        ("unet_qqqqqqqq", "known: none.", "unet_*"),
        ("qqqqqqqq", "known: none.", "*"),
        ("my_hed", "known: my_head.", "*"),
        ("resnet5O", "resnet50", "resnet*"),
        ("ResNet-18", "resnet18", "resnet*"),
        ("convnext-tny", "convnext_tiny", "convnext*"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest, pattern):
    register_model("my_head", make_head)
    with pytest.raises(ValueError, match="Unknown model") as error:
        create_model(name, 4, 2)
    assert nearest in str(error.value)
    assert f'list_models("{pattern}") shows all' in str(error.value)


@pytest.mark.parametrize("name", ["linknet_mit_b0", "pan_densenet121", "unet_test_vit", "dpt_resnet18"])
def test_a_combination_that_is_refused_names_the_model_and_the_cause(name):
    assert name not in list_models()
    with pytest.raises(ValueError, match=name) as error:
        create_model(name, 4, 2)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("argument", ["in_channels", "num_classes"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (True, TypeError), (2.0, TypeError), ("4", TypeError)]
)
def test_bad_counts_are_named(argument, value, error):
    counts = {"in_channels": 4, "num_classes": 2, argument: value}
    with pytest.raises(error, match=f"{argument} must be .*got {value!r}"):
        create_model("unet_resnet18", **counts)


def test_a_count_may_be_an_integer_of_numpy():
    config = create_model("test_resnet", np.int64(4), np.uint8(2)).model_config
    assert config == {"name": "test_resnet", "in_channels": 4, "num_classes": 2}
    assert type(config["in_channels"]) is type(config["num_classes"]) is int


def test_listed_names_are_sorted_and_each_is_found():
    from ununennium.models import _segmentation

    names = list_models()
    assert names == sorted(set(names))
    known = {_registry.normalize(f"{a}_{e}") for a in ("unet", "dpt") for e in _segmentation._usable_encoders(a)}
    for name in [name for name in names if name.startswith(("unet_", "dpt_"))][::25]:
        found = _segmentation.find(name)
        assert _registry.normalize(f"{found.architecture}_{found.encoder_name}") in known
    bare = set(timm.list_models())
    assert bare < set(names)
    assert {name.partition("_")[0] for name in names if name not in bare} == set(smp.MODEL_ARCHITECTURES_MAPPING)


def test_no_two_listed_names_mean_the_same_model():
    spellings = Counter(map(_registry.normalize, list_models()))
    assert spellings.most_common(1)[0][1] == 1


def test_listing_takes_wildcards_and_leaves_out_what_can_not_be_built():
    unets = list_models("UNET_*")
    assert all(name.startswith("unet_") for name in unets)
    assert {"unet_resnet50", "unet_tu-resnet50", "unet_convnext_tiny", "unet_efficientnet-b0"} <= set(unets)
    assert list_models("unet_resnet5?") == ["unet_resnet50"]
    assert "unet_vit_base_patch16_224" not in unets
    assert "dpt_vit_base_patch16_224" in list_models("dpt_*")
    assert not list_models("dpt_convnext*")
    assert not list_models("dpt_*patch14*")  # smp's DPT builds them, but no input passes
    for architecture in ("deeplabv3", "deeplabv3plus", "pan"):
        assert list_models(f"{architecture}_convnext_tiny")
        assert not list_models(f"{architecture}_swin_*")
        assert not list_models(f"{architecture}_vgg*")
    assert not list_models("linknet_mit*")
    assert not list_models("*timm-*")  # deprecated by smp, still accepted
    assert list_models("ResNet5?") == ["resnet50"]
    assert "convnext_tiny" in list_models("convnext_*")
    assert not list_models("mit_b*")  # smp has this encoder, but timm no model of images


def test_registered_as_a_function_and_as_a_decorator():
    assert register_model("plain_head", make_head) is make_head

    @register_model("Other-Head")
    def make_other(in_channels, num_classes, weights, **kwargs):
        assert weights == "mine"
        return make_head(in_channels, num_classes, weights, **kwargs)

    assert list_models("*_head") == ["plain_head"]
    assert list_models("other*") == ["Other-Head"]
    assert create_model("plain_head", 12, 5).weight.shape == (5, 12, 1, 1)
    other = create_model("other_head", in_channels=12, num_classes=5, weights="mine", bias=False)
    assert other.bias is None


@pytest.mark.parametrize(
    "name",
    ["my_head", "My-Head", "unet_resnet50", "unet_tu-resnet50", "UNet-convnext-tiny", "resnet50", "ConvNeXt-Tiny",
     "NASNetALarge"],
)  # fmt: skip
def test_a_taken_name_needs_overwrite(name):
    register_model("my_head", make_head)
    with pytest.raises(ValueError, match=f"{name}.*overwrite=True"):
        register_model(name, lambda **kwargs: nn.Identity())
    register_model(name, lambda **kwargs: nn.Identity(), overwrite=True)
    assert isinstance(create_model(name, 4, 2), nn.Identity)
    assert list_models().count(name) == 1


def test_an_empty_name_is_refused():
    with pytest.raises(ValueError, match="needs a name"):
        register_model(" ", make_head)


def test_all_of_timms_names_without_underscore_and_digit_are_known():
    words = {n for n in map(_registry.normalize, timm.list_models()) if "_" not in n and not any(map(str.isdigit, n))}
    assert words <= _registry._TIMMS_WORDS


@pytest.mark.parametrize("name", ["resnet18", "ConvNeXt-Atto", "test_vit", "ghostnet_050", "test_convnext"])
def test_a_bare_name_is_a_model_of_whole_images(name):
    size = 160 if name == "test_vit" else 64
    model = create_model(name, in_channels=12, num_classes=7).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 12, size, size))
    assert logits.shape == (2, 7)


def test_a_head_for_one_value():
    model = create_model("test_resnet", in_channels=4, num_classes=1, drop_rate=0.2)
    assert model(torch.randn(3, 4, 32, 32)).shape == (3, 1)
    assert model.drop_rate == 0.2


def test_a_misspelt_argument_of_timms_is_refused():
    with pytest.raises(ValueError, match=r"resnet18 can't be built.*dorp_rate"):
        create_model("resnet18", 4, 2, dorp_rate=0.2)


@pytest.mark.parametrize("name", ["unet_resnet18", "unet_tu-resnet18", "resnet18"])
@pytest.mark.parametrize("argument", ["pretrained", "encoder_weights", "checkpoint_path"])
def test_weights_come_by_one_argument_only(name, argument):
    with pytest.raises(ValueError, match=f"takes no {argument}: say it with weights"):
        create_model(name, 4, 2, **{argument: "imagenet"})


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("unet_resnet18", {}),
        ("UNet-ResNet18", {"decoder_channels": (24, 16, 8, 8, 4), "encoder_depth": 5}),
        ("fpn_tu-resnet18", {"decoder_dropout": 0.5, "decoder_merge_policy": "cat"}),
        ("test_vit", {"img_size": (96, 64), "global_pool": "avg"}),
        ("head", {"bias": False}),
    ],
)
def test_the_config_makes_the_model_again(name, kwargs):
    register_model("head", make_head)
    with torch.device("meta"):
        model = create_model(name, 5, 3, **kwargs)
    config = model.model_config
    assert config == json.loads(json.dumps(config))
    assert config.keys() == {"name", "in_channels", "num_classes", *kwargs}
    with torch.device("meta"):
        again = create_model(**config)
    assert again.model_config == config
    assert str(again) == str(model)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert "model_config" not in {name.partition(".")[0] for name in model.state_dict()}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_config_goes_where_the_model_goes(duplicate):
    model = create_model("test_resnet", 5, 3, drop_rate=0.1)
    names = list(model.state_dict())
    assert duplicate(model).model_config == {
        "name": "test_resnet",
        "in_channels": 5,
        "num_classes": 3,
        "drop_rate": 0.1,
    }
    assert list(duplicate(model).state_dict()) == names


@pytest.mark.parametrize("value", [nn.GELU, torch.float32, {1: 2}, [functools.partial(nn.GELU)], float("inf"), {1, 2}])
def test_what_is_not_plain_data_makes_no_config(value):
    register_model("head", lambda in_channels, num_classes, weights, extra: nn.Conv2d(in_channels, num_classes, 1))
    assert create_model("head", 5, 3, extra=value).model_config is None


def test_the_config_is_a_copy_of_what_was_given():
    register_model("head", lambda in_channels, num_classes, weights, extra: nn.Conv2d(in_channels, num_classes, 1))
    extra = {"widths": [1, 2]}
    model = create_model("head", 5, 3, extra=extra)
    extra["widths"].append(3)
    assert model.model_config["extra"] == {"widths": [1, 2]}


def test_a_registered_model_is_described_by_the_outermost_name():
    register_model("mine", lambda weights, **kwargs: create_model("test_resnet", **kwargs))
    assert create_model("mine", 5, 3).model_config == {"name": "mine", "in_channels": 5, "num_classes": 3}


def test_a_registered_model_that_describes_itself_is_left_alone():
    register_model("mine", lambda in_channels, num_classes, weights: RasterModel(nn.Identity(), ["B2", "B3"]))
    assert create_model("mine", 2, 3).model_config["bands"] == ["B2", "B3"]


def test_a_registered_factory_hears_of_bands_where_it_is_asked_for_weights():
    heard = []
    register_model("mine", lambda **kwargs: heard.append(kwargs) or nn.Identity())
    counts = {"in_channels": 2, "num_classes": 3}
    create_model("mine", 2, 3, bands=["B2", "B3"])
    create_model("mine", 2, 3, "pastis")
    create_model("mine", 2, 3, "pastis", ["B2", "B3"], unmatched="zero")
    assert heard == [
        {**counts, "weights": None},
        {**counts, "weights": "pastis"},
        {**counts, "weights": "pastis", "bands": ("B2", "B3"), "unmatched": "zero"},
    ]
