"""`varedit_8b_1024`: the 8B editor, 1024 px, from the one of 512 px.

    python -m experiments.train --config=experiments/configs/varedit_8b_1024.py --workdir=runs/varedit_8b_1024 \\
        --config.tokenizer_weights=weights/bsq_14bit --config.text_weights=weights/flan_t5_xl \\
        --config.init_from=weights/varedit_8b_512

Nobody has published this run, so it has no result. 7,000 steps at rate 1.875e-5 are those of 2B's second stage; batch
512, at 14,617 tokens an example, has as many tokens as 2,111 examples of 512 px.
Variants (published.py): `tiny`, for a CPU; `v5p_128`, `v5p_256`, `v6e_256`, `v5e_256` and `h100_64`, layouts for those
machines, whose needs are in results/compile_ahead.md.
"""

from experiments.configs import published
from varedit_jax.config import RunConfig

VARIANTS = published.VARIANTS


def get_config(variant: str = "") -> RunConfig:
    """Returns the run; see the module's docstring for the variants."""
    return published.make_run(
        "varedit_8b_1024", "8b", "1M", steps=7_000, batch_size=512, learning_rate=1.875e-5, variant=variant
    )
