"""The committed server configs are what the builder writes for the committed models."""

from pathlib import Path

import pytest

from weaksam_rt.engine_serving import PROFILES
from weaksam_rt.model_repository import load_exported_models, write_repository_snapshot
from weaksam_rt.repository_check import check_model_repository

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "assets" / "demo_models"
SNAPSHOT = ROOT / "triton_models"

pytestmark = pytest.mark.skipif(
    not any(MODELS.glob("*/manifest.json")), reason="no demo models are committed"
)


def texts_of(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_the_committed_configs_are_those_of_the_committed_models(tmp_path, profile):
    exported = load_exported_models(MODELS)
    write_repository_snapshot(
        exported.artifacts, tmp_path / profile, profile=profile, config=exported.config
    )
    written, committed = texts_of(tmp_path / profile), texts_of(SNAPSHOT / profile)
    assert written == committed, "run `make snapshot` and commit triton_models/"


@pytest.mark.parametrize("profile", PROFILES)
def test_the_committed_configs_fulfil_the_contracts(profile):
    assert check_model_repository(SNAPSHOT / profile, with_engines=False) == []
