"""Image data sets: the digits that ship inside scikit-learn, and any folder of images in class sub-folders."""

from kernelpress.data.dataset import ImageDataset, RandomShift, Transform, loaders
from kernelpress.data.digits import digits
from kernelpress.data.folder import ImageFolder, image_folder

__all__ = ["ImageDataset", "ImageFolder", "RandomShift", "Transform", "digits", "image_folder", "loaders"]
