"""Recomputation in the backward pass, by what is kept: counted operations of the published models."""

import dataclasses
import functools

import jax
import jax.interpreters.partial_eval as pe
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from varedit_jax.config import REMAT_NAMES, TransformerConfig, preset
from varedit_jax.scales import Pyramid, editor_pyramid
from varedit_jax.training.flops import count_jaxpr, example_flops
from varedit_jax.transformer.model import Transformer

TEXT_TOKENS = 512


def backward(config, pyramid):
    """The program of a loss's gradient, traced and not compiled, without what no output needs."""
    model = Transformer(config, pyramid)
    source, targets = pyramid.source_tokens(config.conditioning), pyramid.target_tokens
    sizes = ((source, config.token_bits), (targets - 1, config.token_bits), (TEXT_TOKENS, config.text_width))
    arguments = [jax.ShapeDtypeStruct((1, *size), np.float32) for size in sizes]
    arguments.append(jax.ShapeDtypeStruct((1,), np.int32))
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    gradient = jax.grad(lambda params, *rest: jnp.sum(model.apply({"params": params}, *rest)))
    program = jax.make_jaxpr(gradient)(params, *arguments).jaxpr
    return pe.dce_jaxpr(program, [True] * len(program.outvars))[0]


@functools.cache
def operations(name, depth, **changes):
    editor = preset(name)
    config = dataclasses.replace(editor.transformer, depth=depth, attention="plain", **changes)
    return count_jaxpr(backward(config, editor_pyramid(editor)))


def again_of_forward(name, depth, saved):
    """Returns what the backward pass of a preset recomputes, as a share of the forward pass.

    Without the scores of self-attention, which the backward pass of every fast kernel makes by itself.
    """
    editor = preset(name)
    editor = dataclasses.replace(editor, transformer=dataclasses.replace(editor.transformer, depth=depth))
    forward = example_flops(editor, editor_pyramid(editor), TEXT_TOKENS)
    again = operations(name, depth, remat="named", remat_saved=saved) - operations(name, depth, remat="none")
    return (again - forward.self_attention // 2) / forward.transformer


@pytest.mark.parametrize("name", ["2b", "8b"])
def test_what_is_kept_by_default_leaves_less_than_a_third_of_the_forward_pass(name):
    transformer = preset(name).transformer
    assert 0.25 < again_of_forward(name, transformer.depth, transformer.remat_saved) < 1 / 3


def test_every_name_keeps_what_it_says():
    """With all of them little is left but the scores of the attention to the text and RoPE's products; each counts."""
    rest = again_of_forward("8b", 2, REMAT_NAMES)
    assert rest < 0.02
    for name in REMAT_NAMES:
        others = tuple(other for other in REMAT_NAMES if other != name)
        assert again_of_forward("8b", 2, others) > rest + 0.005, name


def kernels(jaxpr):
    """Returns the number of kernels that a program calls; a scanned layer counts once."""
    inner = [body for equation in jaxpr.eqns for body in jaxprs_in_params(equation.params)]
    return sum(equation.primitive.name == "pallas_call" for equation in jaxpr.eqns) + sum(map(kernels, inner))


def test_kept_attention_does_not_run_its_kernel_again():
    """Splash attention has one kernel forward and one backward; the forward one runs again where it is not kept.

    Twice in a block: to the sequence itself and to the text.
    """
    grids = ((1, 1), (2, 3))
    config = TransformerConfig(
        depth=2, width=16, heads=2, token_bits=4, text_width=16, attention="splash", remat="named"
    )
    for saved, calls in ((REMAT_NAMES, 2 + 2), (config.remat_saved, 2 + 3), (("qkv", "proj"), 3 + 3)):
        program = backward(dataclasses.replace(config, remat_saved=saved), Pyramid(grids, grids))
        assert kernels(program) == 2 * calls, saved  # in the first block and in the scanned one


def maxima(jaxpr):
    """Returns the number of maxima over scores, which attention by blocks takes in its forward pass alone."""
    inner = [body for equation in jaxpr.eqns for body in jaxprs_in_params(equation.params)]
    found = [equation for equation in jaxpr.eqns if equation.primitive.name == "reduce_max"]
    return sum(equation.invars[0].aval.ndim == 4 for equation in found) + sum(map(maxima, inner))


def test_kept_attention_by_blocks_does_not_run_again():
    """Per block: source and two scales, and the text; the pooling of the text has a maximum of its own."""
    grids = ((1, 1), (2, 3))
    config = TransformerConfig(
        depth=2, width=16, heads=2, token_bits=4, text_width=16, attention="blocked", remat="named"
    )
    for saved, calls in ((REMAT_NAMES, 3 + 1), (config.remat_saved, 3 + 2), (("qkv", "proj"), 6 + 2)):
        program = backward(dataclasses.replace(config, remat_saved=saved), Pyramid(grids, grids))
        assert maxima(program) == 2 * calls + 1, saved
