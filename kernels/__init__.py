"""The kernels of every backend, and `reference`, which says in plain PyTorch what each op means."""
