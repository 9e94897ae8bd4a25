"""`varedit_2b_256`: stage 1 of the 2B editor, 256 px, from Infinity 2B (model.md, section 7).

    python -m experiments.train --config=experiments/configs/varedit_2b_256.py --workdir=runs/varedit_2b_256 \\
        --config.tokenizer_weights=weights/bsq_32bit --config.text_weights=weights/flan_t5_xl \\
        --config.init_from=weights/infinity_2b

Recipe: 8,000 steps, batch 1536, rate 6e-5. Published result on EMU-Edit / PIE-Bench (GPT-Balance): 5.565 / 6.684.
published.py describes the variants.
"""

from experiments.configs import published
from varedit_jax.config import RunConfig

VARIANTS = published.VARIANTS


def get_config(variant: str = "") -> RunConfig:
    """Returns the run of a variant."""
    return published.make_run(
        "varedit_2b_256", "2b", "0.06M", steps=8_000, batch_size=1536, learning_rate=6e-5, variant=variant
    )
