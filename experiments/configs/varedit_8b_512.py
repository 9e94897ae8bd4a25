"""`varedit_8b_512`: the 8B editor, 512 px, from Infinity 8B (model.md, section 7).

    python -m experiments.train --config=experiments/configs/varedit_8b_512.py --workdir=runs/varedit_8b_512 \\
        --config.tokenizer_weights=weights/bsq_14bit --config.text_weights=weights/flan_t5_xl \\
        --config.init_from=weights/infinity_8b

Recipe: 60,000 steps, batch 1536, rate 6e-5. Published result on EMU-Edit / PIE-Bench (GPT-Balance): 7.892 / 8.105.
published.py describes the variants.
"""

from experiments.configs import published
from varedit_jax.config import RunConfig

VARIANTS = published.VARIANTS


def get_config(variant: str = "") -> RunConfig:
    """Returns the run of a variant."""
    return published.make_run(
        "varedit_8b_512", "8b", "0.25M", steps=60_000, batch_size=1536, learning_rate=6e-5, variant=variant
    )
