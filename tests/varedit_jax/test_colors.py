"""Color profiles: known colors of other color spaces become those of sRGB, what is sRGB stays as it is."""

import concurrent.futures
import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from varedit_jax import colors, images

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Primaries as XYZ under D50, from the columns of the matrix of each space (Bradford-adapted).
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
CORNERS = tuple(itertools.product((0, 1), repeat=4))
SRGB_CURVE = tuple(
    round(65535 * (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4)) for x in np.linspace(0, 1, 1024)
)


def profile(space: str, tags: dict[str, bytes], connection: str = "XYZ ", kind: str = "mntr") -> bytes:
    """Returns an ICC profile of version 2.4 with these tags."""
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, *map(str.encode, (kind, space, connection))
    )
    header += bytes(12) + b"acsp" + bytes(28) + xyz(0.9642, 1.0, 0.8249)[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))


def curve(*values: int) -> bytes:
    """Returns a curve: a table, or one value, 256 times the gamma."""
    return b"curv" + bytes(4) + struct.pack(f">I{len(values)}H", len(values), *values)


def rgb_profile(primaries, values: bytes) -> bytes:
    tags = {"wtpt": xyz(0.9642, 1.0, 0.8249)}
    tags |= {f"{c}XYZ": xyz(*column) for c, column in zip("rgb", primaries, strict=True)}
    return profile("RGB ", tags | {f"{c}TRC": values for c in "rgb"})


def table(inputs: int, outputs: int, grid: bytes) -> bytes:
    """Returns a table of two points along each input, which is otherwise straight."""
    unity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    straight = bytes(range(256))
    return b"mft1" + bytes(4) + bytes((inputs, outputs, 2, 0)) + unity + straight * inputs + grid + straight * outputs


def cmyk_profile() -> bytes:
    """Returns a profile of pale inks: cyan, magenta and yellow leave a lightness of 40 of 100, black alone of 10."""
    lightness = [1 - 0.2 * (c + m + y) - 0.9 * k * (1 - 0.2 * (c + m + y)) for c, m, y, k in CORNERS]
    colors = b"".join(bytes((round(255 * value), 128, 128)) for value in lightness)
    inks = b"".join(bytes((0, 0, 0, 255 * (1 - light))) for light, _, _ in itertools.product((0, 1), repeat=3))
    tags = {"wtpt": xyz(0.9642, 1.0, 0.8249), "A2B0": table(4, 3, colors), "B2A0": table(3, 4, inks)}
    return profile("CMYK", tags, "Lab ", "prtr")


P3 = rgb_profile(DISPLAY_P3, curve(*SRGB_CURVE))
ADOBE = rgb_profile(ADOBE_RGB, curve(round(256 * 2.19921875)))
GAMMA_1 = profile("GRAY", {"wtpt": xyz(0.9642, 1.0, 0.8249), "kTRC": curve(256)})


def read(image: Image.Image, icc: bytes | None, kind: str = "PNG", **options) -> np.ndarray:
    """Returns what is read of an image saved with a profile."""
    file = io.BytesIO()
    image.save(file, kind, icc_profile=icc, **options)
    return images.read_image(file)


