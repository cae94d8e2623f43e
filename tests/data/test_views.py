"""Augmentation that is a pure function of its key."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoImageProcessor

from hf_balancemix.core.keys import keyed_rng
from hf_balancemix.data.views import BICUBIC, BILINEAR, ViewMaker, as_view, cut_out, normalise, to_tensor
from hf_balancemix.models import squash_processor

ORIENTATION = 0x0112


def picture(height: int = 20, width: int = 30, seed: int = 0) -> Image.Image:
    """Four flat quarters of different colours, which JPEG keeps, with some variation."""
    rng = np.random.default_rng(seed)
    quarters = rng.integers(0, 256, (2, 2, 3)).repeat(height // 2, 0).repeat(width // 2, 1)
    return Image.fromarray((0.9 * quarters + rng.integers(0, 25, quarters.shape)).astype(np.uint8))


def test_squash_fills_the_square_and_keeps_no_aspect_ratio():
    # Left half red, right half blue, four times as wide as high: still half and half, up to the edges.
    wide = np.zeros((20, 80, 3), np.uint8)
    wide[:, :40, 0] = wide[:, 40:, 2] = 255
    view = ViewMaker(16, seed=0, resample=BILINEAR).plain(Image.fromarray(wide))
    assert view.shape == (3, 16, 16)
    assert view.dtype == torch.uint8
    assert (view[0, :, :7] == 255).all()
    assert (view[2, :, 9:] == 255).all()
    assert (view[0, :, 9:] == 0).all()
    assert view.is_contiguous()


def test_plain_views_of_the_size_of_the_image_are_the_image():
    image = picture(16, 16)
    view = ViewMaker(16, seed=0).plain(image)
    assert np.array_equal(view.permute(1, 2, 0).numpy(), np.asarray(image))


KEYS = [(0, 7, "random"), (1, 7, "random"), (0, 8, "random"), (0, 7, "minority")]


@pytest.mark.parametrize("cutout", [0.0, 0.5])
def test_views_differ_by_epoch_index_role_view_and_seed_and_by_nothing_else(cutout):
    views, image = ViewMaker(24, seed=5, cutout=cutout), picture()
    drawn = {key: views.augmented(image, *key, num_views=2) for key in KEYS}
    distinct = [view for pair in drawn.values() for view in pair]
    distinct += ViewMaker(24, seed=6, cutout=cutout).augmented(image, *KEYS[0], num_views=2)
    for i, one in enumerate(distinct):
        for other in distinct[:i]:
            assert not torch.equal(one, other)
    # Again in another order, from another object, after other draws, one view instead of two.
    torch.rand(3)
    again = ViewMaker(24, seed=5, cutout=cutout)
    for key in reversed(KEYS):
        assert torch.equal(again.augmented(image, *key, num_views=1)[0], drawn[key][0])


@pytest.mark.parametrize("cutout", [0.0, 0.5])
def test_views_leave_the_global_generators_alone(cutout):
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    ViewMaker(24, seed=0, cutout=cutout).augmented(picture(), 0, 1, "random", num_views=2)
    assert torch.equal(torch.rand(4), expected)


def test_a_view_maker_refuses_what_randaugment_would_fail_on_later():
    with pytest.raises(ValueError, match="image_size is 0"):
        ViewMaker(0, seed=0)
    with pytest.raises(ValueError, match=r"magnitude 31.*0 to 30"):
        ViewMaker(8, seed=0, magnitude=31)
    with pytest.raises(ValueError, match=r"cutout is 16; it must be a share of the image's side"):
        ViewMaker(8, seed=0, cutout=16)
    for magnitude in (0, 30):
        ViewMaker(8, seed=0, magnitude=magnitude).augmented(picture(), 0, num_views=3)


def test_a_view_maker_from_training_arguments_is_the_one_made_by_hand():
    views = {"cutout": 0.4, "hflip": True, "random_resized_crop": 0.3, "max_image_pixels": 10**6}
    args = SimpleNamespace(randaugment_num_ops=3, randaugment_magnitude=20, **views)
    processor = squash_processor(image_size=24)
    processor.resample = BILINEAR
    found = ViewMaker.from_arguments(args, processor, seed=5)
    expected = ViewMaker(24, 5, resample=BILINEAR, num_ops=3, magnitude=20, **views)
    image, key = picture(), (1, 7, "random")
    assert torch.equal(found.plain(image), expected.plain(image))
    pairs = zip(found.augmented(image, *key, num_views=4), expected.augmented(image, *key, num_views=4), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


# ---- cutout ----


def cut_of(before: np.ndarray, after: np.ndarray) -> tuple[int, int, int, int, tuple[int, ...]]:
    """Left, top, right, bottom and colour of what differs, which is one rectangle of one colour."""
    rows, columns = np.nonzero((before != after).any(-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    inside = after[top:bottom, left:right].reshape(-1, 3)
    assert (inside == inside[0]).all()
    outside = before.copy()
    outside[top:bottom, left:right] = inside[0]
    assert np.array_equal(outside, after)
    return left, top, right, bottom, tuple(inside[0].tolist())


@pytest.mark.parametrize(("share", "side"), [(0.5, 10), (0.25, 5), (0.06, 1), (1.0, 20)])
def test_a_square_of_one_random_colour_is_cut_out_anywhere(share, side):
    size, draws = 20, 1500
    black = np.zeros((size, size, 3), np.uint8)  # one of 2^24 colours would not be seen
    image = Image.fromarray(black)
    torch.manual_seed(0)
    cuts = [cut_of(black, np.asarray(cut_out(image, share))) for _ in range(draws)]
    assert np.array_equal(np.asarray(image), black)  # a copy was cut
    left, top, right, bottom = np.array([cut[:4] for cut in cuts]).T
    colours = np.array([cut[4] for cut in cuts])

    # The centre is any pixel; of a square over the edge only its inside is there.
    spans = [(max(c - side // 2, 0), min(c - side // 2 + side, size)) for c in range(size)]
    covered = np.mean([[a <= x < b for x in range(size)] for a, b in spans], axis=0)
    tolerance = 5 * np.sqrt(covered * (1 - covered) / draws) + 1e-12
    for first, last in ((left, right), (top, bottom)):
        assert set(zip(first.tolist(), last.tolist(), strict=True)) == set(spans)
        share_of = np.mean((first[:, None] <= np.arange(size)) & (np.arange(size) < last[:, None]), axis=0)
        assert (np.abs(share_of - covered) <= tolerance).all()
    whole = (right - left == side) & (bottom - top == side)
    expected = np.mean([b - a == side for a, b in spans]) ** 2  # both sides independently
    assert abs(whole.mean() - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)
    # Three independent values of 0 to 255.
    assert colours.min() < 5
    assert colours.max() > 250
    assert np.abs(colours.mean(0) - 127.5).max() < 5 * 73.9 / np.sqrt(draws)
    assert np.abs(np.corrcoef(np.vstack([colours.T, left, top])) - np.eye(5)).max() < 5 / np.sqrt(draws)


def test_a_share_of_less_than_half_a_pixel_cuts_nothing():
    image = picture(20, 20)
    for _ in range(50):
        assert np.array_equal(np.asarray(cut_out(image, 0.02)), np.asarray(image))


def test_the_square_is_cut_out_of_the_squashed_image_before_randaugment():
    image, key = picture(40, 60), (3, 7, "minority")
    bare = ViewMaker(24, seed=5, num_ops=0, cutout=0.5)
    plain = bare.plain(image).permute(1, 2, 0).numpy()
    assert torch.equal(bare.plain(image), ViewMaker(24, seed=5).plain(image))
    cuts = [cut_of(plain, view.permute(1, 2, 0).numpy()) for view in bare.augmented(image, *key, num_views=4)]
    assert len(set(cuts)) == 4
    for view, augmented in enumerate(ViewMaker(24, seed=5, cutout=0.5).augmented(image, *key, num_views=2)):
        with keyed_rng(5, *key, view):
            left, top, colour = torch.randint(24, ()) - 6, torch.randint(24, ()) - 6, torch.randint(256, (3,))
            cut = plain.copy()
            cut[max(top, 0) : max(top + 12, 0), max(left, 0) : max(left + 12, 0)] = colour
            expected = v2.RandAugment(num_ops=2, magnitude=9)(Image.fromarray(cut))
        assert torch.equal(augmented, to_tensor(expected))


def test_without_cutout_a_view_is_randaugments_alone_as_it_always_was():
    image, key = picture(24, 24), (1, 2, "random")
    for maker in (ViewMaker(24, seed=9), ViewMaker(24, seed=9, cutout=0.0)):
        for view, augmented in enumerate(maker.augmented(image, *key, num_views=3)):
            with keyed_rng(9, *key, view):
                expected = v2.RandAugment(num_ops=2, magnitude=9)(image)
            assert torch.equal(augmented, to_tensor(expected))


# ---- what the saved processor does ----


@pytest.mark.parametrize("resample", [BICUBIC, BILINEAR])
def test_views_are_what_the_saved_processor_makes_of_the_same_file(resample, tmp_path):
    processor = squash_processor(image_size=32)
    processor.resample = resample
    processor.image_mean, processor.image_std = [0.1, 0.4, 0.6], [0.2, 0.3, 0.5]
    processor.save_pretrained(tmp_path)
    maker = ViewMaker(32, seed=0, resample=resample)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    for image in (picture(32, 32), picture(50, 70), picture(20, 12)):
        view = normalise(maker.plain(image)[None], mean, std)
        assert view.dtype == torch.float32
        for backend in ("pil", "torchvision"):
            loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
            expected = loaded(image, return_tensors="pt")["pixel_values"]
            grey_level = 1 / 255 / min(processor.image_std)  # the two libraries round differently after resizing
            assert (view - expected).abs().max() <= (1e-6 if image.size == (32, 32) else 1.01 * grey_level)
            assert (view - expected).abs().mean() < 1e-3
            if backend == "pil":
                assert torch.allclose(view, expected, atol=1e-6)


def test_normalise_maps_mean_to_zero():
    mean, std = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.1, 0.2, 0.5])
    images = torch.tensor([51, 102, 153], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert torch.allclose(normalise(images, mean, std), torch.zeros(2, 3, 4, 4), atol=1e-6)
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert torch.allclose(normalise(white, mean, std).flatten(), torch.tensor([8.0, 3.0, 0.8]), atol=1e-5)


# ---- crop, mirror and a transform of the user's ----


def plain_maker(size: int = 20, **options) -> ViewMaker:
    return ViewMaker(size, 0, num_ops=0, **options)


def test_every_other_view_is_mirrored():
    image, maker = picture(), plain_maker(hflip=True)
    plain = maker.plain(image)
    views = torch.stack([maker.augmented(image, key, num_views=1)[0] for key in range(400)])
    mirrored = (views == plain.flip(2)).all(3).all(2).all(1)
    assert ((views == plain).all(3).all(2).all(1) ^ mirrored).all()
    assert 160 < mirrored.sum() < 240
    again = maker.augmented(image, 7, num_views=2)
    assert torch.equal(again[0], views[7])  # by its key alone


def test_a_crop_has_at_least_its_share_of_the_area_and_comes_from_the_whole_image():
    # Red and green are the column and the row, on a scale of 0 to 255.
    row, column = np.mgrid[:256, :256].astype(np.uint8)
    image = Image.fromarray(np.stack([column, row, 0 * row], 2)).resize((512, 256), Image.Resampling.NEAREST)
    maker = plain_maker(32, random_resized_crop=0.25)
    areas, corners = [], []
    for key in range(200):
        red, green = maker.augmented(image, key, num_views=1)[0][:2].double()
        width, height = (red.max() - red.min()) / 255 * 33 / 31, (green.max() - green.min()) / 255 * 33 / 31
        assert 0.7 < (2 * width) / height < 1.4  # sides in pixels: 3 to 4, 4 to 3
        areas.append(float(width * height))
        corners.append(float(red.min()))
    # The largest crop of such sides has two thirds of this image.
    assert 0.22 < min(areas) < 0.3
    assert 0.5 < max(areas) < 0.73
    assert min(corners) < 10 < 100 < max(corners)


def test_without_them_views_are_as_before():
    image = picture()
    views = ViewMaker(20, 0).augmented(image, 1, "random", num_views=2)
    same = ViewMaker(20, 0, hflip=False, random_resized_crop=0).augmented(image, 1, "random", num_views=2)
    assert all(torch.equal(*pair) for pair in zip(views, same, strict=True))
    with keyed_rng(0, 1, "random", 1):
        expected = to_tensor(v2.RandAugment(2, 9)(ViewMaker(20, 0).squash(image)))
    assert torch.equal(views[1], expected)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_of_the_area_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"random_resized_crop is .*; it must be the least share"):
        plain_maker(random_resized_crop=share)


def draw_from_all(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image).copy()
    pixels[0, 0] = [int(torch.randint(256, ())), np.random.randint(256), random.randrange(256)]
    return pixels


def test_a_transform_draws_by_the_key_from_every_global_generator():
    maker = plain_maker(transform=draw_from_all)

    def drawn(seed):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        views = [view[:, 0, 0].tolist() for key in range(3) for view in maker.augmented(picture(), key, num_views=2)]
        after = (torch.rand(()).item(), np.random.rand(), random.random())
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        assert after == (torch.rand(()).item(), np.random.rand(), random.random())
        return views

    views = drawn(1)
    assert views == drawn(2)
    for channel in range(3):
        assert len({view[channel] for view in views}) > 3  # each view its own
    assert maker.draws_by_key()
    own = random.Random(0)
    assert not plain_maker(transform=lambda image: image.point(lambda value: own.randrange(256))).draws_by_key()


def test_what_a_transform_may_return():
    size = 20
    image = picture(size, size)
    tensor = to_tensor(image)
    pixels = np.asarray(image)
    same = [image, pixels, pixels[:, ::-1][:, ::-1], tensor, tensor.float() / 255, pixels / 255.0]
    same += [v2.functional.to_image(image), v2.ToDtype(torch.float32, scale=True)(v2.functional.to_image(image))]
    for value in same:
        view = as_view(value, size)
        assert type(view) is torch.Tensor
        assert torch.equal(view, tensor)
    assert as_view(image.convert("L"), size).shape == (3, size, size)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"image": np.zeros((20, 20, 3), np.uint8)}, TypeError, "a dict; .* return its 'image'"),
        (None, TypeError, "a NoneType"),
        (np.zeros((20, 20), np.uint8), ValueError, r"a ndarray of shape \(20, 20\); .* a \(20, 20, 3\) array"),
        (np.zeros((3, 20, 20), np.uint8), ValueError, r"of shape \(3, 20, 20\)"),
        (torch.zeros(20, 20, 3), ValueError, r"a Tensor of shape \(20, 20, 3\)"),
        (Image.new("RGB", (10, 10)), ValueError, r"of size \(10, 10\)"),
        (torch.full((3, 20, 20), -1.5), ValueError, r"values from -1\.5 to -1\.5; .* leave normalisation out"),
        (torch.zeros(3, 20, 20, dtype=torch.int64), TypeError, "int64"),
    ],
)
def test_what_it_must_not_return_is_refused(value, error, message):
    with pytest.raises(error, match=f"train_transform returned .*{message}"):
        as_view(value, 20)
