"""Plans: emitted models at fixed shapes, as steps over buffers that no Python stands between."""
