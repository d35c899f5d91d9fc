"""Maps `pyext/` to `kernelpress` and `kernels/` to `kernelpress.kernels`; everything static stands in `pyproject.toml`."""

from setuptools import find_packages, setup

FOLDERS = {"kernelpress": "pyext", "kernelpress.kernels": "kernels"}

setup(
    version="0.1.0",
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in [name, *(f"{name}.{found}" for found in find_packages(folder))]
    ],
)
