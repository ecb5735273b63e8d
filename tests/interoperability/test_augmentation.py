"""Kornia and torchvision v2 as plain callables, per batch on the device or per sample; what they pad is nodata."""

import pytest
import torch
from interop import IGNORE, bits, run_resumed, run_whole, tensors, trainer
from torch.utils.data import DataLoader, Dataset, TensorDataset

pytest.importorskip("kornia")
pytest.importorskip("torchvision")

import kornia.augmentation as K
from kornia.constants import DataKey, SamplePadding
from torchvision import tv_tensors
from torchvision.transforms import v2

# The first recipe: for RandomAffine, which asks for a padding mode and a value for masks alone.
AFFINE_FILL = {
    DataKey.MASK: {
        "resample": "nearest",
        "align_corners": None,
        "padding_mode": SamplePadding.FILL,
        "fill_value": torch.tensor(float(IGNORE)),
    }
}
# The second: for RandomCrop with pad_if_needed, whose value is called otherwise.
CROP_FILL = {DataKey.MASK: {"resample": "nearest", "align_corners": None, "fill": IGNORE}}


def filled(augmentation):
    """Let an augmentation pad masks with nodata: the third recipe, for all that pad with 0 and take no value."""

    def transform(batch):
        batch = augmentation({**batch, "mask": batch["mask"].long() - IGNORE})
        return {**batch, "mask": batch["mask"] + IGNORE}

    return transform


def kornia(*augmentations, **kwargs):
    return K.AugmentationSequential(*augmentations, data_keys=None, keepdim=True, **kwargs)


RECIPES = {
    "affine": lambda: kornia(
        K.RandomHorizontalFlip(), K.RandomAffine(45.0, (0.2, 0.2), (0.6, 1.0), p=0.8), extra_args=AFFINE_FILL
    ),
    "padded crop": lambda: kornia(K.RandomCrop((20, 20), pad_if_needed=True), extra_args=CROP_FILL),
    "affine, shifted": lambda: filled(kornia(K.RandomAffine(45.0, (0.2, 0.2), (0.6, 1.0), p=0.8))),
    "rotation, shifted": lambda: filled(kornia(K.RandomRotation(45.0, p=0.8))),
    "perspective, shifted": lambda: filled(kornia(K.RandomVerticalFlip(), K.RandomPerspective(0.5, p=0.8))),
    "padded crop, shifted": lambda: filled(kornia(K.RandomCrop((20, 20), pad_if_needed=True))),
    "several, shifted": lambda: filled(kornia(K.RandomShear(30.0), K.RandomRotation(20.0), K.RandomGaussianNoise())),
}
UNFILLED = {
    "affine": lambda: kornia(K.RandomHorizontalFlip(), K.RandomAffine(45.0, (0.2, 0.2), (0.6, 1.0), p=0.8)),
    "padded crop": lambda: kornia(K.RandomCrop((20, 20), pad_if_needed=True)),
    "affine, shifted": lambda: kornia(K.RandomAffine(45.0, (0.2, 0.2), (0.6, 1.0), p=0.8)),
    "rotation, shifted": lambda: kornia(K.RandomRotation(45.0, p=0.8)),
    "perspective, shifted": lambda: kornia(K.RandomVerticalFlip(), K.RandomPerspective(0.5, p=0.8)),
    "padded crop, shifted": lambda: kornia(K.RandomCrop((20, 20), pad_if_needed=True)),
    "several, shifted": lambda: kornia(K.RandomShear(30.0), K.RandomRotation(20.0), K.RandomGaussianNoise()),
}


def images_and_masks(samples=10, low=0, size=16, seed=0):
    """Return images whose brightness tells the class, and masks with classes ``low`` … 2 and some nodata."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(low, 3, (samples, size, size), generator=generator)
    images = masks[:, None] + 0.1 * torch.randn(samples, 3, size, size, generator=generator)
    masks[:, :2] = IGNORE
    return images, masks


class Chips(Dataset):
    """Mappings with what TorchGeo's have besides, transformed one by one."""

    def __init__(self, transform=None, low=0):
        self.images, self.masks = images_and_masks(low=low)
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        sample = {"image": self.images[index], "mask": self.masks[index], "name": f"chip {index}"}
        return sample if self.transform is None else self.transform(sample)


def on_chips(transform=None, workers=0, low=0, **kwargs):
    loader = {"batch_size": 2, "num_workers": workers}
    dataset, val = Chips(transform, low), Chips(low=low)
    return trainer(DataLoader(dataset, shuffle=True, **loader), DataLoader(val, **loader), **kwargs)


