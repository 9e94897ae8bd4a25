"""Products of tokens with kernels: plain, of operands rounded to eight bits, with gradients that are summed in float32.

Rounded operands have one scale per token and one per output channel of the kernel, the largest magnitude along the axis
that the product sums over, taken anew for every product. Where that axis is split over `tensor`, it is the largest of
all devices; over `data` and `fsdp` every scale is local. Parameters stay float32, and their gradients are products of
unrounded operands, as AQT and Qwix have it by default: their sums are over tokens, along which scales would be shared.

Kernels may be `Int8` instead, to compute without gradients: tokens stay as they are, unless `products` is "int8".
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from varedit_jax.config import TransformerConfig
from varedit_jax.parallel.constrain import merges_keys_and_values, scatters_matrices
from varedit_jax.quantized import Int8, dot, rounded
from varedit_jax.transformer.kernels import apart, matmuls_order_heads

# Types of tokens and kernels, and of gradients, which need the range more than the digits.
_TYPES: dict[str, tuple[DTypeLike, DTypeLike]] = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


def _dot(x: jax.Array, kernel: jax.Array, contract: int, dtype: DTypeLike) -> jax.Array:
    """The product over the last axis of x [..., I] and axis `contract` of a matrix, summed in `dtype`."""
    return jax.lax.dot_general(
        x, kernel, (((x.ndim - 1,), (contract,)), ((), ())), preferred_element_type=jnp.dtype(dtype)
    )


def _rounded_dot(x: jax.Array, kernel: jax.Array, contract: int, scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`_dot` of operands in eight bits, times `scale`, in `dtype`. Sums of int8 are exact, those of fp8 float32."""
    sums = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    return (_dot(x, kernel, contract, sums).astype(jnp.float32) * scale).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, kernel_IO: jax.Array, products: str, backward: bool) -> jax.Array:
    kernel_IO = kernel_IO.astype(x.dtype)
    if products == "plain":
        return _dot(x, kernel_IO, 0, x.dtype)
    forward_type, _ = _TYPES[products]
    rounded_x, x_scale = rounded(x, -1, forward_type)
    rounded_IO, scale_1O = rounded(kernel_IO, 0, forward_type)
    return _rounded_dot(rounded_x, rounded_IO, 0, x_scale * _row(scale_1O, x.ndim), x.dtype)


def _row(scale_1O: jax.Array, dimensions: int) -> jax.Array:
    return scale_1O.reshape((1,) * (dimensions - 1) + (-1,))


def _product_forward(
    x: jax.Array, kernel_IO: jax.Array, products: str, backward: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel_IO, products, backward), (x, kernel_IO)


