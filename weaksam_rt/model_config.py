"""The text of a model's ``config.pbtxt``, from its contract.

Pure functions: nothing here reads or writes files. ``weaksam_rt.repository_check`` parses the text
with Triton's own message type and compares it with the contract again.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from weaksam_rt.contracts import ModelContract, TensorSpec
from weaksam_rt.engine_serving import EngineServing

TRITON_TYPES = {
    "BOOL": "TYPE_BOOL",
    "UINT8": "TYPE_UINT8",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "FP32": "TYPE_FP32",
    "BYTES": "TYPE_STRING",
}

THREADS_PARAMETER = "intra_op_num_threads"
"""The key under ``parameters`` that says how many threads one operator of an engine may use."""

PASSPORTS_PARAMETER = "passports"
"""The key under ``parameters`` of a pipeline that says which engines it calls, as JSON."""

_WARM_UP_SIZE = 2
"""What a warm-up request puts where the contract leaves a size open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingOptions:
    """How the served models queue and run; nothing here changes a result."""

    max_queue_size: int = 64
    """Requests that may wait for one pipeline, at least 1; one more is refused at once, so that an
    overload is an answer and not a delay. The engines' queues are bounded by the pipelines'.
    """
    queue_timeout_ms: int = 30_000
    """Longest wait in a pipeline's queue, at least 1; a request may ask for less."""
    max_queue_delay_us: int = 0
    """How long an engine waits for more requests to batch, at least 0. 0: batches form only while
    the engine is busy, which costs a lone client nothing.
    """
    engine_threads: int = 0
    """Threads of an engine on the CPU, at least 0; 0 takes all cores. With more than one, rows of a
    batch run side by side and the weights are held twice; see ``OnnxRuntimeModel``.
    """
    pipeline_instances: int = 2
    """Processes of each pipeline model, at least 2. Each decodes images on its own core. With a
    single one, Triton 2.51 lets a request of a lone client wait for half a second now and then: a
    request that arrives while the process is about to be free does not wake the batcher of a
    queue that has a bound.
    """

    def __post_init__(self) -> None:
        lowest = {
            "max_queue_size": 1,
            "queue_timeout_ms": 1,
            "max_queue_delay_us": 0,
            "engine_threads": 0,
            "pipeline_instances": 2,
        }
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {low}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """What ``config.pbtxt`` says besides the contract."""

    serving: EngineServing
    """Which backend runs it, and on what."""
    engine_file: str | None = None
    """File that the backend itself opens; None for the Python backend."""
    batches_requests: bool
    """Let the server form batches; needs a contract with a batch axis."""
    max_queue_delay_us: int = 0
    queue_is_bounded: bool = False
    """Refuse requests that find a full queue or wait too long in it; see
    ``ServingOptions.pipeline_instances`` for what this asks of ``instances``.
    """
    instances: int = 1
    label_outputs: tuple[str, ...] = ()
    """Outputs that ``labels.txt`` gives names to."""
    warms_up: bool = False
    """Run one request of zeros before the model counts as ready."""
    parameters: tuple[tuple[str, str], ...] = ()
    version: int = 1
    """The version folder that is served."""


def config_text(contract: ModelContract, settings: ModelSettings, options: ServingOptions) -> str:
    """``config.pbtxt`` of one model.

    Raises:
        ValueError: Batching is asked for and the contract has no batch axis.
    """
    if settings.batches_requests and not contract.is_batched:
        raise ValueError(f"{contract.name} has no batch axis; the server cannot form batches")
    blocks = [
        _header(contract, settings),
        _tensors("input", contract.inputs, settings),
        _tensors("output", contract.outputs, settings),
        _instance_group(settings),
        _dynamic_batching(settings, options) if settings.batches_requests else "",
        _warm_up(contract) if settings.warms_up else "",
        *(_parameter(key, value) for key, value in settings.parameters),
    ]
    return "\n".join(block for block in blocks if block) + "\n"


def _header(contract: ModelContract, settings: ModelSettings) -> str:
    lines = [
        f"# {contract.description}",
        "# Written from the model's contract by weaksam_rt.model_repository: edit that, not this.",
        f'name: "{contract.name}"',
        f'backend: "{settings.serving.backend}"',
        *([f'platform: "{settings.serving.platform}"'] if settings.serving.platform else []),
        f"max_batch_size: {contract.max_batch_size}",
        version_policy((settings.version,)),
    ]
    if settings.engine_file is not None:
        lines.append(f'default_model_filename: "{settings.engine_file}"')
    return "\n".join(lines)


