import pytest

from tests.unit.weaksam_rt.prompt_kernels.cpu_executor import CpuExecutor, build_kernels
from weaksam_rt.prompt_clustering import _backends


@pytest.fixture
def fresh_backends():
    """Backends are made anew, for this test alone."""
    made = (_backends._executor, _backends._cuda_backend, _backends._auto_backend)
    for cached in made:
        cached.cache_clear()
    yield
    for cached in made:
        cached.cache_clear()


@pytest.fixture(scope="session")
def cpu_kernels(tmp_path_factory):
    """Runs the kernels' plans on the CPU."""
    return CpuExecutor(build_kernels(tmp_path_factory.mktemp("kernels"), "-O2"))
