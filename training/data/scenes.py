"""Generated scenes: textured shapes on cluttered backgrounds, with exact instance masks.

A class is a *shape*. Colour and texture come from one distribution for shapes, clutter and
background, so nothing but the outline tells a class. Scene ``i`` depends on (seed, i) only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
"""float32 [h, w, 3], RGB in [0, 255]."""
Contours = tuple[NDArray[np.float64], ...]
"""Closed outlines, each [n, 2] (x, y), in a frame where the shape fills about [-1, 1]. Where
outlines overlap, an even number of them is outside."""

_SUBPIXEL_BITS = 6
_CIRCLE = 72
"""Vertices of a full circle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneConfig:
    """How a scene may look."""

    min_side: int = 224
    """Shortest image side, pixels."""
    max_side: int = 320
    """Longest image side, pixels."""
    max_instances: int = 5
    """Instances in one scene, at least 1."""
    max_tags: int = 3
    """Different classes in one scene, at least 1."""
    min_radius: float = 0.13
    """Smallest radius of a shape, as a share of the image's shorter side, in (0, 0.5)."""
    max_radius: float = 0.36
    """Largest radius of a shape, as a share of the image's shorter side, in (0, 0.5)."""
    min_visible: float = 0.55
    """Share of each instance that must stay visible, in [0, 1]."""
    max_clutter: int = 14
    """Strokes and blobs in the background that are no class."""
    min_contrast: float = 45.0
    """Least distance between the mean colours of a shape and of what it covers, 0 to 255."""

    def __post_init__(self) -> None:
        if not 32 <= self.min_side <= self.max_side:
            raise ValueError(
                f"sides must satisfy 32 <= min_side <= max_side; got {self.min_side} and "
                f"{self.max_side}"
            )
        if not 0 < self.min_radius <= self.max_radius < 0.5:
            raise ValueError(
                "radii must satisfy 0 < min_radius <= max_radius < 0.5; got "
                f"{self.min_radius} and {self.max_radius}"
            )
        if min(self.max_instances, self.max_tags) < 1:
            raise ValueError("max_instances and max_tags must be at least 1")
        if not 0 <= self.min_visible <= 1:
            raise ValueError(f"min_visible must lie in [0, 1]; got {self.min_visible}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One picture with what is in it."""

    image: NDArray[np.uint8]
    """RGB [h, w, 3]."""
    masks: NDArray[np.bool_]
    """[n, h, w]: the visible pixels of each instance; masks do not overlap."""
    labels: NDArray[np.int64]
    """[n]: positions in ``SCENE_CLASSES``."""
    jpeg_quality: int
    """The compression that belongs to this scene's look, 0 to 100."""


def render_scene(seed: int, index: int, config: SceneConfig | None = None) -> Scene:
    """Draw scene ``index`` of the endless set ``seed``; equal arguments give equal pixels.

    Args:
        seed: Non-negative; chooses the set.
        index: Non-negative; chooses the scene.
        config: None means the defaults.
    """
    config = config or SceneConfig()
    rng = np.random.default_rng([seed, index])
    sides = rng.integers(config.min_side, config.max_side + 1, size=2)
    height, width = int(sides[0]), int(sides[1])
    canvas = _background(rng, height, width, config)
    covers, labels = _place_instances(rng, height, width, config)
    for cover in covers:
        _paint_shape_(rng, canvas, cover, config.min_contrast)
    masks = _visible(covers)
    return Scene(
        image=_photograph(rng, canvas),
        masks=masks,
        labels=np.array(labels, dtype=np.int64),
        jpeg_quality=int(rng.integers(70, 96)),
    )


# --- shapes -------------------------------------------------------------------------------------


def _arc(radius: float, start: float, stop: float, num: int = _CIRCLE) -> NDArray[np.float64]:
    angle = np.linspace(start, stop, num)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _disc(rng: np.random.Generator) -> Contours:
    return (_arc(1.0, 0.0, 2 * math.pi),)


def _ring(rng: np.random.Generator) -> Contours:
    return (_arc(1.0, 0.0, 2 * math.pi), _arc(rng.uniform(0.45, 0.65), 0.0, 2 * math.pi))


def _triangle(rng: np.random.Generator) -> Contours:
    return (1.1 * _arc(1.0, 0.0, 2 * math.pi, 4)[:3],)


def _square(rng: np.random.Generator) -> Contours:
    return (1.1 * _arc(1.0, 0.0, 2 * math.pi, 5)[:4],)


def _star(rng: np.random.Generator) -> Contours:
    spokes = 5
    outline = _arc(1.15, 0.0, 2 * math.pi, 2 * spokes + 1)[: 2 * spokes].copy()
    outline[1::2] *= rng.uniform(0.38, 0.48)
    return (outline,)


def _cross(rng: np.random.Generator) -> Contours:
    a = rng.uniform(0.24, 0.36)
    corner = np.array([[a, a], [a, 1], [-a, 1]])
    turns = [corner @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return (np.concatenate(turns),)


def _crescent(rng: np.random.Generator) -> Contours:
    """A disc minus a disc of radius r moved right by d."""
    r, d = rng.uniform(0.78, 0.9), rng.uniform(0.45, 0.6)
    x = (1 - r * r + d * d) / (2 * d)
    outer, inner = math.acos(x), math.acos((x - d) / r)
    outside = _arc(1.0, outer, 2 * math.pi - outer)
    inside = _arc(r, 2 * math.pi - inner, inner) + np.array([d, 0.0])
    return (np.concatenate([outside, inside]) + np.array([0.3, 0.0]),)


def _heart(rng: np.random.Generator) -> Contours:
    t = np.linspace(0, 2 * math.pi, _CIRCLE)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return (np.stack([x, -y - 2.5], axis=1) / 16.0,)


_SHAPES: dict[str, Callable[[np.random.Generator], Contours]] = {
    "disc": _disc,
    "ring": _ring,
    "triangle": _triangle,
    "square": _square,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
}
SCENE_CLASSES: tuple[str, ...] = tuple(_SHAPES)
"""Class names in label order."""


def _blob(rng: np.random.Generator) -> Contours:
    """A wavy outline that is none of the classes."""
    angle = np.linspace(0, 2 * math.pi, 60)
    radius = np.full_like(angle, 0.75)
    for order in range(2, 7):
        radius += rng.normal(0, 0.28 / order) * np.cos(order * angle + rng.uniform(0, 7))
    return (np.maximum(radius, 0.15)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1),)


def _fill(contours: Contours, transform: NDArray[np.float64], height: int, width: int) -> Pixels:
    """Coverage in [0, 1], [h, w], of the outlines after a 2x3 affine ``transform`` to pixels."""
    scale = 1 << _SUBPIXEL_BITS
    points: list[Any] = [
        np.round((outline @ transform[:, :2].T + transform[:, 2]) * scale).astype(np.int32)
        for outline in contours
    ]
    cover = np.zeros((height, width), dtype=np.uint8)
    cv2.fillPoly(cover, points, color=(255,), lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)
    return cover.astype(np.float32) / 255


def _random_pose(
    rng: np.random.Generator, radius: float, height: int, width: int
) -> NDArray[np.float64]:
    """Elongate, shear a little, rotate, move: [2, 3]."""
    aspect = math.exp(rng.uniform(-0.28, 0.28))
    stretch = np.array([[aspect, rng.uniform(-0.15, 0.15)], [0.0, 1 / aspect]])
    angle = rng.uniform(0, 2 * math.pi)
    cosine, sine = math.cos(angle), math.sin(angle)
    linear = radius * np.array([[cosine, -sine], [sine, cosine]]) @ stretch
    margin = 0.7 * radius
    centre = [rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)]
    return np.concatenate([linear, np.array(centre)[:, None]], axis=1)


