"""Is this folder a model repository that our clients can use? Checked without starting a server.

``config.pbtxt`` is parsed with Triton's own message type and compared with the contracts and with
what the builder would write, so that a config edited by hand cannot drift from what export, server
and client believe. Numbers that an operator may choose (instances, delays, threads, queues) are
free.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from weaksam_rt.artifacts import MANIFEST_NAME, load_artifact
from weaksam_rt.contracts import (
    ENGINE_MODELS,
    MEMBERS_OF_PIPELINE,
    PIPELINE_CONTRACTS,
    PROMPT_CLUSTERING,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    WEAKSAM_DETECT,
    ModelContract,
    Parameters,
    TensorSpec,
)
from weaksam_rt.engine_serving import Profile, serving_difference
from weaksam_rt.errors import ArtifactError
from weaksam_rt.model_config import TRITON_TYPES, ServingOptions
from weaksam_rt.model_repository import (
    CONFIG_NAME,
    PIPELINE_NAME,
    PipelineFile,
    clustering_config_text,
    engine_config_text,
    member_contracts,
    member_parameters,
    passports_text,
    pipeline_config_text,
    read_pipeline_file,
)
from weaksam_rt.pipeline import PipelineModels


def check_model_repository(path: Path, *, with_engines: bool = True) -> list[str]:
    """Every problem found, one sentence each; empty: the repository can be served.

    Args:
        path: The repository, of either profile.
        with_engines: Also verify engine files and manifests; a snapshot under version control has
            none.
    """
    if not path.is_dir():
        return [f"{path} is not a folder"]
    folders = {folder.name: folder for folder in sorted(path.iterdir()) if folder.is_dir()}
    if not folders:
        return [f"{path} holds no models"]
    problems = _check_members(folders)
    for name, folder in folders.items():
        problems += [f"{name}: {problem}" for problem in _check_model(folder, with_engines)]
    return problems


def _check_members(served: Iterable[str]) -> list[str]:
    """Models that a pipeline calls and that are not there; masks are optional for detection."""
    served = set(served)
    optional = {WEAKSAM_DETECT.name: {SAM_IMAGE_ENCODER, SAM_MASK_DECODER}}
    return [
        f"{pipeline}: its member {member} is not in the repository"
        for pipeline, members in MEMBERS_OF_PIPELINE.items()
        if pipeline in served
        for member in members
        if member not in served and member not in optional.get(pipeline, set())
    ]


def _check_model(folder: Path, with_engines: bool) -> list[str]:
    try:
        config = read_model_config(folder / CONFIG_NAME)
    except (OSError, text_format.ParseError) as error:
        return [f"{CONFIG_NAME} cannot be read: {error}"]
    problems = [] if config.name == folder.name else [f"its config calls it {config.name!r}"]
    versions = [p for p in folder.iterdir() if p.is_dir() and p.name.isdigit() and p.name != "0"]
    if not versions and (with_engines or config.backend == "python"):
        problems.append("it has no version folder")
    for version in versions:
        problems += _check_version(folder, version, config, with_engines)
    if versions:
        problems += _check_live_versions(config, [int(version.name) for version in versions])
    return problems + list(_missing_label_files(folder, config))


def _check_live_versions(config: Any, on_disk: Sequence[int]) -> list[str]:
    """Does the config name versions, and are they there?"""
    named = tuple(config.version_policy.specific.versions)
    if not named:
        return ["its config does not name the versions to serve; build the repository again"]
    return [
        f"its config serves version {version}, the folders are {sorted(on_disk)}"
        for version in named
        if version not in on_disk
    ]


def read_model_config(path: Path) -> Any:
    """``config.pbtxt`` as Triton's ``ModelConfig`` message.

    Raises:
        google.protobuf.text_format.ParseError: A field is unknown or ill-formed.
    """
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def _check_version(folder: Path, version: Path, config: Any, with_engines: bool) -> list[str]:
    problems: list[str] = []
    if config.backend == "python" and not (version / "model.py").is_file():
        problems.append(f"version {version.name} has no model.py")
    if folder.name in ENGINE_MODELS and folder.name != PROMPT_CLUSTERING:
        return problems + (_check_engine(folder, version, config) if with_engines else [])
    try:
        file = read_pipeline_file(version / PIPELINE_NAME)
    except ArtifactError as error:
        return [*problems, str(error)]
    contract = _contract_of(folder.name, file.models)
    if contract is None:
        return [*problems, "no pipeline or engine of ours has this name"]
    problems += contract_differences(config, contract) + _check_siblings(folder, file.models)
    if _is_live(version, config):
        problems += _check_called_versions(folder, file, with_engines)
        problems += serving_differences(config, _built_text(folder))
    return problems


def _is_live(version: Path, config: Any) -> bool:
    return int(version.name) in config.version_policy.specific.versions


def _built_text(folder: Path) -> str:
    """What the builder would write for a pipeline or ``prompt_clustering``."""
    if folder.name == PROMPT_CLUSTERING:
        return clustering_config_text(_profile_of(folder.parent), version=1)
    return pipeline_config_text(folder.name, passports_text({}, {}), ServingOptions(), version=1)


def _profile_of(repository: Path) -> Profile:
    """Engines tell: only the ``container`` profile has other backends than Python."""
    for path in repository.glob(f"*/{CONFIG_NAME}"):
        try:
            if read_model_config(path).backend != "python":
                return "container"
        except (OSError, text_format.ParseError):
            continue  # reported for the model itself
    return "embedded"


def _check_engine(folder: Path, version: Path, config: Any) -> list[str]:
    try:
        artifact = load_artifact(version)
    except ArtifactError as error:
        return [str(error)]
    problems = contract_differences(config, artifact.contract)
    if artifact.model != folder.name:
        problems.append(f"its {MANIFEST_NAME} is that of {artifact.model}")
    difference = serving_difference(artifact, backend=config.backend, platform=config.platform)
    if difference is not None:
        problems.append(difference)
    elif _is_live(version, config):
        profile: Profile = "embedded" if config.backend == "python" else "container"
        text = engine_config_text(artifact, profile, ServingOptions(), version=1)
        problems += serving_differences(config, text)
    if config.backend != "python" and config.default_model_filename != artifact.path.name:
        problems.append(f"its config opens {config.default_model_filename!r}, the engine is "
                        f"{artifact.path.name!r}")  # fmt: skip
    return problems


def _check_called_versions(folder: Path, file: PipelineFile, with_engines: bool) -> list[str]:
    """Are the versions that a live pipeline calls served, and are they what it takes them for?"""
    problems = []
    expected = member_parameters(file.models)
    for member, version in file.members.items():
        try:
            config = read_model_config(folder.parent / member / CONFIG_NAME)
        except (OSError, text_format.ParseError):
            continue  # reported for the member itself
        named = list(config.version_policy.specific.versions)
        if version not in named:
            problems.append(f"it calls version {version} of {member}, which serves {named}")
        elif with_engines and member != PROMPT_CLUSTERING:
            problems += _differing_engine(folder.parent / member / str(version), expected[member])
    return problems


def _differing_engine(folder: Path, expected: Parameters | None) -> list[str]:
    try:
        found = load_artifact(folder).parameters
    except ArtifactError:
        return []  # reported for the member itself
    if found == expected:
        return []
    return [
        f"its {PIPELINE_NAME} takes {folder.parent.name} version {folder.name} for {expected}, the "
        f"engine has {found}"
    ]


def _check_siblings(folder: Path, models: PipelineModels) -> list[str]:
    """Do the members' configs have the sizes that this pipeline was built for?"""
    problems = []
    for name, contract in member_contracts(models).items():
        path = folder.parent / name / CONFIG_NAME
        if name in MEMBERS_OF_PIPELINE.get(folder.name, ()) and path.is_file():
            try:
                differences = contract_differences(read_model_config(path), contract)
            except text_format.ParseError:
                differences = []  # reported for the member itself
            problems += [f"its {PIPELINE_NAME} and {name}: {text}" for text in differences]
    return problems


