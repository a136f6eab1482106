"""Shared set-up of the tests: eight simulated devices, double precision on request, a persistent compilation cache."""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on two busy cores wait long for each other; XLA would abort the process after 40 seconds.
_FLAGS = (
  # Most of the tests' time is compilation of small programs: LLVM may leave them slow.
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
  "--xla_cpu_collective_call_terminate_timeout_seconds=300 --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # Halves XLA's compile time, which is most of the tests' time; results agree to rounding. 0.11 has no such flag.
  _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " " + _FLAGS).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

_CACHE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".cache", "xla")
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_default_matmul_precision", "highest")

# A file goes to one worker as a whole, so that what its tests share is made once; the longest ones must not come last.
_LONGEST_FIRST = ("test_processes.py", "test_stages.py", "test_resume.py", "test_solvers.py", "test_influence.py")


def pytest_collection_modifyitems(items):
  """Long files first, the others as they are collected."""
  places = {name: place for place, name in enumerate(_LONGEST_FIRST)}
  items.sort(key=lambda item: places.get(item.path.name, len(places)))


# Tracing makes many small objects, few of them garbage, which Python would look for at every 700th.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def free_programs():
  """Frees compiled programs when they take many memory maps, of which Linux allows a process 65,530."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
    jax.clear_caches()


@pytest.fixture
def x64():
  """Double precision inside one test."""
  with jax.enable_x64(True):
    yield
