"""``make demo``: serve the committed models on a real Triton server and detect on photographs."""

import contextlib
import time
from importlib.resources import as_file, files
from pathlib import Path

import tyro
from rich.console import Console

from weaksam_rt.cli._infer import image_files, report_detections
from weaksam_rt.cli._serve import repository_of
from weaksam_rt.client import WeakSamClient
from weaksam_rt.server import EmbeddedServer

_MODELS = Path("assets/demo_models")
_PHOTOGRAPHS = ("astronaut.png", "camera.png")
"""Photographs inside scikit-image with something in them that the demo detector was taught."""


def main(
    *, images: tuple[Path, ...] = (), output: Path = Path("out/demo"), models: Path = _MODELS
) -> None:
    """Start Triton, detect with masks, write annotated pictures and detections.json, stop Triton.

    Args:
        images: Your own files or folders; without them, photographs that come with
            scikit-image.
        output: Folder for pictures and detections.json.
        models: Folder of exported models.
    """
    console = Console()
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        chosen = image_files(images) if images else _photographs(stack)
        repository = stack.enter_context(repository_of(models))
        with console.status("starting Triton ..."):
            server = stack.enter_context(EmbeddedServer(repository))
        console.print(f"Triton is ready after {time.perf_counter() - start:.1f} s")
        client = stack.enter_context(WeakSamClient(server.grpc_address))
        client.detect(chosen[0], with_masks=True)  # the first call still warms caches
        outcomes = list(client.detect_many(chosen, max_in_flight=1, with_masks=True))
    code = report_detections(outcomes, output=output)
    console.print(f"pictures and detections.json are in {output}/")
    raise SystemExit(code)


def _photographs(stack: contextlib.ExitStack) -> list[Path]:
    folder = files("skimage") / "data"
    return [stack.enter_context(as_file(folder / name)) for name in _PHOTOGRAPHS]


if __name__ == "__main__":
    tyro.cli(main)
