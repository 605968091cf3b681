"""Images: arrays of pixels and samples, and files. Pillow is imported on first use."""

from .arrays import Float32, UInt8, from_uint8, is_image, sheet_shape, tile, to_uint8
from .read import ImageSource, ImageSources, eight_bits, read
from .write import animation_format, enlargement, picture_format, save, save_animation

__all__ = [
    "Float32",
    "ImageSource",
    "ImageSources",
    "UInt8",
    "animation_format",
    "eight_bits",
    "enlargement",
    "from_uint8",
    "is_image",
    "picture_format",
    "read",
    "save",
    "save_animation",
    "sheet_shape",
    "tile",
    "to_uint8",
]
