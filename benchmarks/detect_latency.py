"""``weaksam_detect`` over gRPC, one client: where its milliseconds go.

Run ``python -m benchmarks.detect_latency FOLDER_OF_EXPORTED_MODELS``. Blocks of
requests to a real server take turns with blocks of the same work in this process (decode, the
pipeline, the bare engine with the same number of threads), so that whatever else the machine does
disturbs both alike.
"""

import asyncio
import io
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import skimage
import tyro
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from training.engine.stage import git_commit
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.client import ClientConfig, WeakSamClient
from weaksam_rt.client.messages import detect_call
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.images import decode_reduced
from weaksam_rt.model_config import ServingOptions
from weaksam_rt.model_repository import (
    ExportedModels,
    build_model_repository,
    load_exported_models,
    pipeline_models,
)
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.server import EmbeddedServer

_QUANTILES = (0.5, 0.9, 0.99)
_BLOCK = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Milliseconds of one request and of the same work in this process."""

    end_to_end: float
    """``client.detect``: from the JPEG's bytes to detections."""
    encode: float
    """Building the request message."""
    decode: float
    """JPEG to pixels."""
    pipeline: float
    """Pixels to detections in this process, the engine included."""
    engine: float
    """The bare engine inside ``pipeline``."""

    @property
    def beside_the_engine(self) -> float:
        """Everything that the engine does not do."""
        return self.end_to_end - self.engine

    @property
    def serving(self) -> float:
        """What the server costs: gRPC, queues, two hops between processes."""
        return self.end_to_end - self.decode - self.pipeline


class _TimedBackend:
    """A backend of one engine that remembers how long it ran."""

    def __init__(self, engine: OnnxRuntimeModel) -> None:
        self._engine = engine
        self.last_ms = 0.0

    async def infer(
        self, model: str, inputs: Arrays, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        del model
        start = time.perf_counter()
        answer = self._engine(inputs, outputs)
        self.last_ms = 1e3 * (time.perf_counter() - start)
        return answer


def main(
    models: Annotated[Path, tyro.conf.Positional],
    *,
    image: Path | None = None,
    requests: int = 200,
    warm_up: int = 20,
    threads: int = 0,
    output: Path | None = None,
) -> None:
    """Measure and print; with ``output``, also write the result as Markdown.

    Args:
        models: Folder of exported models with a detector.
        image: What is sent; None: a photograph of 640x480.
        requests: Measured rounds, at least 10.
        warm_up: Rounds before them.
        threads: Threads of one operator of the engine, here and in the server; 0: all cores.
        output: Markdown file.
    """
    if requests < 10:
        raise ValueError(f"requests is {requests}, expected at least 10")
    exported = load_exported_models(models)
    data = _picture() if image is None else image.read_bytes()
    rounds = _measure(exported, data, requests=requests, warm_up=warm_up, threads=threads)
    what = "a photograph of 640x480 (scikit-image's astronaut)" if image is None else image.name
    text = _report(rounds, exported, f"{what}, {len(data):,} bytes", threads)
    Console().print(text, markup=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


def _measure(
    exported: ExportedModels, data: bytes, *, requests: int, warm_up: int, threads: int
) -> list[Round]:
    detector = next(a for a in exported.artifacts if a.model == DETECTOR)
    backend = _TimedBackend(OnnxRuntimeModel(detector, num_threads=threads))
    pipeline = WeakSamPipeline(backend, pipeline_models({DETECTOR: detector}), exported.config)
    options = ServingOptions(engine_threads=threads)
    with (
        tempfile.TemporaryDirectory(prefix="weaksam-bench-") as scratch,
        asyncio.Runner() as runner,
    ):
        repository = Path(scratch) / "models"
        build_model_repository(
            [detector], repository, profile="embedded", config=exported.config, options=options
        )
        with (
            EmbeddedServer(repository) as server,
            WeakSamClient(server.grpc_address, ClientConfig(max_attempts=1)) as client,
        ):

            def block() -> list[Round]:
                # Each side in one go: taking turns, each would find the other's data in the caches.
                served = [_milliseconds(lambda: client.detect(data)) for _ in range(_BLOCK)]
                return [_here(data, pipeline, backend, runner, ms) for ms in served]

            for _ in range(warm_up // _BLOCK + 1):
                block()
            num_blocks = -(-requests // _BLOCK)
            blocks = [block() for _ in track(range(num_blocks), "measuring", transient=True)]
            return [one for rounds in blocks for one in rounds]


def _here(
    data: bytes,
    pipeline: WeakSamPipeline,
    backend: _TimedBackend,
    runner: asyncio.Runner,
    end_to_end: float,
) -> Round:
    """The same work in this process."""
    encode = _milliseconds(lambda: detect_call(data))
    side = pipeline.longest_side_seen(with_masks=False)
    decode = _milliseconds(lambda: decode_reduced(data, side))
    image = decode_reduced(data, side)
    detection = pipeline.detect(image.pixels, image_size=image.image_size)
    whole = _milliseconds(lambda: runner.run(detection))
    return Round(
        end_to_end=end_to_end,
        encode=encode,
        decode=decode,
        pipeline=whole,
        engine=backend.last_ms,
    )


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _picture() -> bytes:
    """scikit-image's photograph of an astronaut as a 640x480 JPEG."""
    photograph = Image.fromarray(skimage.data.astronaut())
    file = io.BytesIO()
    photograph.resize((640, 480), box=(0, 0, 512, 384)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _report(rounds: Sequence[Round], exported: ExportedModels, image: str, threads: int) -> str:
    detector = next(a for a in exported.artifacts if a.model == DETECTOR)
    rows = (
        ("end to end over gRPC", [r.end_to_end for r in rounds]),
        ("bare engine", [r.engine for r in rounds]),
        ("**end to end minus bare engine**", [r.beside_the_engine for r in rounds]),
        ("of that: build the request", [r.encode for r in rounds]),
        ("of that: decode the JPEG", [r.decode for r in rounds]),
        ("of that: resize, suppress, frame", [r.pipeline - r.engine for r in rounds]),
        ("of that: gRPC, queues, hops between processes", [r.serving for r in rounds]),
    )
    busy = os.getloadavg()[0]
    lines = [
        "# weaksam_detect over gRPC, one client",
        "",
        f"- {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"load {busy:.1f}, Python {platform.python_version()}, "
        f"ONNX Runtime {onnxruntime.__version__}, engine threads {threads or 'all'}",
        f"- detector {detector.path.parent.name}: {detector.parameters}",
        f"- image: {image}; {len(rounds)} rounds; commit {git_commit()}",
        "- `python -m benchmarks.detect_latency FOLDER_OF_EXPORTED_MODELS`; blocks of "
        f"{_BLOCK} requests take turns with the same work in this process",
        "",
        "| milliseconds | p50 | p90 | p99 |",
        "|---|---|---|---|",
    ]
    for name, values in rows:
        cells = " | ".join(f"{value:.2f}" for value in np.quantile(values, _QUANTILES))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
