"""The model card beside exported weights: contents, recipe, use."""

from collections.abc import Sequence

from varedit_jax.config import EditorConfig, RunConfig
from varedit_jax.storage.disk import size_text

_TEMPLATE = """---
license: {license}
library_name: varedit_jax
pipeline_tag: image-to-image
---

# {title}

An editor of images by instruction: VAREdit (arXiv 2508.15772), weights of varedit_jax, {size}.

    python -m experiments.edit --checkpoint=THIS_DIRECTORY{others} --image=mine.png --instruction="..." --output=new.png

| | |
|---|---|
{rows}

Files: `config.json` (model and sampling), one safetensors file per part (names are paths of the tree, slashes between),
`t5_tokenizer.json` (vocabulary of the prompts), `manifest.json` (SHA-256 of every tensor;
`python -m experiments.convert --verify=THIS_DIRECTORY` checks them).
"""


def model_card(
    config: EditorConfig, parts: Sequence[str], run: RunConfig | None, step: int | None, size: int, license: str
) -> str:
    """Markdown with the header of Hugging Face.

    `parts` are those beside the card, `size` their bytes; `run` and `step` are None for weights of no run.
    """
    transformer = config.transformer
    rows = [("parts", ", ".join(parts))]
    if "transformer" in parts:
        rows += [
            ("transformer", f"{transformer.depth} blocks, width {transformer.width}, {transformer.heads} heads"),
            ("bits per token", str(transformer.token_bits)),
            ("images", config.pixel_budget or f"own grids {config.grids}"),
            ("conditioning, positions", f"{transformer.conditioning}, {transformer.rope_layout}"),
        ]
    if run is not None:
        optimizer, data = run.optimizer, run.data
        rows += [
            (
                "recipe",
                f"{optimizer.algorithm}, rate {optimizer.learning_rate:g}, {optimizer.schedule}, "
                f"betas {optimizer.beta1:g} and {optimizer.beta2:g}, decay {optimizer.weight_decay:g}, "
                f"clip {optimizer.clip_norm:g}, batch {data.batch_size}",
            ),
            (
                "loss",
                f"weight of a scale ~ tokens^-{run.loss.scale_power:g}, up to {run.loss.noise_max:g} of bits flipped "
                f"on {run.loss.noise_scales} scales, text dropped {run.loss.text_drop:g}",
            ),
            ("step", f"{step:,} of {run.steps:,}"),
            ("data", data.name),
            ("started from", run.init_from or "random weights"),
        ]
    else:
        rows.append(("recipe, step, data", "not recorded with the weights that were converted"))
    rows.append(("license", license or "not stated"))
    others = "".join(f" --{part}=DIRECTORY" for part in ("tokenizer", "text") if part not in parts)
    return _TEMPLATE.format(
        others=others,
        license=license or "unknown",
        title=run.name if run is not None else f"varedit_jax: {', '.join(parts)}",
        size=size_text(size),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows),
    )
