"""Hundreds of small programs are compiled here: compiling has to be fast, running need not be."""

import importlib.metadata
import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in flags:
    flags += " --xla_backend_optimization_level=0"
# The older of two code generators compiles twice as fast; other releases may not have the choice,
# and XLA ends the process over a flag that it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = flags.strip()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what runs experiments; puts the one test of minutes first, so that no worker waits."""
    for item in items:
        if item.path.name.startswith("test_experiments_"):
            item.add_marker("slow")
    items.sort(key=lambda item: "killed_ten_times" not in item.nodeid)
