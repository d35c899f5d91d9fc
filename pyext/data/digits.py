"""The handwritten digits that ship inside scikit-learn: 1,797 real scans of 8×8 pixels, nothing to download."""

import numpy as np
import torch
import torch.nn.functional as F

from kernelpress.data.dataset import ImageDataset, Transform

__all__ = ["digits"]

_MAX_INTENSITY = 16.0
_TEST_FRACTION = 0.2


def digits(
    image_size: int = 32, *, train: bool = True, seed: int = 0, transform: Transform | None = None
) -> ImageDataset:
    """Scans of handwritten digits, 1,437 for training or the other 360 for testing; images [1, image_size, image_size].

    Upsampled bilinearly and normalised to mean 0 and standard deviation 1 over the training part. The split holds every
    class in equal proportion and depends on `seed` alone. `transform` is applied to each image when it is read.

    Raises `ValueError` for an `image_size` below 8, `ImportError` without scikit-learn.
    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
    """
    if image_size < 8:
        raise ValueError(f"image_size: expected at least 8, the size of the scans, got {image_size}")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digits are part of scikit-learn: pip install 'kernelpress[data]'") from error

    scans, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=_TEST_FRACTION, stratify=labels, random_state=seed)
    images = torch.as_tensor(scans, dtype=torch.float32).reshape(-1, 1, 8, 8) / _MAX_INTENSITY
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=False)
    training_part = images[parts[0]]
    images = (images - training_part.mean()) / training_part.std()
    chosen = np.sort(parts[0] if train else parts[1])
    targets = torch.as_tensor(labels[chosen], dtype=torch.int64)
    return ImageDataset(images[chosen], targets, classes=tuple(str(digit) for digit in range(10)), transform=transform)
