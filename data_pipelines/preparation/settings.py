"""Settings of data_pipelines.prepare."""

import dataclasses
import math
import urllib.parse

from varedit_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vision:
    """A vision-language model behind an OpenAI-compatible endpoint, which gets two questions per record."""

    url: str  # up to, and without, /chat/completions
    model: str
    key_variable: str = "OPENAI_API_KEY"  # environment variable with the key; may be unset
    side: int = 768  # pixels; images with longer sides are reduced before they are sent
    parallel: int = 8  # concurrent requests per process
    per_minute: float = 0.0  # requests per process; 0 is no limit
    tries: int = 6  # per question, with exponential backoff
    timeout: float = 120.0  # seconds per request

    def __post_init__(self) -> None:
        """Raises UserError if `url` is not an HTTP address."""
        try:
            parts = urllib.parse.urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # invalid port or brackets
            sound = False
        if not sound:
            raise UserError(f"the endpoint is {self.url!r}; give an address like http://localhost:8000/v1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Filters, deduplication, split and layout of the shards. Defaults drop unusable records only."""

    decode: bool = True  # decode both images of every record
    min_side: int = 0  # pixels of the short side of source and target
    max_side: int = 0  # pixels of the long side; 0 is no limit
    max_ratio: float = 0.0  # long side over short side; 0 is no limit
    max_aspect_change: float = 1.5  # ratio of the sides' aspects; one side turned is dropped too; 0 is no limit
    min_scores: tuple[tuple[str, float], ...] = ()  # records without the score are kept
    first_turn: bool = False  # keep only the first edit of a session
    min_change: float = 0.0  # levels of 255 (`perceptual_hash.change`); 0 keeps unchanged images
    exact: bool = True  # deduplicate records with the same images and instruction
    near_bits: int = -1  # of 64 that near-duplicates may differ by (`perceptual_hash.alike`); -1 keeps them
    validation: float = 0.01  # share of source images
    shard_bytes: int = 2**30  # approximate size of a shard
    vision: Vision | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        for name in ("min_side", "max_side", "max_ratio", "max_aspect_change", "min_change"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it cannot be below 0")
        if self.max_side and self.max_side < self.min_side:
            raise UserError(f"max_side is {self.max_side}, less than min_side, {self.min_side}; nothing would be left")
        if self.max_ratio and self.max_ratio < 1:
            raise UserError(f"max_ratio is {self.max_ratio}; long side over short side is at least 1")
        if 0 < self.max_aspect_change < 1:
            raise UserError(
                f"max_aspect_change is {self.max_aspect_change}; the greater aspect over the less is at least 1"
            )
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
        """True if perceptual hashes are needed."""
        return self.min_change > 0 or self.near_bits >= 0
