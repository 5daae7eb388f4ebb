"""The prompt chain for one image inside an engine, where its size and tags are on the GPU.

It is the chain of ``_plan`` for an image of the largest size, with a launch before it that writes
what the host does not know, and one behind it that counts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.preprocessing import longest_side_frame
from weaksam_rt.prompt_clustering._plan import (
    BATCH_COUNTS,
    FRAME_SCALE,
    Buffer,
    Launch,
    Plan,
    Program,
    plan_prompts,
)
from weaksam_rt.prompt_clustering.batch import MAX_IMAGE_SIDE, MapBatch
from weaksam_rt.prompt_clustering.config import EnginePromptConfig
from weaksam_rt.prompt_clustering.device_arrays import DeviceArray, host_array
from weaksam_rt.types import PromptSource

ENGINE_INPUTS = ("maps", "tag_ids", "image_size")
"""What the engine hands over: [passes, n, h, w] float32, [classes] and [2] int32."""
ENGINE_OUTPUTS = (
    "points", "scores", "class_ids", "sources", "sam_points", "sam_labels", "sam_offsets", "counts",
)  # fmt: skip
"""What the kernels write; ``weaksam_rt.contracts.prompted_classifier_contract`` describes it."""
_MIRRORED_PASS = 1
_WRITTEN_ON_GPU = ("map_classes", "image_sizes", "frame_scales")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMaps:
    """Shape of an image's maps: a coarse and a fine one of each class, then cross-attention maps
    of each layer and class. Of two passes the second is mirrored.
    """

    num_passes: int
    num_maps: int
    num_classes: int
    height: int
    width: int

    def __post_init__(self) -> None:
        has_cams = 1 <= self.num_classes <= self.num_maps // 2
        if not has_cams or self.num_maps % self.num_classes:
            raise ValueError(
                "maps must be a coarse, a fine and any number of cross maps of at least one class, "
                f"got {self.num_maps} maps of {self.num_classes} classes"
            )
        if not 1 <= self.num_passes <= 2:
            raise ValueError(f"maps must have 1 or 2 passes, got {self.num_passes}")


def plan_engine_prompts(maps: EngineMaps, config: EnginePromptConfig) -> Plan:
    """Maps of one image to its prompts.

    Args:
        maps: Their shape.
        config: What is the same for all images.

    Returns:
        The program and, as inputs, what the shape alone decides; ``ENGINE_INPUTS`` are the
        engine's.

    Raises:
        KernelLimitError: The maps are too large for the kernels.
    """
    chain = plan_prompts(_largest_image(maps, config.model_size), config.clustering)
    before = Launch(
        kernel="describe_image",
        grid=(1, 1),
        arguments=(
            "tag_ids", "image_size", np.int32(maps.num_classes), np.int32(maps.num_maps),
            np.int32(config.num_classes), np.int32(config.model_size), np.int32(MAX_IMAGE_SIDE),
            *_WRITTEN_ON_GPU, "is_taken",
        ),
    )  # fmt: skip
    behind = Launch(kernel="count_outputs", grid=(1, 1), arguments=("is_taken", "totals", "counts"))
    written = {
        "map_classes": Buffer(shape=(maps.num_maps,), dtype=np.int32),
        "image_sizes": Buffer(shape=(1, 2), dtype=np.int32),
        "frame_scales": Buffer(shape=(1,), dtype=FRAME_SCALE),
        "is_taken": Buffer(shape=(1,), dtype=np.int32),
        "counts": Buffer(shape=(1,), dtype=BATCH_COUNTS),
    }
    return Plan(
        program=Program(
            buffers={**chain.program.buffers, **written},
            launches=(before, *chain.program.launches, behind),
            outputs=ENGINE_OUTPUTS,
        ),
        inputs={
            name: host_array(name, array)
            for name, array in chain.inputs.items()
            if name not in (*_WRITTEN_ON_GPU, "maps")
        },
    )


def _largest_image(maps: EngineMaps, model_size: int) -> MapBatch:
    """An image that no other is larger than, with maps that are nowhere yet."""
    num_classes, num_cross = maps.num_classes, maps.num_maps - 2 * maps.num_classes
    sources: NDArray[np.int32] = np.repeat(
        np.array((PromptSource.COARSE, PromptSource.FINE, PromptSource.CROSS), np.int32),
        [num_classes, num_classes, num_cross],
    )
    return MapBatch(
        maps=DeviceArray(
            address=0,
            shape=(maps.num_passes, maps.num_maps, maps.height, maps.width),
            dtype=np.dtype(np.float32),
            device=None,
            stream=None,
            owner=None,
        ),
        map_images=np.zeros(maps.num_maps, np.int32),
        map_sources=sources,
        map_classes=np.arange(maps.num_maps, dtype=np.int32) % np.int32(num_classes),
        frames=(longest_side_frame((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE), model_size),),
        mirrored_passes=(_MIRRORED_PASS,) if maps.num_passes > _MIRRORED_PASS else (),
    )
