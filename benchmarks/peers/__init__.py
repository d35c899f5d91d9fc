"""Runtimes for whole-model comparisons, each run in a process of its own (`peers.runtimes`)."""
