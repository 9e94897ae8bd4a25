"""Convolutional autoencoder of the tokenizer (model.md, section 2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from varedit_jax.config import TokenizerConfig


def _conv(channels: int, name: str, kernel: int = 3) -> nn.Conv:
    return nn.Conv(channels, (kernel, kernel), padding=kernel // 2, name=name)


def _norm(config: TokenizerConfig, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, epsilon=1e-6, use_fast_variance=False, name=name)


class ResidualBlock(nn.Module):
    """Two normalized 3x3 convolutions around a shortcut, 1x1 where the width changes."""

    config: TokenizerConfig
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, y, x, channels in] -> [B, y, x, channels]."""
        h = _conv(self.channels, "conv_1")(nn.swish(_norm(self.config, "norm_1")(x)))
        h = _conv(self.channels, "conv_2")(nn.swish(_norm(self.config, "norm_2")(h)))
        if x.shape[-1] != self.channels:
            x = _conv(self.channels, "shortcut", kernel=1)(x)
        return x + h


class Level(nn.Module):
    """The residual blocks of one resolution, and the change to the next."""

    config: TokenizerConfig
    channels: int
    blocks: int
    resample: str = ""  # "", "down" or "up"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, y, x, channels in] -> [B, y', x', channels], y' = y, y / 2 or 2 y."""
        for index in range(self.blocks):
            x = ResidualBlock(self.config, self.channels, name=f"block_{index}")(x)
        if self.resample == "down":
            # One row at the bottom and one column at the right, as the published models were trained.
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
            x = nn.Conv(self.channels, (3, 3), strides=2, padding="VALID", name="downsample")(x)
        elif self.resample == "up":
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = _conv(self.channels, "upsample")(x)
        return x


class Encoder(nn.Module):
    """Pixels to raw features."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images float32 [B, y, x, 3] in [-1, 1] -> raw features float32 [B, h, w, Z], not normalized."""
        config = self.config
        x = _conv(config.base_channels, "conv_in")(images)
        channels = config.channels
        for level, width in enumerate(channels):
            resample = "down" if level < len(channels) - 1 else ""
            x = Level(config, width, config.encoder_blocks, resample, name=f"down_{level}")(x)
        for index in range(2):
            x = ResidualBlock(config, channels[-1], name=f"mid_{index}")(x)
        return _conv(config.bits, "conv_out")(nn.swish(_norm(config, "norm_out")(x)))


class Decoder(nn.Module):
    """Features to pixels."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Features float32 [B, h, w, Z] -> images float32 [B, y, x, 3], not yet clipped."""
        config = self.config
        channels = config.channels
        x = _conv(channels[-1], "conv_in")(features)
        for index in range(2):
            x = ResidualBlock(config, channels[-1], name=f"mid_{index}")(x)
        for level in reversed(range(len(channels))):
            resample = "up" if level > 0 else ""
            x = Level(config, channels[level], config.decoder_blocks, resample, name=f"up_{level}")(x)
        return _conv(3, "conv_out")(nn.swish(_norm(config, "norm_out")(x)))


class Autoencoder(nn.Module):
    """Encoder and decoder under one tree of parameters."""

    config: TokenizerConfig

    def setup(self) -> None:
        """Names the two halves."""
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images -> reconstruction without quantization; uses every parameter, for `init`."""
        return self.decoder(self.encoder(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """Images float32 [B, y, x, 3] in [-1, 1] -> raw features float32 [B, h, w, Z].

        Raises ValueError if a side is not a multiple of the stride.
        """
        stride = self.config.stride
        if images.shape[1] % stride or images.shape[2] % stride:
            raise ValueError(f"image of {images.shape[1]} x {images.shape[2]} px: sides must be multiples of {stride}")
        return self.encoder(images)

    def decode(self, features: jax.Array, clip: bool = True) -> jax.Array:
        """Quantized features float32 [B, h, w, Z] -> images float32 [B, y, x, 3], clipped to [-1, 1]."""
        images = self.decoder(features)
        return jnp.clip(images, -1, 1) if clip else images
