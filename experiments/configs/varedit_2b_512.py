"""`varedit_2b_512`: stage 2 of the 2B editor, 512 px, from stage 1 (model.md, section 7).

    python -m experiments.train --config=experiments/configs/varedit_2b_512.py --workdir=runs/varedit_2b_512 \\
        --config.tokenizer_weights=weights/bsq_32bit --config.text_weights=weights/flan_t5_xl \\
        --config.init_from=weights/varedit_2b_256

Recipe: 7,000 steps, batch 960, rate 1.875e-5. Published result on EMU-Edit / PIE-Bench (GPT-Balance): 5.662 / 6.996.
published.py describes the variants.
"""

from experiments.configs import published
from varedit_jax.config import RunConfig

VARIANTS = published.VARIANTS


def get_config(variant: str = "") -> RunConfig:
    """Returns the run of a variant."""
    return published.make_run(
        "varedit_2b_512", "2b", "0.25M", steps=7_000, batch_size=960, learning_rate=1.875e-5, variant=variant
    )