def version_policy(versions: Iterable[int]) -> str:
    """The line that names the versions to serve. Folders alone never decide it: one that is being
    written or kept for a way back is not served by accident.
    """
    return f"version_policy {{ specific {{ versions: [ {', '.join(map(str, versions))} ] }} }}"


def with_versions(text: str, versions: Iterable[int]) -> str:
    """A ``config.pbtxt`` that serves ``versions`` and is otherwise the same.

    Raises:
        ValueError: The text has no ``version_policy`` line of ours.
    """
    return _with_line(text, r"version_policy \{ specific .*\}", version_policy(versions))


def with_parameter(text: str, key: str, value: str) -> str:
    """A ``config.pbtxt`` with another value for a parameter that it has.

    Raises:
        ValueError: The text has no such parameter on a line of its own.
    """
    return _with_line(
        text, rf'parameters \{{ key: "{re.escape(key)}" .*\}}', _parameter(key, value)
    )


def with_label_file(text: str, name: str) -> str:
    """A ``config.pbtxt`` whose labelled outputs take their names from another file."""
    return re.sub(r'label_filename: "[^"]*"', f'label_filename: "{name}"', text)


def _with_line(text: str, pattern: str, line: str) -> str:
    changed, count = re.subn(rf"(?m)^{pattern}$", lambda _: line, text)
    if count != 1:
        raise ValueError(
            f"found {count} lines for {line.split('{')[0].strip()}, expected 1; the file was not "
            "written by this version, build the model repository again"
        )
    return changed


def _tensors(kind: str, specs: tuple[TensorSpec, ...], settings: ModelSettings) -> str:
    return f"{kind} [\n" + ",\n".join(_tensor(spec, settings) for spec in specs) + "\n]"


def _tensor(spec: TensorSpec, settings: ModelSettings) -> str:
    lines = [
        f"    # {spec.description}",
        f'    name: "{spec.name}"',
        f"    data_type: {TRITON_TYPES[spec.dtype]}",
        f"    dims: [ {', '.join(map(str, spec.shape))} ]",
    ]
    if spec.optional:
        lines.append("    optional: true")
    if spec.name in settings.label_outputs:
        lines.append('    label_filename: "labels.txt"')
    return "  {\n" + "\n".join(lines) + "\n  }"


def _instance_group(settings: ModelSettings) -> str:
    serving = settings.serving
    # The narrow profiles come first: with the first alone, other batches would be refused.
    numbers = ", ".join(f'"{number}"' for number in range(serving.num_profiles))
    profiles = f" profile: [ {numbers} ]" if numbers else ""
    return (
        f"instance_group [ {{ count: {settings.instances} kind: {serving.instance_kind}{profiles} "
        "} ]"
    )


def _dynamic_batching(settings: ModelSettings, options: ServingOptions) -> str:
    policy = f"""
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {1000 * options.queue_timeout_ms}
    allow_timeout_override: true
    max_queue_size: {options.max_queue_size}
  }}"""
    return f"""dynamic_batching {{
  max_queue_delay_microseconds: {settings.max_queue_delay_us}{
        policy if settings.queue_is_bounded else ""
    }
}}"""


def _warm_up(contract: ModelContract) -> str:
    inputs = "\n".join(_zeros(spec) for spec in contract.inputs)
    batch_size = 1 if contract.is_batched else 0
    return f"""model_warmup [
  {{
    name: "zeros"
    batch_size: {batch_size}
{inputs}
  }}
]"""


def _zeros(spec: TensorSpec) -> str:
    shape = [_WARM_UP_SIZE if size == -1 else size for size in spec.shape]
    dims = ", ".join(map(str, shape))
    return (
        f'    inputs {{ key: "{spec.name}" value {{ data_type: {TRITON_TYPES[spec.dtype]} '
        f"dims: [ {dims} ] zero_data: true }} }}"
    )


def _parameter(key: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'parameters {{ key: "{key}" value {{ string_value: "{escaped}" }} }}'
