"""Image data sets in memory, random shifts of an image, and the loaders of a training and a test set."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["ImageDataset", "RandomShift", "Sample", "Transform", "loaders"]

Transform = Callable[[Tensor], Tensor]
Sample = tuple[Tensor, int]


class ImageDataset(Dataset[Sample]):
    """Images held in memory: `images` [N, C, H, W] with `targets` [N], indices into `classes`.

    Raises `ValueError` where their lengths differ.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, *, classes: tuple[str, ...], transform: Transform | None = None
    ) -> None:
        if len(images) != len(targets):
            raise ValueError(f"targets: expected one for each of the {len(images)} images, got {len(targets)}")
        self.images = images
        self.targets = targets
        self.classes = classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.targets[index])


@dataclass(frozen=True)
class RandomShift:
    """A transform that moves an image [C, H, W] by up to `pixels` in each direction and repeats its border.

    The shift is drawn from torch's default generator.
    """

    pixels: int

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(f"pixels: expected zero or more, got {self.pixels}")

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        top, left = torch.randint(0, 2 * self.pixels + 1, (2,)).tolist()
        padded = F.pad(image[None], (self.pixels,) * 4, mode="replicate")[0]
        return padded[:, top : top + height, left : left + width]


def loaders(
    train: Dataset[Sample], test: Dataset[Sample], *, batch_size: int = 64, workers: int = 0
) -> tuple[DataLoader[Sample], DataLoader[Sample]]:
    """Loaders of (training, test) batches: images [batch_size, C, H, W] and targets [batch_size].

    Training batches are shuffled by torch's default generator and all of full size, unless the set is smaller than one
    batch; test batches come in order and cover the whole set. `workers` is the number of processes for each loader.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers: expected zero or more, got {workers}")
    count = len(train)  # type: ignore[arg-type]
    pin_memory = torch.cuda.is_available()
    return (
        DataLoader(
            train,
            batch_size=batch_size,
            shuffle=True,
            drop_last=count >= batch_size,
            num_workers=workers,
            pin_memory=pin_memory,
        ),
        DataLoader(test, batch_size=batch_size, num_workers=workers, pin_memory=pin_memory),
    )