def _place_instances(
    rng: np.random.Generator, height: int, width: int, config: SceneConfig
) -> tuple[list[Pixels], list[int]]:
    """Coverages [h, w] in painting order, and labels. A later shape may hide part of an earlier
    one, never most of it; a shape for which no place is found is left out.
    """
    num_tags = int(rng.integers(1, min(config.max_tags, config.max_instances) + 1))
    tags = rng.choice(len(SCENE_CLASSES), size=num_tags, replace=False)
    num = int(rng.integers(num_tags, config.max_instances + 1))
    wanted = [*tags, *rng.choice(tags, size=num - num_tags)]
    # Many shapes are smaller shapes, so that they fit.
    crowding = 1.0 / math.sqrt(max(1.0, num / 2))
    covers: list[Pixels] = []
    labels: list[int] = []
    for label in wanted:
        contours = _SHAPES[SCENE_CLASSES[int(label)]](rng)
        for _ in range(12):
            share = rng.uniform(config.min_radius, config.max_radius)
            radius = max(share * crowding, config.min_radius) * min(height, width)
            cover = _fill(contours, _random_pose(rng, radius, height, width), height, width)
            if _fits(covers, cover, radius, config.min_visible):
                covers.append(cover)
                labels.append(int(label))
                break
    return covers, labels


