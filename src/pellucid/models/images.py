"""From pictures to what a vision tower reads, as `preprocessor_config.json` says (equal to transformers' `CLIPImageProcessor`):
RGB, bicubic to the short side, the square in the middle, rescaled, normalised. Needs Pillow: pip install "pellucid[vision]".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import BadInput
from pellucid.tokenizers.reading import read_json

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Image = Union[str, os.PathLike[str], np.ndarray, Tensor, "Picture"]
"""A file, a Pillow image, or uint8 numbers (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images


@dataclass(frozen=True)
class Preprocess:
    """size: the short side, or (height, width); crop: (height, width) from the middle; None: no such step."""

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...] | None = MEAN
    std: tuple[float, ...] | None = STD
    scale: float | None = 1 / 255
    resample: int = 3  # Pillow's number of the filter: bicubic

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """(N, 3, H, W) float32"""
        return torch.from_numpy(np.stack([self.one(image) for image in images]))

    def one(self, image: Image) -> np.ndarray:
        pixels = rgb(image)
        if self.size is not None:
            pixels = resized(pixels, self.size, self.resample)
        if self.crop is not None:
            pixels = cropped(pixels, self.crop)
        x = pixels.transpose(2, 0, 1)
        x = x.astype(np.float32) if self.scale is None else (x.astype(np.float64) * self.scale).astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
            x = (x - mean) / std
        return np.ascontiguousarray(x)


def clip_preprocess(image: int) -> Preprocess:
    """What CLIP was trained with, for a tower of `image` x `image` pixels."""
    return Preprocess(image, (image, image))


def read_preprocess(folder: Path, image: int) -> Preprocess:
    """What the folder says; CLIP's own steps where it says nothing."""
    fields = read_json(folder / "preprocessor_config.json")
    if fields is None:  # transformers 5 may keep it inside the processor's
        fields = (read_json(folder / "processor_config.json") or {}).get("image_processor")
    if fields is None:
        return clip_preprocess(image)
    if not isinstance(fields, dict):
        raise BadInput(f"{folder / 'preprocessor_config.json'} holds no object", next="fetch the folder again")

    def step(name: str, value: Any) -> Any:
        return value if fields.get(name, True) else None

    size, crop = fields.get("size", image), fields.get("crop_size", image)
    return Preprocess(
        step("do_resize", short_or_both(size)), step("do_center_crop", both(crop, "crop_size")),
        step("do_normalize", numbers(fields, "image_mean", MEAN)), step("do_normalize", numbers(fields, "image_std", STD)),
        step("do_rescale", float(fields.get("rescale_factor", 1 / 255))), whole(fields.get("resample", 3), "resample", 0, 5))


def short_or_both(size: Any) -> int | tuple[int, int]:
    if isinstance(size, dict) and "shortest_edge" in size:
        if size.get("longest_edge"):
            raise BadInput("preprocessor_config.json bounds the longest edge", "only CLIP's way to resize is known")
        size = size["shortest_edge"]
    return both(size, "size") if isinstance(size, dict) else whole(size, "size", 1, 2**14)


def both(size: Any, name: str) -> tuple[int, int]:
    if not isinstance(size, dict):
        size = {"height": size, "width": size}
    return whole(size.get("height"), name, 1, 2**14), whole(size.get("width"), name, 1, 2**14)


def whole(value: Any, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadInput(f"preprocessor_config.json: {name} is {value!r:.60}", f"it must be a whole number from {low} to {high}")
    return value


def numbers(fields: dict[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = fields.get(name, default)
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise BadInput(f"preprocessor_config.json: {name} is {values!r:.60}", "it must be three numbers")
    return tuple(map(float, values))


def pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise BadInput("pictures need Pillow, which is not installed", next='pip install "pellucid[vision]"') from error
    return PIL.Image


def upright(picture: Any) -> Any:
    """Turned as the camera says it was held."""
    import PIL.ImageOps

    return PIL.ImageOps.exif_transpose(picture)


def rgb(image: Image) -> np.ndarray:
    """(H, W, 3) uint8; what is transparent becomes white."""
    Pictures = pillow()
    picture: Any = image
    if isinstance(image, str | os.PathLike):
        try:
            with Pictures.open(image) as opened:
                picture = upright(opened)
        except (OSError, ValueError, SyntaxError, Pictures.DecompressionBombError) as error:
            raise BadInput(f"{image} is not a picture that can be read", str(error), "check the file") from error
    if not isinstance(picture, Pictures.Image):
        return rgb_of_array(picture)
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Pictures.alpha_composite(Pictures.new("RGBA", picture.size, (255,) * 4), picture)
    return np.array(picture.convert("RGB"))


def rgb_of_array(image: Any) -> np.ndarray:
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not pixels.size:
        told = f"{pixels.dtype} of shape {tuple(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise BadInput(f"a picture is {told}", "files, Pillow images and uint8 numbers from 0 to 255 are read",
                       "multiply numbers from 0 to 1 by 255 and round them to uint8")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.shape[0] in (1, 3, 4):  # channels first, also where both could be: as in the reference
        pixels = pixels.transpose(1, 2, 0)
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:] / 255
        pixels = np.round(alpha * pixels[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    if pixels.shape[-1] not in (1, 3):
        raise BadInput(f"a picture has the shape {tuple(pixels.shape)}", "1, 3 or 4 channels must come first or last")
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


def resized(pixels: np.ndarray, size: int | tuple[int, int], resample: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if isinstance(size, int):
        short, long = sorted((height, width))
        other = int(size * long / short)
        height, width = (size, other) if height < width else (other, size)
    else:
        height, width = size
    Pictures = pillow()
    return np.array(Pictures.fromarray(pixels).resize((width, height), resample=Pictures.Resampling(resample)))


def cropped(pixels: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    """The middle; a picture that is smaller gets a black border."""
    (height, width), (tall, wide) = pixels.shape[:2], crop
    above, before = -(-max(tall - height, 0) // 2), -(-max(wide - width, 0) // 2)
    if above or before or tall > height or wide > width:
        framed = np.zeros((max(tall, height), max(wide, width), pixels.shape[2]), np.uint8)
        framed[above : above + height, before : before + width] = pixels
        pixels = framed
    top, left = (height - tall) // 2 + above, (width - wide) // 2 + before
    return pixels[top : top + tall, left : left + wide]
