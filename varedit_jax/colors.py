"""Color profiles: pixels as their file means them, in sRGB."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_MAX_PROFILE = 4 * 2**20  # bytes; larger ones are not looked at
_SAME = 2  # of 255; a profile that changes no color by more is another wording of sRGB
_STEPS = {"L": 256, "RGB": 9, "CMYK": 5}  # values of each channel that are tried
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION


def to_srgb(image: Image.Image) -> Image.Image:
    """Returns a loaded image of mode L, RGB or CMYK in sRGB, mode RGB, if its color profile says otherwise.

    Without a profile, and with one that is sRGB, broken or of another color space, the image is returned as it is.
    Profiles are compared with sRGB once: images share them.
    """
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or len(profile) > _MAX_PROFILE:  # a TIFF may give it as numbers
        return image
    transform = _transform(profile, image.mode)
    return image if transform is None else transform.apply(image)


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the way from a profile to sRGB; None if there is none, or nothing to do."""
    try:
        opened = ImageCms.getOpenProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(
            opened, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, _FLAGS
        )
        colors = _all_colors(mode)
        change = np.array(transform.apply(colors), int) - np.array(colors.convert("RGB"))
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError):  # what Pillow raises of broken profiles
        return None
    return transform if np.abs(change).max() > _SAME else None


def _all_colors(mode: str) -> Image.Image:
    """Returns an image of evenly spread colors, one a pixel."""
    values = np.linspace(0, 255, _STEPS[mode]).astype(np.uint8)
    channels = np.meshgrid(*[values] * Image.getmodebands(mode), indexing="ij")
    return Image.merge(mode, [Image.fromarray(channel.reshape(1, -1)) for channel in channels])
