"""Four virtual CPU devices, strict promotion, real data where it is at hand."""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# Virtual CPU devices share one thread pool; on a small machine a collective waits for threads
# that it holds itself unless the pool is larger than the number of devices.
os.environ.setdefault("NPROC", "16")
# Most programs of the tests run once, and a compiler that optimises works longer than they run.
# Both settings stand in the environment, so that processes that tests start give the same bits.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # lines of ours in each operation
os.environ.setdefault("FLAX_PROFILE", "0")  # names of modules in each operation
# XLA ends a process that gives it a flag of another version. Programs this small are not worth
# splitting among the threads of the compiler.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)

# The first process makes a folder for programs that take long to compile. Its workers, and the
# processes that tests start, find it in the environment.
os.environ["JAX_COMPILATION_CACHE_DIR"] = (
    os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "PYTEST_XDIST_WORKER" in os.environ
    else tempfile.mkdtemp(prefix="dense_jax-tests-")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

import hypothesis
import jax
import pytest

# Tracing makes many objects that live long; to look through them again and again is dear.
gc.set_threshold(200_000, 20, 20)

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=15)
hypothesis.settings.load_profile("fixed")


def pytest_unconfigure():
    """The process that made the folder of programs deletes it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def data_root() -> pathlib.Path:
    """The folder of real labelled images, or a skip that says how to give one."""
    root = os.environ.get("DENSE_JAX_DATA")
    if not root or not pathlib.Path(root).is_dir():
        pytest.skip("set DENSE_JAX_DATA to a folder with camvid/, voc2012_sample/ to run this")
    return pathlib.Path(root)


@pytest.fixture(scope="session")
def weights_root() -> pathlib.Path:
    """The folder of real trained weights, or a skip that says how to give one."""
    data = os.environ.get("DENSE_JAX_DATA")
    root = os.environ.get("DENSE_JAX_WEIGHTS") or (data and f"{data}/../weights")
    if not root or not pathlib.Path(root).is_dir():
        pytest.skip("set DENSE_JAX_WEIGHTS to a folder with retina_unet_drive/ to run this")
    return pathlib.Path(root)


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path_factory, monkeypatch):
    """Prepared datasets and compiled programs of the tests stay out of the user's cache."""
    monkeypatch.setenv("DENSE_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
