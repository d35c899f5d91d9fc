"""Data sets: the split of the digits, image folders good and damaged, shifts, loaders."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kernelpress import data

Image = pytest.importorskip("PIL.Image", reason="image folders need: pip install 'kernelpress[data]'")
pytest.importorskip("sklearn", reason="the digits need: pip install 'kernelpress[data]'")


def save_image(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if len(colour) > 1 else colour[0]).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three images, one of them greyscale, and files that are no images."""
    save_image(tmp_path / "walrus" / "b.png", (0, 255, 0))
    save_image(tmp_path / "walrus" / "deep" / "a.jpg", (200,), mode="L")
    save_image(tmp_path / "ant" / "c.PNG", (255, 0, 0), size=(20, 50))
    (tmp_path / "ant" / "notes.txt").write_text("not an image, and not said to be one")
    (tmp_path / "readme.md").write_text("beside the classes")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_digits_are_split_by_class_without_overlap_or_loss() -> None:
    train, test = data.digits(train=True), data.digits(train=False)
    assert (len(train), len(test)) == (1437, 360)
    whole = torch.bincount(torch.cat([train.targets, test.targets]))
    assert whole.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (torch.bincount(test.targets) - whole * 0.2).abs().max() <= 1
    rows = {image.numpy().tobytes() for image in torch.cat([train.images, test.images])}
    assert len(rows) == 1797


def test_digits_come_at_the_size_asked_for_and_normalised() -> None:
    train = data.digits(20)
    image, target = train[5]
    assert image.shape == (1, 20, 20)
    assert image.dtype == torch.float32
    assert 0 <= target < 10
    assert train.images.mean().abs() < 1e-4
    assert abs(train.images.std() - 1) < 1e-4
    assert train.classes == tuple("0123456789")


def test_digits_at_eight_pixels_are_the_scans_themselves() -> None:
    from sklearn.datasets import load_digits

    train = data.digits(8)
    scans = {scan.tobytes() for scan in load_digits().data.astype(np.uint8)}
    low, high = train.images.min(), train.images.max()
    restored = ((train.images - low) / (high - low) * 16).round().to(torch.uint8).flatten(1)
    assert all(row.numpy().tobytes() in scans for row in restored)


def test_digits_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = data.digits(8, seed=3)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(data.digits(8, seed=3).images, first.images)
    assert not torch.equal(data.digits(8, seed=4).images, first.images)


def test_digits_below_their_own_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^image_size: expected at least 8"):
        data.digits(7)


def test_shift_moves_the_image_and_repeats_its_border() -> None:
    image = torch.arange(25.0).reshape(1, 5, 5)
    seen = set()
    torch.manual_seed(0)
    for _ in range(200):
        shifted = data.RandomShift(1)(image)
        row, column = divmod(int(shifted[0, 2, 2]), 5)
        seen.add((row - 2, column - 2))
        rows = (torch.arange(5) + row - 2).clamp(0, 4)
        columns = (torch.arange(5) + column - 2).clamp(0, 4)
        assert torch.equal(shifted, image[:, rows][:, :, columns])
    assert seen == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert torch.equal(data.RandomShift(0)(image), image)


def test_negative_shift_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^pixels: expected zero or more, got -1"):
        data.RandomShift(-1)


def test_folder_has_sorted_classes_and_images_in_a_fixed_order(folder: Path) -> None:
    images = data.image_folder(folder, 16)
    assert images.classes == ("ant", "walrus")
    assert [path.relative_to(folder).as_posix() for path in images.paths] == [
        "ant/c.PNG",
        "walrus/b.png",
        "walrus/deep/a.jpg",
    ]
    assert images.targets == [0, 1, 1]
    assert images.skipped == []
    assert [images[i][1] for i in range(len(images))] == [0, 1, 1]


def test_folder_images_are_rgb_scaled_and_normalised(folder: Path) -> None:
    images = data.image_folder(folder, 16, mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 2.0))
    red, green, grey = (images[i][0] for i in range(3))
    assert red.shape == green.shape == grey.shape == (3, 16, 16)
    torch.testing.assert_close(red, torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1).expand(3, 16, 16))
    torch.testing.assert_close(green, torch.tensor([-1.0, 1.0, 0.0]).reshape(3, 1, 1).expand(3, 16, 16))
    assert grey[1].mean() == pytest.approx(200 / 255, abs=0.01)


def test_folder_images_are_resized_by_the_shorter_side_and_cut_at_the_centre(tmp_path: Path) -> None:
    picture = Image.new("RGB", (80, 40))
    picture.paste((255, 255, 255), (30, 0, 50, 40))
    (tmp_path / "only").mkdir()
    picture.save(tmp_path / "only" / "stripe.png")
    image, _ = data.image_folder(tmp_path, 40, crop_fraction=1.0, mean=(0, 0, 0), std=(1, 1, 1))[0]
    expected = torch.zeros(3, 40, 40)
    expected[:, :, 10:30] = 1
    assert torch.equal(image, expected)


