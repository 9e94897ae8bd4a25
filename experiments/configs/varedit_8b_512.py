"""`varedit_8b_512`: the 8B editor, 512 px, from Infinity 8B (model.md, section 7).

    python -m experiments.train --config=experiments/configs/varedit_8b_512.py --workdir=runs/varedit_8b_512 \\
        --config.tokenizer_weights=weights/bsq_14bit --config.text_weights=weights/flan_t5_xl \\
        --config.init_from=weights/infinity_8b

Recipe: 60,000 steps, batch 1536, rate 6e-5. Published result on EMU-Edit / PIE-Bench (GPT-Balance): 7.892 / 8.105.
Variants (published.py): `tiny`, for a CPU; `v5p_128`, `v5p_256`, `v6e_256`, `v5e_256` and `h100_64`, layouts for those
machines, whose needs are in results/compile_ahead.md.
"""

from experiments.configs import published
from varedit_jax.config import RunConfig

VARIANTS = published.VARIANTS


def get_config(variant: str = "") -> RunConfig:
    """Returns the run; see the module's docstring for the variants."""
    return published.make_run(
        "varedit_8b_512", "8b", "0.25M", steps=60_000, batch_size=1536, learning_rate=6e-5, variant=variant
    )
