"""Which layers a low precision breaks, and the smallest list of them to keep in float32.

Everything is measured on a CPU: results of lowered nodes are rounded to the precision asked for
(``mixed_precision.emulated``) and fused normalisations are written out, so that an overflow inside
them shows.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from export.agreement import Agreement, agreement, worst
from export.graph_model import GraphModel
from export.mixed_precision import (
    KeepFp32,
    Precision,
    emulated,
    expand_normalizations,
    lower_precision,
    node_names,
    node_of,
)
from export.onnx_graph import element_types, float_output, replace_nodes
from weaksam_rt.backends.base import Arrays

_ALONE = "|alone"
DISTANCE_LIMITS: Mapping[str, float] = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.05}
"""Distance (``Agreement``) up to which a precision is well: some times the rounding of one value,
2^-11 and 2^-8, which adds up over layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFinding:
    """What a precision does to one layer whose inputs are still those of float32."""

    node: str
    op_type: str
    finite: bool
    cosine: float
    """Of its output with float32's; -1 where not finite."""
    error: float
    """Norm of the difference over the norm; inf where not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What the doctor found."""

    model: str
    precision: Precision
    limit: float
    """Largest distance that counts as well."""
    lowered: Agreement
    """Every layer in the precision."""
    treated: Agreement
    """With ``keep`` in float32."""
    keep: tuple[str, ...]
    """Nodes to keep in float32. No one of them can be left out."""
    num_nodes: int
    """Of the graph that could be lowered."""
    findings: tuple[LayerFinding, ...]
    """The layers it hurts most, worst first."""
    trials: int
    """Mixed graphs that were run to find ``keep``."""

    @property
    def is_well(self) -> bool:
        """The precision can be used, with ``keep`` or without."""
        return self.treated.distance <= self.limit

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def diagnose(
    model: onnx.ModelProto,
    name: str,
    inputs: Sequence[Arrays],
    *,
    precision: Precision,
    limit: float | None = None,
) -> Diagnosis:
    """Examine ``model`` and find the smallest treatment.

    Layers are ranked by what the precision does to each alone; the shortest beginning of that
    ranking that heals the model is found by bisection, and then every node that turns out not to be
    needed is taken off it (delta debugging). The result is minimal in that no single node can be
    left out; a smaller list of quite other nodes may exist.

    Args:
        model: A float32 model.
        name: The served model's name; decides how answers are compared.
        inputs: To judge on; real images say most.
        precision: To examine.
        limit: See ``Diagnosis.limit``; None: ``DISTANCE_LIMITS``.
    """
    limit = DISTANCE_LIMITS[precision] if limit is None else limit
    examined = _Examination(model, name, inputs, precision)
    findings = layer_findings(model, inputs[0], precision=precision)

    def heals(nodes: Sequence[str]) -> bool:
        return examined.agreement(frozenset(nodes)).distance <= limit

    keep: Sequence[str] = ()
    if not heals(()):
        ranked = [finding.node for finding in findings]
        keep = minimal(shortest_beginning(ranked, heals), heals)
    return Diagnosis(
        model=name,
        precision=precision,
        limit=limit,
        lowered=examined.agreement(frozenset()),
        treated=examined.agreement(frozenset(keep)),
        keep=tuple(sorted(keep)),
        num_nodes=len(findings),
        findings=findings[:20],
        trials=len(examined.known),
    )


def layer_findings(
    model: onnx.ModelProto, inputs: Arrays, *, precision: Precision
) -> tuple[LayerFinding, ...]:
    """Each layer alone in ``precision`` on float32's activations, worst first."""
    parts = _parts(expand_normalizations(model), node_names(model))
    both = _each_alone(expand_normalizations(model), parts, precision)
    outputs = [part[-1].output[0] for part in parts.values()]
    alone = [f"{name}{_ALONE}" for name in outputs]
    answers = GraphModel(both)(inputs, [*outputs, *alone])
    findings = []
    for (node, part), output, low in zip(parts.items(), outputs, alone, strict=True):
        found = agreement("", {"y": answers[output]}, {"y": answers[low]})
        findings.append(
            LayerFinding(
                node=node,
                op_type=_op_type(part),
                finite=found.finite,
                cosine=found.cosine,
                error=found.distance,
            )
        )
    return tuple(sorted(findings, key=lambda finding: -finding.error))