def _product_backward(
    products: str, backward: bool, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel_IO = saved
    if products == "plain" or not backward:
        x_gradient = _dot(gradient, kernel_IO.astype(x.dtype), 1, x.dtype)
    else:
        forward_type, gradient_type = _TYPES[products]
        # The kernel as it was rounded in the forward pass; its scales go into the gradient before that is rounded.
        rounded_IO, scale_1O = rounded(kernel_IO.astype(x.dtype), 0, forward_type)
        scaled = gradient.astype(jnp.float32) * _row(scale_1O, gradient.ndim)
        rounded_gradient, scale = rounded(scaled, -1, gradient_type)
        x_gradient = _rounded_dot(rounded_gradient, rounded_IO, 1, scale, x.dtype)
    tokens = tuple(range(x.ndim - 1))
    # In the type of the kernel, which is that of the sum over devices.
    kernel_gradient = jax.lax.dot_general(
        x, gradient, ((tokens, tokens), ((), ())), preferred_element_type=kernel_IO.dtype
    )
    return x_gradient, kernel_gradient


_product.defvjp(_product_forward, _product_backward)


def _is_plain(config: TransformerConfig) -> bool:
    """Returns True where products and their gradients are those of an ordinary matmul."""
    return config.gradient_sums == "dtype" and config.products == "plain"


def product(x: jax.Array, kernel_IO: jax.Array | Int8, config: TransformerConfig) -> jax.Array:
    """Returns x [..., I] times a kernel [I, O] in the type of x, as `config.products` and `config.gradient_sums` say.

    The kernel may be float32, in the type of x, or int8.
    """
    if isinstance(kernel_IO, Int8):
        return _int8_product(x, kernel_IO, config)
    if config.gradient_sums == "dtype":
        kernel_IO = kernel_IO.astype(x.dtype)
    if _is_plain(config):
        return x @ kernel_IO
    return _product(x, kernel_IO, config.products, config.products_backward)


def _int8_product(x: jax.Array, kernel_IO: Int8, config: TransformerConfig) -> jax.Array:
    if config.products != "int8":
        return dot(x, kernel_IO)
    rounded_x, x_scale = rounded(x, -1, jnp.int8)
    return _rounded_dot(rounded_x, kernel_IO.values, 0, x_scale * _row(kernel_IO.scale, x.ndim), x.dtype)


def _heads_by_matmul(kernel: jax.Array | Int8, config: TransformerConfig) -> bool:
    """Returns True where the matmul with a kernel takes and gives heads in their order itself."""
    plain = config.products != "int8" if isinstance(kernel, Int8) else _is_plain(config)
    return plain and matmuls_order_heads()


def _as_rows(x_BLI: jax.Array) -> jax.Array:
    """Keeps rows of heads from being taken back into the matmul beside them, where matrices are scattered."""
    return apart(x_BLI) if scatters_matrices() else x_BLI


def _rows_of_heads(x_BHLD: jax.Array) -> jax.Array:
    """[B, L, H D]."""
    x_BLHD = jnp.swapaxes(x_BHLD, 1, 2)
    return _as_rows(x_BLHD.reshape(*x_BLHD.shape[:2], -1))


def _to_heads(x_BLC: jax.Array, kernel_CHD: jax.Array) -> jax.Array:
    return jnp.einsum("blc,chd->bhld", x_BLC, kernel_CHD)


@jax.custom_vjp
def _to_heads_by_matrix(x_BLC: jax.Array, kernel_CHD: jax.Array) -> jax.Array:
    """`_to_heads`, differentiated as JAX does it, but for the shape in which devices sum the gradient of the kernel."""
    return _to_heads(x_BLC, kernel_CHD)


def _to_heads_backward(saved: tuple[jax.Array, jax.Array], gradient_BHLD: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BLC, kernel_CHD = saved
    gradient_CI = jnp.einsum("blc,bli->ci", x_BLC, _rows_of_heads(gradient_BHLD))
    return jnp.einsum("bhld,chd->blc", gradient_BHLD, kernel_CHD), gradient_CI.reshape(kernel_CHD.shape)


_to_heads_by_matrix.defvjp(lambda x, kernel: (_to_heads(x, kernel), (x, kernel)), _to_heads_backward)


def _few_tokens(batch: int, tokens: int, kernel_IO: jax.Array | Int8) -> bool:
    """Returns True where turning tokens moves less than turning a matrix: in the scales of an edit."""
    return batch * tokens < len(kernel_IO)


def to_heads(x_BLC: jax.Array, kernel: jax.Array | Int8, config: TransformerConfig) -> jax.Array:
    """`product` with a kernel [C, H, D] or a matrix [C, H D]: [B, H, L, D].

    The plain one is written in that order by the matmul itself, where that is the faster way.
    """
    width, shape = kernel.shape[0], (config.heads, config.head_size)
    as_rows = kernel.ndim == 2 and (scatters_matrices() or _few_tokens(x_BLC.shape[0], x_BLC.shape[1], kernel))
    if _heads_by_matmul(kernel, config) and not as_rows:
        if isinstance(kernel, Int8):
            return _to_heads_int8(x_BLC, kernel.reshape(width, *shape))
        function = _to_heads_by_matrix if scatters_matrices() else _to_heads
        return function(x_BLC, kernel.reshape(width, *shape).astype(x_BLC.dtype))
    return jnp.swapaxes(_rows(x_BLC, kernel, config).reshape(*x_BLC.shape[:2], *shape), 1, 2)


def _to_heads_int8(x_BLC: jax.Array, kernel_CHD: Int8) -> jax.Array:
    values_CHD = kernel_CHD.values.astype(x_BLC.dtype)
    sums_BHLD = jnp.einsum("blc,chd->bhld", x_BLC, values_CHD, preferred_element_type=jnp.float32)
    return (sums_BHLD * kernel_CHD.scale[:, :, None]).astype(x_BLC.dtype)


def _rows(x_BLC: jax.Array, kernel: jax.Array | Int8, config: TransformerConfig) -> jax.Array:
    """`product` with the matrix of a kernel [C, ...]: [B, L, I]."""
    return _as_rows(product(x_BLC, kernel.reshape(len(kernel), -1), config))


def to_keys_and_values(x_BLC: jax.Array, kernel_C2HD: jax.Array | Int8, config: TransformerConfig) -> list[jax.Array]:
    """`to_heads` of both parts of a kernel: [B, H, L, D] each."""
    if not merges_keys_and_values():
        return [to_heads(x_BLC, kernel_C2HD[:, part], config) for part in range(2)]
    rows = _rows(x_BLC, kernel_C2HD, config).reshape(*x_BLC.shape[:2], *kernel_C2HD.shape[1:])
    return [jnp.swapaxes(rows[:, :, part], 1, 2) for part in range(2)]


def from_heads(x_BHLD: jax.Array, kernel_IC: jax.Array | Int8, config: TransformerConfig) -> jax.Array:
    """`product` of all heads with a matrix [H D, C]: [B, L, C]."""
    as_rows = scatters_matrices() or _few_tokens(x_BHLD.shape[0], x_BHLD.shape[2], kernel_IC)
    if _heads_by_matmul(kernel_IC, config) and not as_rows:
        if isinstance(kernel_IC, Int8):
            values_HDC = kernel_IC.values.reshape(config.heads, config.head_size, -1).astype(x_BHLD.dtype)
            sums_BLC = jnp.einsum("bhld,hdc->blc", x_BHLD, values_HDC, preferred_element_type=jnp.float32)
            return (sums_BLC * kernel_IC.scale[None]).astype(x_BHLD.dtype)
        kernel_HDC = kernel_IC.reshape(config.heads, config.head_size, -1)
        return jnp.einsum("bhld,hdc->blc", x_BHLD, kernel_HDC.astype(x_BHLD.dtype))
    return product(_rows_of_heads(x_BHLD), kernel_IC, config)


def _aligned(bias: jax.Array, dimensions: int) -> jax.Array:
    """A bias [O] along the last axis, or [H, D] as x_BHLD has it."""
    return _row(bias, dimensions) if bias.ndim == 1 else bias[None, :, None]


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x [..., O] plus a bias [O], or x [B, H, L, D] plus a bias [H, D], in the type of x.

    The bias is float32, and so is the sum over tokens that is its gradient. A sum in bfloat16 is less exact, and
    slower: libtpu (0.0.42) does not fuse it with the conversion, and estimates 2.3 times the cycles.
    """
    return x + _aligned(bias.astype(x.dtype), x.ndim)


def _bias_backward(bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens = tuple(range(gradient.ndim - 1)) if bias.ndim == 1 else (0, 2)
    return gradient, jnp.sum(gradient.astype(bias.dtype), axis=tokens)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _bias_backward)


class Dense(nn.Module):
    """`flax.linen.Dense` in the type of the blocks, whose matmul is `product`."""

    config: TransformerConfig
    features: int
    kernel_init: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., I] -> [..., features]."""
        dtype = jnp.dtype(self.config.dtype)
        kernel_IO = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return add_bias(product(x.astype(dtype), kernel_IO, self.config), bias)