@pytest.mark.parametrize(
    ("icc", "color", "wanted"),
    [
        (P3, (234, 51, 35), (255, 0, 0)),  # the same three colors in each space
        (P3, (117, 251, 76), (0, 255, 0)),
        (P3, (0, 0, 245), (0, 0, 255)),
        (P3, (255, 0, 0), (255, 0, 0)),  # redder than any color of sRGB
        (P3, (127, 127, 127), (127, 127, 127)),
        (ADOBE, (219, 0, 0), (255, 0, 0)),
        (ADOBE, (144, 255, 60), (0, 255, 0)),
        (ADOBE, (0, 0, 250), (0, 0, 255)),
        (ADOBE, (255, 255, 255), (255, 255, 255)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_colors_of_other_spaces(icc, color, wanted, kind) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    result = read(Image.new("RGB", (16, 16), color), icc, kind, **options)
    assert np.abs(result.astype(int) - wanted).max() <= 4


def test_gray_with_a_curve_of_its_own() -> None:
    for image in (Image.new("L", (2, 2), 55), Image.fromarray(np.full((2, 2), 55 * 257, np.uint16))):
        assert read(image, GAMMA_1)[0, 0].tolist() == [128] * 3  # 55 of 255 light is 128 in sRGB
    half = Image.new("LA", (2, 2), (55, 102))
    assert np.abs(read(half, GAMMA_1).astype(int) - (0.4 * 128 + 0.6 * 255)).max() <= 1


def test_cmyk_by_its_profile() -> None:
    icc = cmyk_profile()
    for ink, gray in (((0, 0, 0, 0), 255), ((255, 255, 255, 0), 90), ((0, 0, 0, 255), 0)):
        # L* of 10 is the blackest of it and becomes black; L* of 40 is 94 of 255, and 90 above that black.
        for kind in ("TIFF", "JPEG"):
            assert np.abs(read(Image.new("CMYK", (16, 16), ink), icc, kind).astype(int) - gray).max() <= 3
    assert read(Image.new("CMYK", (16, 16), (255, 255, 255, 0)), None, "TIFF").max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_images_are_converted_before_they_are_laid_on_white(mode) -> None:
    image = Image.new("RGBA", (4, 4), (234, 51, 35, 102))
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([234, 51, 35, 0, 0, 0])
    options = {"transparency": b"\x66\xff"} if mode == "P" else {}
    assert np.abs(read(image, P3, **options).astype(int) - (255, 153, 153)).max() <= 2


@pytest.mark.parametrize(
    "icc",
    [
        SRGB,
        rgb_profile(
            ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)), curve(*SRGB_CURVE)
        ),
    ],
)
def test_srgb_however_it_is_written_changes_no_bit(icc) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    np.testing.assert_array_equal(read(Image.fromarray(noise), icc), noise)
    opened = Image.fromarray(noise)
    opened.info["icc_profile"] = icc
    assert images.upright(opened) is opened  # not even copied


@pytest.mark.parametrize(
    "icc", [b"\0" * 3000, P3[:200], P3[:128] + b"\xff" * 400, cmyk_profile(), GAMMA_1, b"x", P3 + bytes(2**22)],
    ids=["zeros", "cut", "no tags", "of CMYK", "of gray", "one byte", "megabytes"],
)  # fmt: skip
def test_broken_profiles_and_those_of_other_colors_are_passed_over(icc) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(read(Image.fromarray(noise), icc, kind), noise)


def test_images_that_need_no_copy_are_converted_too() -> None:
    image = Image.new("RGB", (2, 2), (117, 251, 76))
    image.info["icc_profile"] = P3
    np.testing.assert_array_equal(np.array(images.upright(image)), images.upright_rgb(image))
    assert np.abs(images.upright_rgb(image)[0, 0].astype(int) - (0, 255, 0)).max() <= 4


def test_profile_that_is_a_number_is_passed_over() -> None:
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.info["icc_profile"] = 7  # a TIFF may say so
    assert images.read_image(image).tolist() == [[[1, 2, 3]] * 4] * 4


def test_a_profile_is_opened_once_for_many_images(monkeypatch) -> None:
    colors._transform.cache_clear()
    opened = []
    build = ImageCms.buildTransform
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *args: opened.append(1) or build(*args))
    for _ in range(5):
        for icc in (P3, SRGB, b"broken"):
            read(Image.new("RGB", (4, 4)), icc)
    assert len(opened) == 2


def test_threads_share_a_profile() -> None:
    noise = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8) for seed in range(16)]
    alone = [read(Image.fromarray(pixels), P3) for pixels in noise]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda pixels: read(Image.fromarray(pixels), P3), noise))
    np.testing.assert_array_equal(together, alone)