def shortest_beginning(ranked: Sequence[str], heals: Callable[[Sequence[str]], bool]) -> list[str]:
    """The shortest beginning of ``ranked`` that heals, found by bisection; else all."""
    low, high = 0, len(ranked)  # ranked[:low] does not heal, ranked[:high] is taken to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if heals(ranked[:middle]) else (middle, high)
    return list(ranked[:high])


def minimal(nodes: Sequence[str], heals: Callable[[Sequence[str]], bool]) -> list[str]:
    """``nodes`` without those that it heals without, in halves and then one by one.

    Source:
        Zeller and Hildebrandt, Simplifying and isolating failure-inducing input (2002): ddmin on
        complements.
    """
    kept, size = list(nodes), max(1, len(nodes) // 2)
    while True:
        start, removed = 0, False
        while start < len(kept):
            rest = kept[:start] + kept[start + size :]
            if heals(rest):
                kept, removed = rest, True
            else:
                start += size
        if size == 1 and not removed:
            return kept
        size = max(1, size // 2)


class _Examination:
    """Mixed graphs of one model, each run once on the same inputs."""

    def __init__(
        self, model: onnx.ModelProto, name: str, inputs: Sequence[Arrays], precision: Precision
    ) -> None:
        self._model = expand_normalizations(model)
        self._name = name
        self._inputs = inputs
        self._precision = precision
        reference = GraphModel(lower_precision(model, "fp32"))
        self._expected = [reference(arrays) for arrays in inputs]
        self.known: dict[frozenset[str], Agreement] = {}

    def agreement(self, keep: frozenset[str]) -> Agreement:
        """With the nodes ``keep`` in float32."""
        if keep not in self.known:
            mixed = lower_precision(self._model, self._precision, KeepFp32(nodes=keep))
            run = GraphModel(emulated(mixed))
            pairs = zip(self._expected, self._inputs, strict=True)
            self.known[keep] = worst([agreement(self._name, e, run(x)) for e, x in pairs])
        return self.known[keep]


def _parts(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, list[onnx.NodeProto]]:
    """The nodes of each layer of an expanded graph, in order."""
    parts: dict[str, list[onnx.NodeProto]] = {name: [] for name in names}
    for node in model.graph.node:
        if node_of(node) in parts:
            parts[node_of(node)].append(node)
    types = element_types(model)
    return {
        name: part
        for name, part in parts.items()
        if types.get(part[-1].output[0]) == onnx.TensorProto.FLOAT
    }


def _each_alone(
    model: onnx.ModelProto, parts: Mapping[str, Sequence[onnx.NodeProto]], precision: Precision
) -> onnx.ModelProto:
    """The float32 graph and beside each layer a copy of it in ``precision``, reading float32's
    activations; both outputs of every layer are outputs of the graph.
    """
    originals = frozenset(node_of(node) for node in model.graph.node)
    outputs = {value.name for value in model.graph.output}
    nodes = list(model.graph.node)
    for part in parts.values():
        inner = {name for node in part for name in node.output}
        for node in part:
            twin = copy.deepcopy(node)
            twin.name = f"{_ALONE}{node.name}"  # in front: what is kept goes by the beginning
            twin.input[:] = [f"{n}{_ALONE}" if n in inner else n for n in node.input]
            twin.output[:] = [f"{n}{_ALONE}" for n in node.output]
            nodes.append(twin)
        last = part[-1].output[0]
        wanted = [f"{last}{_ALONE}", *([last] if last not in outputs else [])]
        model.graph.output.extend(float_output(name) for name in wanted)
    replace_nodes(model, nodes)
    return emulated(lower_precision(model, precision, KeepFp32(nodes=originals)))


def _op_type(part: Sequence[onnx.NodeProto]) -> str:
    return part[0].op_type if len(part) == 1 else "Normalization"