@pytest.mark.parametrize("mask_type", [torch.int64, torch.uint8])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_kornia_pads_is_nodata_and_nothing_else_differs(recipe, mask_type):
    """Against the same draws with masks of ones, where what is padded shows as 0, and with the masks themselves."""
    images, masks = images_and_masks(6, low=1)
    torch.manual_seed(1)
    made = RECIPES[recipe]()({"image": images, "mask": masks.to(mask_type), "name": list("abcdef")})
    torch.manual_seed(1)
    plain = UNFILLED[recipe]()({"image": images, "mask": masks})
    torch.manual_seed(1)
    padded = UNFILLED[recipe]()({"image": images, "mask": torch.ones_like(masks)})["mask"] == 0
    assert padded.sum() > 50
    assert (plain["mask"][padded] == 0).all(), "kornia pads with class 0: what the recipe is for"
    assert torch.equal(made["mask"].long(), torch.where(padded, IGNORE, plain["mask"]))
    assert torch.equal(made["image"], plain["image"])
    assert made["mask"].shape == made["image"].shape[:1] + made["image"].shape[2:]
    assert made["name"] == list("abcdef")


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_pixel_outside_becomes_class_0_in_training(recipe):
    """Masks of classes 1 and 2 alone; the figures of validation see no augmentation."""
    training = on_chips(low=1, seed=0, train_transform=RECIPES[recipe]())
    history = training.fit(4)
    seen = torch.cat([batch["mask"].flatten() for batch in training.trained])
    assert seen.unique().tolist() == [1, 2, IGNORE]
    nodata = (seen == IGNORE).float().mean()
    assert nodata > 2 / 16 + 0.02, "nothing was padded, so that this shows nothing"
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert all(not batch["image"].isnan().any() for batch in training.trained)
    images, masks = images_and_masks(low=1)
    assert torch.equal(torch.cat([batch["image"] for batch in training.validated[:5]]), images)
    assert torch.equal(torch.cat([batch["mask"] for batch in training.validated[:5]]), masks)


def test_tuples_go_through_kornia_with_named_places():
    """Loaders of (image, mask): one line, and the same bits as the mapping."""
    images, masks = images_and_masks(low=1)
    loader, val = (DataLoader(TensorDataset(images, masks), batch_size=2) for _ in range(2))
    augmentation = K.AugmentationSequential(
        K.RandomAffine(45.0, (0.2, 0.2), p=0.8), data_keys=["input", "mask"], keepdim=True, extra_args=AFFINE_FILL
    )
    training = trainer(loader, val, seed=0, train_transform=lambda batch: augmentation(*batch))
    torch.manual_seed(0)
    training.fit(2)
    assert torch.cat([mask.flatten() for _, mask in training.trained]).unique().tolist() == [1, 2, IGNORE]
    by_name = kornia(K.RandomAffine(45.0, (0.2, 0.2), p=0.8), extra_args=AFFINE_FILL)
    samples = [{"image": image, "mask": mask} for image, mask in zip(images, masks, strict=True)]
    other = trainer(DataLoader(samples, batch_size=2), val, seed=0, train_transform=by_name)
    torch.manual_seed(0)
    other.fit(2)
    assert bits(training) == bits(other)


class Rotation:
    """torchvision v2 over a mapping whose tensors are wrapped by name; unwrapped, masks are passed by untouched."""

    def __init__(self):
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
        self.transform = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomAffine(45, (0.2, 0.2), (0.6, 1.0), fill=fill),
                v2.RandomCrop(20, pad_if_needed=True, fill=fill),
                v2.GaussianNoise(clip=False),  # else what is above 1 is cut off
                v2.ToPureTensor(),
            ]
        )

    def __call__(self, sample):
        wrapped = {"image": tv_tensors.Image(sample["image"]), "mask": tv_tensors.Mask(sample["mask"])}
        return {**sample, **self.transform(wrapped)}


@pytest.mark.parametrize("where", ["sample", "batch"])
def test_what_torchvision_pads_is_nodata(where):
    arguments = {"transform": Rotation()} if where == "sample" else {"train_transform": Rotation()}
    training = on_chips(low=1, seed=0, **arguments)
    training.fit(4)
    seen = torch.cat([batch["mask"].flatten() for batch in training.trained])
    assert seen.unique().tolist() == [1, 2, IGNORE]
    assert (seen == IGNORE).float().mean() > (2 * 16 + 20**2 - 16**2) / 20**2
    assert all(batch["image"].shape == (2, 3, 20, 20) for batch in training.trained)
    assert all(len(batch["name"]) == 2 for batch in training.trained)
    for batch in training.trained:  # images and masks are moved alike: brightness is class
        valid = batch["mask"] != IGNORE
        middle = batch["image"].mean(1)
        assert (middle[valid & (batch["mask"] == 2)].mean() - middle[valid & (batch["mask"] == 1)].mean()) > 0.4


