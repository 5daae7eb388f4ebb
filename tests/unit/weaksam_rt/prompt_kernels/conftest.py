import pytest

from tests.unit.weaksam_rt.prompt_kernels.cpu_executor import CpuExecutor, build_kernels


@pytest.fixture(scope="session")
def cpu_kernels(tmp_path_factory):
    """Runs the kernels' plans on the CPU."""
    return CpuExecutor(build_kernels(tmp_path_factory.mktemp("kernels"), "-O2"))
