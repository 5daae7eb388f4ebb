"""Pictures of the tiny engines' world, good and bad, as encoded files."""

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image

from tests.integration.tiny_engines import COLOURS
from training.data.coco import load_coco_folder

SIZE = (240, 320)
BOXES = {"red": (40, 40, 100, 120), "blue": (200, 100, 300, 200)}
"""XYXY, what ``scene`` shows; multiples of 20, the size of a cell of the tiny SAM's embedding."""


def scene(boxes=BOXES, size=SIZE):
    """Coloured rectangles on grey, uint8 [h, w, 3]."""
    image = np.full((*size, 3), 128, np.uint8)
    for name, (x1, y1, x2, y2) in boxes.items():
        image[y1:y2, x1:x2] = COLOURS[name]
    return image


def labelled_scenes(root, names, count=2):
    """``count`` scenes as a data folder, with the boxes, masks and tags of their classes.

    ``names`` are the folder's classes, in the order of their numbers; a scene needs not show all.
    """
    (root / "images").mkdir()
    height, width = SIZE
    images, annotations = [], []
    for number in range(1, count + 1):
        Image.fromarray(scene()).save(root / "images" / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        )
        for name, (x1, y1, x2, y2) in BOXES.items():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": names.index(name) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return load_coco_folder(root)


def encoded(image, kind="PNG", mode="RGB", **options):
    file = io.BytesIO()
    picture = Image.fromarray(image)
    picture = picture.quantize(8) if mode == "P" else picture.convert(mode)
    picture.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(scene())
JPEG = encoded(scene(), "JPEG", quality=95, subsampling=0)


def rotated_by_exif():
    """Stored lying on its side; orientation 6 says: turn it clockwise to see it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(np.rot90(scene()))
    return encoded(stored, "JPEG", quality=95, subsampling=0, exif=exif)


def sixteen_bit():
    file = io.BytesIO()
    Image.fromarray(np.full(SIZE, 40_000, np.uint16)).save(file, "PNG")
    return file.getvalue()


def animated():
    file = io.BytesIO()
    frames = [Image.fromarray(scene()), Image.fromarray(255 - scene())]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


def huge_jpeg_header(side=20_000):
    """A JPEG that says it is ``side`` pixels wide and high, in a few hundred bytes."""
    data = bytearray(encoded(np.zeros((16, 16, 3), np.uint8), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def bomb_png(side=20_000):
    """A true black-and-white PNG of ``side`` pixels: some 50 kB that become 400 MB of grey."""
    row = b"\x00" + bytes((side + 7) // 8)
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
