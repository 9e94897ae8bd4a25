"""Brings pairs of published images to the model's size, and flips both where the instruction stays correct.

As the release does (its `preprocess`), a target is first resized to its source's size (bicubic), so that what was not
edited lies at the same place in both. Then both alike: `crop` resizes an image to cover the final size (Lanczos) and
crops the center; `pad` extends it with white at the right or bottom to the final aspect and resizes, as editing does
(images.py).
"""

import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.plan import mix
from varedit_jax.images import load_image, upright, upright_rgb
from varedit_jax.placement import fit

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


def decoded(image: Image.Image) -> Image.Image:
    """Returns an opened image decoded, upright and RGB. Raises ImageError."""
    load_image(image)
    return upright(image)


def fitted_pair(
    source: Image.Image, target: Image.Image, size_hw: tuple[int, int], resize: str, flip: bool = False
) -> dict[str, NDArray[np.uint8]]:
    """Returns `source` and `target`, uint8 [h, w, 3] with (h, w) = `size_hw`, from decoded images."""
    if target.size != source.size:
        target = target.resize(source.size, Image.Resampling.BICUBIC)
    return {"source": fitted(source, size_hw, resize, flip), "target": fitted(target, size_hw, resize, flip)}


def fitted(image: Image.Image, size_hw: tuple[int, int], resize: str, flip: bool = False) -> NDArray[np.uint8]:
    """Returns a decoded image as uint8 [h, w, 3] with (h, w) = `size_hw`."""
    if resize == "pad":
        pixels = np.asarray(image)
        return fit(np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels, size_hw)[0]  # padding stays at the right
    pixels = np.asarray(_covered(image, *size_hw))
    return pixels[:, ::-1] if flip else pixels


def _covered(image: Image.Image, h: int, w: int) -> Image.Image:
    """Returns the center of an image resized to cover h x w pixels: the release's `transform`, to the bit."""
    aspect = image.width / image.height
    wide, high = (w, int(w / aspect)) if aspect <= w / h else (int(aspect * h), h)
    wide, high = max(wide, w), max(high, h)  # the release would be a pixel short where a quotient is rounded down
    left, top = (wide - w) // 2, (high - h) // 2
    # Pillow resizes rows, rounds, and resizes columns; so columns can go in between, and need no second pass.
    image = image.resize((wide, image.height), Image.Resampling.LANCZOS).crop((left, 0, left + w, image.height))
    return image.resize((w, high), Image.Resampling.LANCZOS).crop((0, top, w, top + h))


def preview(image: Image.Image, side: int, quality: int) -> bytes:
    """Returns an opened image as an upright JPEG whose long side is at most `side` pixels. Raises ImageError."""
    image.draft("RGB", (side, side))
    load_image(image)
    image = Image.fromarray(upright_rgb(image))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
