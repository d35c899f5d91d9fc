"""Emitted models on disk: an archive that is read without running anything that it holds."""
