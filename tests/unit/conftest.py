import pytest

from tests.unit.weaksam_rt.prompt_kernels.cpu_executor import build_cpu_driver
from weaksam_rt import cuda_driver
from weaksam_rt.prompt_clustering import _backends, tensorrt_plugin


@pytest.fixture
def fresh_backends():
    """Backends are made anew, for this test alone."""
    made = (
        _backends.kernel_executor,
        _backends._cuda_backend,
        _backends._auto_backend,
        tensorrt_plugin._constants_of,
    )
    for cached in made:
        cached.cache_clear()
    yield
    for cached in made:
        cached.cache_clear()


@pytest.fixture(scope="session")
def cpu_driver(tmp_path_factory):
    return build_cpu_driver(tmp_path_factory.mktemp("driver"), "-O2")


@pytest.fixture
def stand_in(cpu_driver, monkeypatch, fresh_backends):
    """The driver's stand-in, in place of the driver."""
    monkeypatch.setattr(cuda_driver, "open_driver", lambda: cpu_driver)
    return cpu_driver
