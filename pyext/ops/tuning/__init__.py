"""The fastest tile configuration of a kernel: searched by measuring, stored by device and shape class."""