def test_transform_is_applied_to_every_image(folder: Path) -> None:
    plain, doubled = data.image_folder(folder, 16), data.image_folder(folder, 16, transform=lambda image: image * 2)
    assert torch.equal(doubled[1][0], plain[1][0] * 2)


def test_corrupt_images_are_named_and_skipped(folder: Path) -> None:
    (folder / "ant" / "empty.jpg").write_bytes(b"")
    whole = (folder / "walrus" / "b.png").read_bytes()
    (folder / "walrus" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "walrus" / "text.jpeg").write_text("no picture at all")
    with pytest.warns(UserWarning, match=r"skipped 3 unreadable images:(?s:.)*empty\.jpg(?s:.)*cut\.png") as caught:
        images = data.image_folder(folder, 16)
    assert len(caught) == 1
    assert sorted(path.name for path in images.skipped) == ["cut.png", "empty.jpg", "text.jpeg"]
    assert [path.name for path in images.paths] == ["c.PNG", "b.png", "a.jpg"]
    assert all(images[i][0].shape == (3, 16, 16) for i in range(len(images)))


def test_image_that_breaks_later_is_named_when_it_is_read(folder: Path) -> None:
    (folder / "ant" / "c.PNG").write_bytes(b"damaged")
    images = data.image_folder(folder, 16, check=False)
    with pytest.raises(OSError, match=r"c\.PNG: cannot be read as an image"):
        images[0]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^path: the image folder .*nowhere does not exist$"):
        data.image_folder(tmp_path / "nowhere")


def test_file_instead_of_a_folder_is_named(folder: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"got the file .*readme\.md$"):
        data.image_folder(folder / "readme.md")


def test_folder_without_classes_is_named(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^path: expected a sub-folder with images for each class in .*deep, found none$"
    ):
        data.image_folder(folder / "walrus" / "deep")


def test_folder_without_any_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    with pytest.raises(ValueError, match=r"^path: found no image file in the 1 class sub-folders of "):
        data.image_folder(tmp_path)


def test_folder_without_a_readable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "bad.png").write_bytes(b"bad")
    with pytest.warns(UserWarning, match=r"bad\.png"), pytest.raises(ValueError, match="none of the 1 images below"):
        data.image_folder(tmp_path)


@pytest.mark.parametrize(("option", "value"), [("image_size", 0), ("crop_fraction", 0.0), ("crop_fraction", 1.5)])
def test_bad_size_is_refused(folder: Path, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{option}: expected "):
        data.image_folder(folder, **{option: value})


def test_loaders_shuffle_training_batches_and_keep_every_test_image() -> None:
    train, test = data.loaders(data.digits(8, train=True), data.digits(8, train=False), batch_size=100)
    assert [len(targets) for _, targets in train] == [100] * 14
    assert torch.equal(torch.cat([targets for _, targets in test]), data.digits(8, train=False).targets)
    torch.manual_seed(0)
    first = torch.cat([targets for _, targets in train])
    again = torch.cat([targets for _, targets in train])
    torch.manual_seed(0)
    assert torch.equal(torch.cat([targets for _, targets in train]), first)
    assert not torch.equal(again, first)


def test_loader_of_a_set_smaller_than_one_batch_still_gives_it() -> None:
    few = data.ImageDataset(torch.zeros(5, 1, 8, 8), torch.arange(5), classes=tuple("abcde"))
    train, _ = data.loaders(few, few, batch_size=64)
    assert [len(targets) for _, targets in train] == [5]


def test_loaders_with_worker_processes_give_the_same_images(folder: Path) -> None:
    images = data.image_folder(folder, 16, transform=data.RandomShift(0))
    _, test = data.loaders(images, images, batch_size=2, workers=1)
    batches = list(test)
    assert torch.equal(torch.cat([batch for batch, _ in batches]), torch.stack([images[i][0] for i in range(3)]))


@pytest.mark.parametrize(("option", "value"), [("batch_size", 0), ("workers", -1)])
def test_bad_loader_option_is_refused(option: str, value: int) -> None:
    digits = data.digits(8)
    with pytest.raises(ValueError, match=f"^{option}: expected "):
        data.loaders(digits, digits, **{option: value})


def test_images_and_targets_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^targets: expected one for each of the 3 images, got 2"):
        data.ImageDataset(torch.zeros(3, 1, 8, 8), torch.zeros(2), classes=("a",))