def _fits(covers: list[Pixels], cover: Pixels, radius: float, min_visible: float) -> bool:
    # The smallest shape (a thin crescent) covers about 0.8 radius^2 when it lies inside the image.
    if (cover > 0.5).sum() < 0.6 * radius * radius:
        return False
    whole = [(c > 0.5).sum() for c in covers]
    visible = _visible([*covers, cover])[:-1].sum(axis=(1, 2))
    return all(v >= min_visible * w for v, w in zip(visible, whole, strict=True))


def _visible(covers: list[Pixels]) -> NDArray[np.bool_]:
    """[n, h, w]: what later shapes leave of each."""
    masks = np.stack([cover > 0.5 for cover in covers])
    hidden = np.zeros(masks.shape[1:], dtype=bool)
    for index in range(len(masks) - 1, -1, -1):
        masks[index] &= ~hidden
        hidden |= masks[index]
    return masks


# --- surfaces -----------------------------------------------------------------------------------


def _colour(rng: np.random.Generator) -> Pixels:
    """A mild random colour: saturated ones are rarer than greyish ones."""
    hue = rng.uniform(0, 255, size=3)
    return (hue.mean() + (hue - hue.mean()) * rng.uniform(0.3, 1.0)).astype(np.float32)


def _noise(rng: np.random.Generator, height: int, width: int, cell: float, depth: int) -> Pixels:
    """Smooth noise with features of about ``cell`` pixels, about N(0, 1), [h, w, depth]."""
    rows, columns = max(2, math.ceil(height / cell) + 1), max(2, math.ceil(width / cell) + 1)
    coarse = rng.standard_normal((rows, columns, depth), dtype=np.float32)
    resized: Any = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return resized.reshape(height, width, depth)


