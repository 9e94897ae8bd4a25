"""VAREdit: scale-wise autoregressive image editing by instruction, in JAX and Flax."""

__version__ = "0.1.0"