def _contract_of(name: str, models: PipelineModels) -> ModelContract | None:
    return PIPELINE_CONTRACTS.get(name) or member_contracts(models).get(name)


def contract_differences(config: Any, contract: ModelContract) -> list[str]:
    """What a ``ModelConfig`` says otherwise than the contract."""
    problems = []
    if config.max_batch_size != contract.max_batch_size:
        problems.append(
            f"max_batch_size is {config.max_batch_size}, the contract says "
            f"{contract.max_batch_size}"
        )
    for kind, found, specs in (
        ("input", config.input, contract.inputs),
        ("output", config.output, contract.outputs),
    ):
        got = {tensor.name: _described(tensor) for tensor in found}
        expected = {spec.name: _expected(spec) for spec in specs}
        problems += [
            f"{kind} {name} is {got.get(name, 'missing')}, the contract says "
            f"{expected.get(name, 'there is none')}"
            for name in sorted(got.keys() | expected.keys())
            if got.get(name) != expected.get(name)
        ]
    return problems


def serving_differences(config: Any, built_text: str) -> list[str]:
    """What a ``ModelConfig`` says otherwise than the builder about how its model is run.

    Args:
        config: Of the repository.
        built_text: What the builder would write, with any versions and ``ServingOptions``.
    """
    built = text_format.Parse(built_text, model_config_pb2.ModelConfig())
    problems = []
    expected, found = _instances(built), _instances(config)
    # What runs on whatever there is may be bound to the GPU.
    if found not in (expected, {kind.replace("KIND_AUTO", "KIND_GPU") for kind in expected}):
        problems.append(
            f"its instances are {_in_words(found)}, the builder writes {_in_words(expected)}"
        )
    lost = [name for name, is_there in _PARTS.items() if is_there(built) and not is_there(config)]
    lost += [f"parameter {key!r}" for key in built.parameters if key not in config.parameters]
    return problems + [
        f"its config has no {name}, the builder writes one; build the repository again"
        for name in sorted(lost)
    ]


