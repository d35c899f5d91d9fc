"""Any folder of images in class sub-folders, with unreadable files reported by name and left out."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kernelpress.data.dataset import Sample, Transform

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageFolder", "image_folder"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageFolder(Dataset[Sample]):
    """Images of a folder, decoded when read; made by `image_folder`.

    `paths` and `targets` list the readable images, `classes` the sub-folders' names, `skipped` the files left out.
    """

    def __init__(
        self,
        paths: list[Path],
        targets: list[int],
        *,
        classes: tuple[str, ...],
        skipped: list[Path],
        image_size: int,
        resize_to: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        transform: Transform | None,
    ) -> None:
        self.paths = paths
        self.targets = targets
        self.classes = classes
        self.skipped = skipped
        self.transform = transform
        self._image_size = image_size
        self._resize_to = resize_to
        self._mean = torch.tensor(mean).reshape(3, 1, 1)
        self._std = torch.tensor(std).reshape(3, 1, 1)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        pixels = _read(self.paths[index], self._resize_to, self._image_size)
        image = (pixels - self._mean) / self._std
        if self.transform is not None:
            image = self.transform(image)
        return image, self.targets[index]


def image_folder(
    path: str | os.PathLike[str],
    image_size: int = 224,
    *,
    crop_fraction: float = 0.875,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    transform: Transform | None = None,
    check: bool = True,
) -> ImageFolder:
    """Images below `path/<class>/`, at any depth, as [3, image_size, image_size]; classes are the sorted folder names.

    Each image is converted to RGB, its shorter side resized to `image_size / crop_fraction`, the centre cut out, scaled
    to 0…1 and normalised by `mean` and `std` per channel. With `check` every file is decoded once now; those that
    cannot be are listed in one warning and in `skipped`. Without it, reading such a file raises an `OSError` naming it.

    Raises `FileNotFoundError` or `NotADirectoryError` for a `path` that is no folder, `ValueError` where it has no
    class sub-folder or no readable image.
    """
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction: expected above 0 and at most 1, got {crop_fraction}")
    root = Path(path)
    classes, paths, targets = _list_images(root)
    skipped: list[Path] = []
    if check:
        failures = _find_unreadable(paths)
        if failures:
            shown = "\n".join(f"  {file}: {reason}" for file, reason in failures.items())
            warnings.warn(f"{root}: skipped {len(failures)} unreadable images:\n{shown}", stacklevel=2)
        skipped = list(failures)
        readable = [(file, target) for file, target in zip(paths, targets, strict=True) if file not in failures]
        if not readable:
            raise ValueError(f"path: none of the {len(paths)} images below {root} can be read")
        paths, targets = [file for file, _ in readable], [target for _, target in readable]
    return ImageFolder(
        paths,
        targets,
        classes=classes,
        skipped=skipped,
        image_size=image_size,
        resize_to=round(image_size / crop_fraction),
        mean=mean,
        std=std,
        transform=transform,
    )


def _list_images(root: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    if not root.exists():
        raise FileNotFoundError(f"path: the image folder {root} does not exist")
    if not root.is_dir():
        raise NotADirectoryError(f"path: expected a folder of images, got the file {root}")
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise ValueError(f"path: expected a sub-folder with images for each class in {root}, found none")
    suffixes = _image_suffixes()
    paths: list[Path] = []
    targets: list[int] = []
    for target, folder in enumerate(folders):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        paths += files
        targets += [target] * len(files)
    if not paths:
        raise ValueError(f"path: found no image file in the {len(folders)} class sub-folders of {root}")
    return tuple(folder.name for folder in folders), paths, targets


def _image_suffixes() -> frozenset[str]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images takes Pillow: pip install 'kernelpress[data]'") from error
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def _find_unreadable(paths: list[Path]) -> dict[Path, str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {file: reason for file, reason in zip(paths, pool.map(_reason_unreadable, paths), strict=True) if reason}


def _reason_unreadable(file: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.convert("RGB")
    # Pillow's decoders raise nearly anything on damaged data, struct.error and SyntaxError included.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _read(file: Path, resize_to: int, image_size: int) -> Tensor:
    """The centre of an image, its shorter side resized to `resize_to`: [3, image_size, image_size], 0…1."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:
        raise OSError(f"{file}: cannot be read as an image ({type(error).__name__}: {error})") from error
    scale = resize_to / min(image.size)
    width, height = (max(image_size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    image = image.crop((left, top, left + image_size, top + image_size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
