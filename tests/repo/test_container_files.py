"""The Dockerfile and the compose file agree with the code and with each other; nothing is built."""

import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import weaksam_rt.server
from weaksam_rt.cli._serve import serve
from weaksam_rt.engine_serving import CONTAINER_IMAGE, CONTAINER_PYTHON
from weaksam_rt.repository_check import read_model_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "triton_models"


@pytest.fixture(scope="module")
def instructions():
    """(keyword, rest) of each instruction of the Dockerfile."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.fixture(scope="module")
def service():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["triton"]


def rest_of(instructions, keyword):
    return [rest for word, rest in instructions if word == keyword]


def test_the_image_is_the_one_that_the_code_names(instructions):
    assert rest_of(instructions, "FROM") == [CONTAINER_IMAGE]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(CONTAINER_PYTHON)


def test_what_is_copied_is_there_and_is_all_that_the_wheel_needs(instructions):
    sources = [name for rest in rest_of(instructions, "COPY") for name in rest.split()[:-1]]
    for name in sources:
        assert (ROOT / name).exists(), name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {*wheel, project["project"]["readme"], "pyproject.toml"} <= set(sources)


def test_numpy_is_the_one_that_the_server_extra_asks_for(instructions):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {Requirement(text) for text in project["optional-dependencies"]["server"]}
    numpy = next(requirement for requirement in wanted if requirement.name == "numpy")
    (installed,) = re.findall(r"'(numpy[^']*)'", " ".join(rest_of(instructions, "RUN")))
    assert Requirement(installed) == numpy


def test_the_server_is_told_what_the_embedded_one_is_told(instructions):
    command = json.loads(rest_of(instructions, "CMD")[0])
    assert command[0] == "tritonserver"
    embedded = inspect.getsource(weaksam_rt.server._command)
    for flag in command[1:]:
        name, _, value = flag.partition("=")
        assert name in embedded, flag
        if name in ("--metrics-config", "--model-control-mode"):
            assert flag in embedded
        if name == "--load-model":
            assert value == "*"


def test_memory_is_kept_as_in_the_embedded_server(instructions):
    environment = dict(pair.split("=") for pair in " ".join(rest_of(instructions, "ENV")).split())
    assert weaksam_rt.server._MALLOC.items() <= environment.items()


def test_the_models_lie_where_the_server_looks(instructions, service):
    (volume,) = service["volumes"]
    target = volume.rsplit(":", 2)[-2]
    command = json.loads(rest_of(instructions, "CMD")[0])
    assert f"--model-repository={target}" in command
    assert volume.endswith(":ro")


def test_the_ports_are_those_of_weaksam_serve(instructions, service):
    defaults = {
        parameter.default
        for name, parameter in inspect.signature(serve).parameters.items()
        if name.endswith("_port")
    }
    assert {int(port) for port in rest_of(instructions, "EXPOSE")[0].split()} == defaults
    published = [port.split(":") for port in service["ports"]]
    assert {int(outside) for _, outside, _ in published} == defaults
    assert all(host == "127.0.0.1" and outside == inside for host, outside, inside in published)


def test_the_health_check_asks_what_the_embedded_launcher_asks(service):
    (url,) = [word for word in service["healthcheck"]["test"] if word.startswith("http")]
    port = inspect.signature(serve).parameters["http_port"].default
    assert url == f"http://127.0.0.1:{port}/v2/health/ready"
    assert "/v2/health/ready" in inspect.getsource(weaksam_rt.server.EmbeddedServer)


def test_compose_builds_this_dockerfile_from_this_repository(service):
    context = (FOLDER / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).samefile(FOLDER / "Dockerfile")


def test_requests_in_flight_have_time_before_the_container_is_killed(instructions, service):
    command = json.loads(rest_of(instructions, "CMD")[0])
    (flag,) = [word for word in command if word.startswith("--exit-timeout-secs=")]
    assert int(service["stop_grace_period"].removesuffix("s")) > int(flag.split("=")[1])


def test_every_committed_config_of_the_profile_uses_a_backend_of_the_image():
    backends = {read_model_config(path).backend for path in FOLDER.glob("container/*/config.pbtxt")}
    assert backends == {"python", "onnxruntime"}