_PARTS: Mapping[str, Callable[[Any], bool]] = {
    "dynamic_batching": lambda config: bool(config.HasField("dynamic_batching")),
    "model_warmup": lambda config: bool(config.model_warmup),
    "queue policy that rejects": lambda config: _rejects(config.dynamic_batching),
}
"""What a config may have, by name."""


def _rejects(batching: Any) -> bool:
    """A request that finds a full queue, or waits too long in it, is answered with an error."""
    policy = batching.default_queue_policy
    return bool(
        policy.timeout_action == policy.REJECT
        and policy.default_timeout_microseconds
        and policy.allow_timeout_override
        and policy.max_queue_size
    )


def _instances(config: Any) -> set[str]:
    """Kind and optimisation profiles of all instances."""
    return {
        group.Kind.Name(group.kind)
        + (f" with profiles {', '.join(group.profile)}" if group.profile else "")
        for group in config.instance_group
    }


def _in_words(instances: set[str]) -> str:
    return " and ".join(sorted(instances)) or "not named"


def _described(tensor: Any) -> str:
    kind = model_config_pb2.DataType.Name(tensor.data_type)
    return f"{kind} {list(tensor.dims)}" + (" optional" if getattr(tensor, "optional", 0) else "")


def _expected(spec: TensorSpec) -> str:
    optional = " optional" if spec.optional else ""
    return f"{TRITON_TYPES[spec.dtype]} {list(spec.shape)}{optional}"


def _missing_label_files(folder: Path, config: Any) -> Iterator[str]:
    for output in config.output:
        if output.label_filename and not (folder / output.label_filename).is_file():
            yield f"{output.label_filename} of its output {output.name} is missing"