def _waves(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """One plane wave in [-1, 1], [h, w, 1]: the material of stripes and checks."""
    angle, period = rng.uniform(0, math.pi), rng.uniform(7, 32)
    y, x = np.ogrid[:height, :width]
    phase = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
    wave = np.sin(phase + rng.uniform(0, 7)).astype(np.float32)
    sharp: Pixels = np.clip(wave * rng.uniform(1.0, 5.0), -1, 1)[..., None]
    return sharp


def _texture(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """A random surface: base colour, gradient, noise at two scales, often a pattern."""
    base, other = _colour(rng), _colour(rng)
    difference = other - base
    kind = rng.choice(["plain", "stripes", "checks", "patches"], p=[0.4, 0.2, 0.15, 0.25])
    surface = np.broadcast_to(base, (height, width, 3)).astype(np.float32)
    strength = rng.uniform(0.2, 0.6)
    if kind == "stripes":
        surface = surface + strength * 0.5 * (1 + _waves(rng, height, width)) * difference
    elif kind == "checks":
        checks = _waves(rng, height, width) * _waves(rng, height, width)
        surface = surface + strength * 0.5 * (1 + checks) * difference
    elif kind == "patches":
        patches = _noise(rng, height, width, rng.uniform(10, 40), 1)
        surface = surface + strength * np.clip(0.5 + 2 * patches, 0, 1) * difference
    surface = surface + _ramp(rng, height, width) * rng.uniform(0, 45)
    surface = surface + _noise(rng, height, width, rng.uniform(15, 60), 3) * rng.uniform(2, 14)
    return surface + _noise(rng, height, width, rng.uniform(1.5, 5), 1) * rng.uniform(1, 12)


def _ramp(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """A linear gradient of random direction in about [-1, 1], [h, w, 1]."""
    angle = rng.uniform(0, 2 * math.pi)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    return (math.cos(angle) * x + math.sin(angle) * y)[..., None]


# --- the picture --------------------------------------------------------------------------------


def _background(rng: np.random.Generator, height: int, width: int, config: SceneConfig) -> Pixels:
    canvas = _texture(rng, height, width)
    if rng.random() < 0.4:  # a second surface: a horizon, a wall, a table
        edge = _ramp(rng, height, width)[..., 0] + 0.1 * _noise(rng, height, width, 60.0, 1)[..., 0]
        side = 1 / (1 + np.exp(-np.clip((edge - rng.uniform(-0.5, 0.5)) * 60, -30, 30)))
        canvas = _blend(canvas, _texture(rng, height, width), side.astype(np.float32))
    for _ in range(int(rng.integers(2, config.max_clutter + 1))):
        if rng.random() < 0.55:
            _paint_stroke_(rng, canvas)
        else:
            radius = rng.uniform(0.03, 0.2) * min(height, width)
            pose = _random_pose(rng, radius, height, width)
            _paint_shape_(rng, canvas, _fill(_blob(rng), pose, height, width), 0.0)
    return canvas


def _paint_stroke_(rng: np.random.Generator, canvas: Pixels) -> None:
    """Draw a bent line of random colour and width, partly transparent."""
    height, width = canvas.shape[:2]
    steps = np.cumsum(rng.normal(0, 0.25, size=(14, 1)), axis=0) + rng.uniform(0, 7)
    moves = np.concatenate([np.cos(steps), np.sin(steps)], axis=1) * rng.uniform(4, 24)
    points = np.cumsum(moves, axis=0) + rng.uniform([0, 0], [width, height])
    thickness, opacity, colour = int(rng.integers(1, 7)), rng.uniform(0.4, 0.95), _colour(rng)
    left, top = np.clip(points.min(axis=0) - 6, 0, [width, height]).astype(int)
    right, bottom = np.clip(points.max(axis=0) + 7, 0, [width, height]).astype(int)
    if left >= right or top >= bottom:
        return
    cover = np.zeros((bottom - top, right - left), dtype=np.uint8)
    line: Any = np.round(points - [left, top]).astype(np.int32)
    cv2.polylines(cover, [line], False, (255,), thickness, cv2.LINE_AA)
    alpha = cover.astype(np.float32) * (opacity / 255)
    part = canvas[top:bottom, left:right]
    part[...] = _blend(part, colour, alpha)


def _paint_shape_(
    rng: np.random.Generator, canvas: Pixels, cover: Pixels, min_contrast: float
) -> None:
    """Lay a textured, lightly shaded shape over the canvas; the edge may be soft."""
    inside = cover > 0.5
    if not inside.any():
        return
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    top, bottom = max(0, rows[0] - 5), min(cover.shape[0], rows[-1] + 6)
    left, right = max(0, columns[0] - 5), min(cover.shape[1], columns[-1] + 6)
    part, old = cover[top:bottom, left:right], canvas[top:bottom, left:right]
    surface = _contrasting_texture(rng, old, part, min_contrast)
    if rng.random() < 0.3:  # a darker or lighter rim
        width = 2 * int(rng.integers(1, 4)) + 1
        rim = part - cv2.erode(part, np.ones((width, width), np.uint8))
        surface = surface + (rim * rng.uniform(-60, 60))[..., None]
    alpha: Any = cv2.GaussianBlur(part, (0, 0), rng.uniform(0.3, 1.1))
    if rng.random() < 0.35:  # a soft shadow
        shadow = cv2.GaussianBlur(np.roll(part, rng.integers(1, 5, size=2), (0, 1)), (0, 0), 3)
        old *= (1 - 0.4 * shadow)[..., None]
    old[...] = _blend(old, surface, alpha)


def _contrasting_texture(
    rng: np.random.Generator, old: Pixels, part: Pixels, min_contrast: float
) -> Pixels:
    inside = part > 0.5
    below = old[inside].mean(axis=0)
    surface = _texture(rng, *part.shape)
    for _ in range(8):
        if np.abs(np.clip(surface[inside], 0, 255).mean(axis=0) - below).max() >= min_contrast:
            break
        surface = _texture(rng, *part.shape)
    return surface


def _blend(old: Pixels, new: Pixels, alpha: Pixels) -> Pixels:
    return old + alpha[..., None] * (new - old)


def _photograph(rng: np.random.Generator, canvas: Pixels) -> NDArray[np.uint8]:
    """Light, exposure, blur and sensor noise."""
    height, width = canvas.shape[:2]
    light = 1 + rng.uniform(0, 0.3) * _ramp(rng, height, width)
    image: Any = np.clip(canvas * light, 0, 255)
    image = 255 * cv2.pow(image / 255, rng.uniform(0.75, 1.3))
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2))
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0, 7)
    exposed: NDArray[np.uint8] = np.clip(np.round(image + noise), 0, 255).astype(np.uint8)
    return exposed