def test_torchvision_turns_samples_each_for_itself_and_a_batch_as_one():
    """What the guide warns of."""
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    batch = {"image": image, "mask": torch.ones(4, 16, 16, dtype=torch.long)}
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
    rotation = v2.RandomRotation(45, fill=fill)
    torch.manual_seed(0)
    at_once = rotation({name: kind(batch[name]) for name, kind in KINDS.items()})["mask"]
    assert (at_once == at_once[0]).all()
    one_by_one = [rotation({name: kind(batch[name][i]) for name, kind in KINDS.items()})["mask"] for i in range(4)]
    assert not torch.equal(one_by_one[0], one_by_one[1])
    by_kornia = kornia(K.RandomAffine(45.0, p=1.0), extra_args=AFFINE_FILL)(batch)["mask"]
    assert not torch.equal(by_kornia[0], by_kornia[1])


KINDS = {"image": tv_tensors.Image, "mask": tv_tensors.Mask}


def test_tv_tensors_train_as_the_tensors_that_they_are():
    images, masks = images_and_masks()
    plain = [{"image": image, "mask": mask} for image, mask in zip(images, masks, strict=True)]
    wrapped = [{name: kind(sample[name]) for name, kind in KINDS.items()} for sample in plain]
    ends = []
    for samples, transform in (
        (plain, None),
        (wrapped, None),
        (plain, lambda batch: {name: kind(batch[name]) for name, kind in KINDS.items()}),
    ):
        loader = DataLoader(samples, batch_size=2)
        training = trainer(loader, loader, seed=0, train_transform=transform, val_transform=transform)
        torch.manual_seed(0)
        training.fit(2)
        ends.append(bits(training))
    assert ends[0] == ends[1] == ends[2]


BUILDS = {
    "kornia on the batch": lambda: {"train_transform": RECIPES["affine"]()},
    "kornia on the batch, shifted": lambda: {"train_transform": RECIPES["several, shifted"]()},
    "kornia on the sample": lambda: {"transform": on_one(RECIPES["affine"]())},
    "torchvision on the batch": lambda: {"train_transform": Rotation()},
    "torchvision on the sample": lambda: {"transform": Rotation()},
    "both": lambda: {"transform": Rotation(), "train_transform": RECIPES["affine"]()},
}


def on_one(augmentation):
    """Let an augmentation of batches serve one sample, as in a worker."""

    def transform(sample):
        batch = {name: value[None] for name, value in tensors(sample).items()}
        return {**sample, **{name: value[0] for name, value in augmentation(batch).items()}}

    return transform


@pytest.mark.parametrize("place", BUILDS)
def test_what_is_drawn_goes_on_exactly_and_workers_change_no_bit(place, tmp_path):
    def build(workers=0, **kwargs):
        return on_chips(workers=workers, **BUILDS[place](), **kwargs)

    expected, inside = run_whole(build, tmp_path / "whole")
    in_workers, there = run_whole(lambda **kwargs: build(2, **kwargs), tmp_path / "workers")
    assert in_workers == expected
    for number, checkpoint in enumerate([*inside[1::3], there[2]]):
        assert run_resumed(build, checkpoint, tmp_path / f"{number}") == expected


def test_epochs_and_samples_are_augmented_differently():
    """What would make the test above say nothing."""
    training = on_chips(seed=0, train_transform=kornia(K.RandomAffine(45.0, p=1.0), extra_args=AFFINE_FILL))
    training.fit(2)
    masks = {}
    for batch in training.trained:
        for name, mask in zip(batch["name"], batch["mask"], strict=True):
            masks.setdefault(name, []).append(mask)
    assert len(masks) == 10
    assert all(len(both) == 2 and not torch.equal(*both) for both in masks.values())


def test_normalisation_by_kornia_is_that_of_a_model_that_does_it_itself():
    mean, std = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.5, 1.0, 2.0])
    transform = kornia(K.Normalize(mean=mean, std=std))
    training = on_chips(seed=0, train_transform=transform, val_transform=transform)
    training.fit(1)
    images, masks = images_and_masks()
    expected = {"image": (images - mean[:, None, None]) / std[:, None, None], "mask": masks}
    found = {name: torch.cat([batch[name] for batch in training.validated]) for name in ("image", "mask")}
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_augmentation_and_mixed_precision_go_together(kind):
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[kind]
    training = on_chips(low=1, seed=0, train_transform=RECIPES["affine"](), mixed_precision=name)
    history = training.fit(3)
    assert history["val_loss"][-1] < history["val_loss"][0]
    seen = torch.cat([batch["mask"].flatten() for batch in training.trained])
    assert seen.unique().tolist() == [1, 2, IGNORE]
    assert all(batch["image"].dtype == torch.float32 for batch in training.trained)
