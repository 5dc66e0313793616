"""Hundreds of small programs are compiled here: compiling has to be fast, running need not be."""

import importlib.metadata
import os
import signal
import threading

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where in the source an operation came from is asked of no program here.
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in flags:
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# The older of two code generators compiles twice as fast; other releases may not have the choice,
# and XLA ends the process over a flag that it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = flags.strip()

# A shell starts what runs in the background with interrupts ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def share_contexts(programs: int = 200) -> None:
    """Has JAX lower so many programs of a thread in one context of MLIR's, where it can be told to.

    It makes one for each, which takes longer than all else about a small program.
    """
    try:
        from jax._src.interpreters import mlir

        make = mlir.make_ir_context
    except (ImportError, AttributeError):
        return
    shared = threading.local()

    def reuse():
        if getattr(shared, "left", 0) == 0:
            shared.context, shared.left = make(), programs
        shared.left -= 1
        return shared.context

    mlir.make_ir_context = reuse


share_contexts()


@pytest.fixture
def empty_caches():
    """For tests that count compilations: what hundreds of others left may push theirs out."""
    import jax

    jax.clear_caches()


SLOW_FILES = ("test_experiments_", "test_pretrained_live")
SLOW_TESTS = ("killed_ten_times", "a_quick_run_of_the_experiment")
WHOLE_PROGRAMS = (
    "test_experts",
    "test_notebooks",
    "test_optim_sharded",
    "test_plan",
    "test_program",
)
BRIEF = 3


def pytest_addoption(parser):
    parser.addoption(
        "--brief",
        action="store_true",
        help=f"up to {BRIEF} tests of each file, one case of each, none of whole programs",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks what runs whole experiments, or beside a peer; keeps single cases if asked to."""
    for item in items:
        if item.path.name.startswith(SLOW_FILES) or any(name in item.name for name in SLOW_TESTS):
            item.add_marker("slow")
    # The one test of minutes comes first, so that no worker waits for another.
    items.sort(key=lambda item: "killed_ten_times" not in item.name)
    if config.getoption("brief"):
        first: dict[str, list] = {}  # of each test its first case, by file
        seen = set()
        for item in items:
            test = item.nodeid.split("[")[0]
            if test not in seen and not item.path.name.startswith(WHOLE_PROGRAMS):
                first.setdefault(item.path.name, []).append(item)
            seen.add(test)
        chosen = {
            tests[k * len(tests) // BRIEF] if len(tests) > BRIEF else tests[k]
            for tests in first.values()
            for k in range(min(BRIEF, len(tests)))
        }
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
