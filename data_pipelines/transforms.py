"""Resizes published images to the model's size, and flips source and target where the instruction stays correct.

`crop` takes the largest centered box with the aspect of the final size and resizes it (Lanczos); `pad` extends the
image with white at the right or bottom to that aspect and resizes, as editing does (images.py). Before either, the
decoder reduces a JPEG that is several times too large, to no less than `REDUCING_GAP` times the size needed.
"""

import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.plan import mix
from varedit_jax.images import fit, load_image, orientation, upright, upright_rgb

REDUCING_GAP = 3.0  # left for Lanczos, so that the difference is hardly visible

_FLIP = 4  # domain of a hash, beside those of plan.py

# Words that a flip would make wrong: sides, directions and writing, in the languages of the public data sets.
_SIDED = re.compile(
    r"\b(?:left|right|lefthand|righthand|leftside|rightside|leftmost|rightmost|leftward|rightward|leftwards|"
    r"rightwards|clockwise|counter-?clockwise|anticlockwise|east|west|eastern|western|mirror|mirrored|flip|flipped|"
    r"text|texts|word|words|letter|letters|lettering|caption|captions|title|logo|logos|sign|signs|signage|label|labels|"
    r"inscriptions?|inscribed|handwriting|handwritten|labell?ed|titled|captioned|subtitles?|headlines?|graffiti|"
    r"calligraphy|typography|phrases?|sentences?|messages?|slogans?|spelled|spelt|misspell\w*|typos?|translat\w*|"
    r"write|writes|writing|written|wrote|rewrite|rewritten|"
    r"read|reads|reading|say|says|saying|spell|spells|number|numbers|digit|digits|"
    r"fonts?|watermarks?|licen[sc]e[ -]plates?|plate number|clock|\d+:\d\d|"
    r"links|rechts|linken?|rechten?|linke[rs]|rechte[rs]|schrift|schriftzug|wort|worte|"  # German
    r"gauche|droite|texte|mot|mots|écrire|écrit|"  # French
    r"izquierd[oa]s?|derech[oa]s?|texto|palabras?|letras?|escrib\w*|"  # Spanish
    r"esquerd[oa]s?|direit[oa]s?|palavras?|escrev\w*|"  # Portuguese
    r"sinistr[oa]|destr[oa]|testo|parol[ae]|scritt[oa]|"  # Italian
    r"лев\w*|прав\w*|слев\w*|справ\w*|текст\w*|надпис\w*|букв\w*|слов\w*)\b"  # Russian
    r"|[\"“”„«»‘`「」『』《》]|(?<!\w)'|(?-i:[A-Z]{3,})"  # quotes and capitals: text to write
    r"|左|右|东|西|東|写|書|字|文本|标志|标题|招牌|문자|글자|글씨|왼|오른",  # Chinese, Japanese, Korean
    re.IGNORECASE,
)


def may_flip(instruction: str) -> bool:
    """Returns True if an instruction also holds for flipped images: no left or right, and no writing."""
    return _SIDED.search(instruction) is None


def draw_flip(seed: int, index: int, number: int, instruction: str) -> bool:
    """Returns True if pass `number` flips an example: with probability 1/2, if the instruction allows it."""
    return bool(mix(seed, _FLIP, number, index) & np.uint64(1)) and may_flip(instruction)


def fitted(image: Image.Image, size_hw: tuple[int, int], resize: str, flip: bool = False) -> NDArray[np.uint8]:
    """Returns an opened image as uint8 [h, w, 3] with (h, w) = `size_hw`. Raises ImageError."""
    h, w = size_hw
    if image.format == "JPEG":
        _reduce(image, size_hw, resize)
    load_image(image)
    image = upright(image)
    if resize == "pad":
        pixels = np.asarray(image)
        return fit(np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels, size_hw)[0]  # padding stays at the right
    if image.size != (w, h):
        image = image.resize((w, h), Image.Resampling.LANCZOS, box=_middle(image.size, w / h))
    pixels = np.asarray(image)
    return pixels[:, ::-1] if flip else pixels


def _middle(size: tuple[int, int], aspect: float) -> tuple[float, float, float, float]:
    """Returns the largest centered box (left, top, right, bottom) with width / height = `aspect`."""
    width, height = size
    wide, high = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high


def _reduce(image: Image.Image, size_hw: tuple[int, int], resize: str) -> None:
    """Lets the decoder reduce a JPEG that is several times too large, which is cheaper than decoding all of it."""
    width, height = image.size
    h, w = size_hw
    if orientation(image) >= 5:
        h, w = w, h
    scale = max(w / width, h / height) if resize == "crop" else min(w / width, h / height)
    wanted = round(width * scale * REDUCING_GAP), round(height * scale * REDUCING_GAP)
    image.draft(None, wanted)  # the smallest of 1, 1/2, 1/4, 1/8 that is not below


def preview(image: Image.Image, side: int, quality: int) -> bytes:
    """Returns an opened image as an upright JPEG whose long side is at most `side` pixels. Raises ImageError."""
    image.draft("RGB", (side, side))
    load_image(image)
    image = Image.fromarray(upright_rgb(image))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
