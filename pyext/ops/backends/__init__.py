"""Who runs the ops: one module a backend, and how an op's arguments become a kernel's."""
