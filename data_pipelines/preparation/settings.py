"""Settings of prepare."""

import dataclasses
import math
import urllib.parse

from varedit_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vision:
    """A vision-language model behind an OpenAI-compatible endpoint, asked two questions about each record."""

    url: str  # up to, and without, /chat/completions
    model: str
    key_variable: str = "OPENAI_API_KEY"  # environment variable with the key; may be unset
    side: int = 768  # pixels; longer sides of images are reduced to it before they are sent
    parallel: int = 8  # questions on their way at a time, a process
    per_minute: float = 0.0  # questions, a process; 0 has no limit
    tries: int = 6  # of a question, with growing pauses
    timeout: float = 120.0  # seconds

    def __post_init__(self) -> None:
        """Raises UserError for what is no address."""
        try:
            parts = urllib.parse.urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of the port, or of brackets
            sound = False
        if not sound:
            raise UserError(f"the endpoint is {self.url!r}; give an address like http://localhost:8000/v1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Choice of the records that are left out, and layout of the others. Defaults leave out what cannot be used."""

    decode: bool = True  # decode both images of every record
    min_side: int = 0  # pixels of the short side of source and target
    max_side: int = 0  # pixels of the long side; 0 has no limit
    max_ratio: float = 0.0  # long side over short side; 0 has no limit
    min_scores: tuple[tuple[str, float], ...] = ()  # a record that lacks the score stays
    first_turn: bool = False  # of sessions, the first edit only
    min_change: float = 0.0  # levels of 255 (`looks.change`); 0 keeps records whose target is the source
    exact: bool = True  # one of several records with the same images and instruction
    near_bits: int = -1  # of 64 that near-duplicates may differ by (`looks.alike`); -1 does not look for them
    validation: float = 0.01  # share of images
    shard_bytes: int = 2**30  # of a shard, about
    vision: Vision | None = None

    def __post_init__(self) -> None:
        """Raises UserError for what does not make sense, with the value."""
        for name in ("min_side", "max_side", "max_ratio", "min_change"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it cannot be below 0")
        if self.max_side and self.max_side < self.min_side:
            raise UserError(f"max_side is {self.max_side}, less than min_side, {self.min_side}; nothing would be left")
        if self.max_ratio and self.max_ratio < 1:
            raise UserError(f"max_ratio is {self.max_ratio}; long side over short side is at least 1")
        if not -1 <= self.near_bits <= 7:
            raise UserError(f"near_bits is {self.near_bits}; it must be from 0 to 7, or -1 not to look for them")
        if not 0 <= self.validation < 1:
            raise UserError(f"validation is {self.validation}; it is a share of the images, from 0 to below 1")
        if self.shard_bytes < 1:
            raise UserError(f"shards of {self.shard_bytes} bytes hold nothing")
        if not self.decode and (self.looks or self.vision):
            raise UserError("min_change, near_bits and the vision filter look at decoded images; leave decode on")

    @property
    def looks(self) -> bool:
        """True if it matters what images look like."""
        return self.min_change > 0 or self.near_bits >= 0
