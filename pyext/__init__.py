"""kernelpress: compressed and efficient CNNs, as fast as their FLOP counts promise."""

__version__ = "0.1.0"
