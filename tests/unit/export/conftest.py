import pytest

from tests.unit.export.toy_models import export_toy_detector


@pytest.fixture(scope="session")
def toy_artifact(tmp_path_factory):
    """``ToyDetector``, exported once."""
    return export_toy_detector(tmp_path_factory.mktemp("models") / "toy")
