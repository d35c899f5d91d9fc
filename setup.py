"""Maps the folders to `kernelpress` and packages in it; `build_native` compiles the native modules."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_native import BuildNative, native_modules  # noqa: E402

FOLDERS = {"kernelpress": "pyext", "kernelpress.kernels": "kernels", "kernelpress.recipes": "recipes"}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in [name, *(f"{name}.{found}" for found in find_packages(folder))]
    ],
    ext_modules=native_modules(ROOT),
    cmdclass={"build_ext": BuildNative},
)
