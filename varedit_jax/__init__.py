"""VAREdit: scale-wise autoregressive image editing by instruction, in JAX and Flax."""
