"""Random models and random calls of them, for `tests/fuzz_models.py`: right, or refused."""
