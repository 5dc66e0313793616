"""Runnable studies: each a config dataclass and a `main`."""
