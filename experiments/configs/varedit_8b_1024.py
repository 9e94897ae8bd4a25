"""`varedit_8b_1024`: the 8B editor, 1024 px, from the one of 512 px.

    python -m experiments.train --config=experiments/configs/varedit_8b_1024.py --workdir=runs/varedit_8b_1024 \\
        --config.tokenizer_weights=weights/bsq_14bit --config.text_weights=weights/flan_t5_xl \\
        --config.init_from=weights/varedit_8b_512

No such run has been published. 7,000 steps at rate 1.875e-5 are those of 2B's second stage; batch 512, at 14,617 tokens
per example, has as many tokens as 2,111 examples of 512 px.
published.py describes the variants.
"""

from experiments.configs import published
from varedit_jax.config import RunConfig

VARIANTS = published.VARIANTS


def get_config(variant: str = "") -> RunConfig:
    """Returns the run of a variant."""
    return published.make_run(
        "varedit_8b_1024", "8b", "1M", steps=7_000, batch_size=512, learning_rate=1.875e-5, variant=variant
    )
