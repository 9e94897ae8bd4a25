"""Writes the T5 fixtures beside this file: what Hugging Face's T5 makes of small random encoders and of prompts.

Run once, with `pip install torch==2.13.0 transformers==4.57.1`; the tests need neither. Writes

    t5_encoder_{name}.safetensors  published parameter names and layouts, `ids`, `lengths`, `features`
    t5_encoders.json               the TextConfig of each
    t5_buckets.json                relative position buckets of the distances -600..600
    t5_prompts.json                ids of prompts, uncut and cut to a length
"""

import json
import pathlib
import random

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import T5Config, T5EncoderModel, T5TokenizerFast
from transformers.models.t5.modeling_t5 import T5Attention

HERE = pathlib.Path(__file__).parent
TOKENIZER = HERE.parents[1] / "varedit_jax" / "text" / "t5_tokenizer.json"

# Fields of TextConfig, then the length of the batch and of its rows: one row is full, others are padded.
ENCODERS = {
    "long": (dict(width=16, layers=2, heads=2, head_size=8, mlp_width=24, vocabulary_size=40), 200, (200, 141, 1)),
    "heads": (dict(width=24, layers=3, heads=5, head_size=4, mlp_width=40, vocabulary_size=64), 24, (24, 17)),
    "buckets": (
        dict(
            width=8,
            layers=1,
            heads=3,
            head_size=6,
            mlp_width=12,
            vocabulary_size=16,
            relative_buckets=12,
            relative_max_distance=20,
        ),
        50,
        (50,),
    ),
}

BUCKETS = ((32, 128), (12, 20), (16, 64), (64, 256))  # buckets, largest distance

PROMPTS = [
    "Turn the sky red.",
    "turn the sky red",
    "TURN THE SKY RED!!!",
    "Replace the blue circle with a green square.",
    "Remove the small yellow triangle",
    "Add a hat to the dog, then make the background a beach at sunset; keep the dog's colour.",
    "Make it look like a Van Gogh painting",
    'Write "HELLO, world" on the sign',
    "Change the text from 'open' to 'closed'",
    "change number 7 to 42, 1,000 to 3.14159 and 50% to 12½",
    "https://example.org/picture.png?size=512&mode=edit#top",
    "person@example.org",
    "C:\\pictures\\cat.jpg",
    "snake_case camelCase kebab-case SCREAMING_CASE",
    "antidisestablishmentarianism",
    "colour, color; grey - gray",
    "a",
    "A",
    ".",
    "...",
    "?!",
    "0",
    "",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    " \t\n ",
    " leading space",
    "trailing space ",
    "  two   inner    runs  ",
    "tab\tseparated\twords",
    "line\nbreak\r\nand another\n\nparagraph\n",
    "form\ffeed and vertical\vtab",
    "no-break\u00a0space, thin\u2009space, ideographic\u3000space",
    "zero\u200bwidth\u200cjoin\u200der\ufeff and soft\u00adhyphen",
    "right\u200fto\u200eleft \u202eoverride\u202c marks",
    "control \x00 \x01 \x07 \x1b[31m \x7f characters",
    "combining: e\u0301 n\u0303 a\u030a o\u0308 against \u00e9 \u00f1 \u00e5 \u00f6",
    "ligatures \ufb01 \ufb02 \ufb03, wide \uff21\uff22\uff23\uff11\uff12\uff13, circled \u2460\u2461",
    "\u2167, \u33a1, \u2122",
    "curly \u2018quotes\u2019 \u201cof\u201d \u00abmany\u00bb \u201ekinds\u201c \u2013 dashes \u2014 and \u2026",
    "math: \u221e \u2211 \u222b \u2248 \u2260 \u2264 \u00b1 \u00d7 \u00f7 \U0001d400\U0001d401",
    "money: $5 \u20ac5 \u00a35 \u00a55 \u20b95 \u20bf5",
    "\U0001f600",
    "make it \U0001f600\U0001f680\U0001f3a8",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467, flag \U0001f1e9\U0001f1ea, thumb \U0001f44d\U0001f3fd",
    "private use \ue000 and unassigned \U000e0fff",
    "<pad>",
    "</s>",
    "<unk>",
    "<extra_id_0>",
    "fill <extra_id_0> and <extra_id_99> here",
    "a</s>b",
    "< /s > <b>bold</b> &amp; &#233;",
    "▁already▁metaspaced▁",
    '{json: [1, 2], "x": null}',
    "def f(x):\n    return x ** 2  # code",
    "Поверни небо в красный",
    "把天空变成红色",
    "空を赤くしてください。",
    "하늘을 빨갖게 바꿔 줘",
    "اجعل السماء حمراء",
    "הפוך את השמיים לאדומים",
    "आसमान को लाल करो",
    "ทำให้ท้องฟ้าเป็นสีแดง",
    "Κάνε τον ουρανό κόκκινο",
    "Mach den Himmel rot und füge größere Bäume hinzu, aber nicht über Straßen.",
    "Rends le ciel rouge, s'il te plaît, et enlève l'œuvre d'à côté.",
    "Haz que el cielo sea rojo, ¿vale? ¡Rápido! Añade un niño.",
    "Fă cerul roșu și adaugă o țară întreagă în fundal.",
    "Zażółć gęślą jaźń",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Gökyüzünü kırmızı yap, İstanbul'da ışık",
    "Làm cho bầu trời đỏ",
    "Tee taivaasta punainen",
    "Maak de lucht rood",
    "Torne o céu vermelho; coração, pão e maçã",
    "word " * 700,
    "a" * 3000,
    "\u4e2d" * 900,
    "supercalifragilistic" * 40,
    " ".join(str(n) for n in range(400)),
    "!" * 1200,
    ("Turn the sky red.\n" * 150).strip(),
]

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white", "cyan", "magenta", "brown", "pink"]
SHAPES = ["circle", "square", "triangle", "star", "hexagon", "cross", "ring", "heart"]
TEMPLATES = (
    "Make the {a} {s} {b}.",
    "remove the {s} at the top-left corner",
    "Swap the {a} {s} and the {b} {t}",
    "Add {n} {a} {s}s to the right of the {t}!",
    "replace every {s} with a {b} {t} (but keep the {a} one)",
    "Move the {s} {n}px down",
    "What if the {a} {s} were {n}x larger?",
)
LENGTHS = (1, 2, 16, 64, 512)  # a prompt is also cut to one of these


def prompts() -> list[str]:
    """The fixed prompts, and drawn ones up to 320."""
    draw = random.Random(0)
    texts = list(PROMPTS)
    while len(texts) < 320:
        a, b = draw.sample(COLOURS, 2)
        s, t = draw.sample(SHAPES, 2)
        text = draw.choice(TEMPLATES).format(a=a, b=b, s=s, t=t, n=draw.randint(2, 40))
        if text not in texts:
            texts.append(text)
    return texts


def write_prompts() -> None:
    """t5_prompts.json: [text, uncut ids, length, ids cut or padded to the length without the padding's tail]."""
    tokenizer = T5TokenizerFast(tokenizer_file=str(TOKENIZER))
    rows = []
    for index, text in enumerate(prompts()):
        length = LENGTHS[index % len(LENGTHS)]
        cut = tokenizer(text, max_length=length, padding="max_length", truncation=True)
        count = sum(cut["attention_mask"])
        assert cut["input_ids"][count:] == [0] * (length - count)
        rows.append([text, tokenizer(text, verbose=False)["input_ids"], length, cut["input_ids"][:count]])
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    (HERE / "t5_prompts.json").write_text(f"[\n{lines}\n]\n")


def write_encoder(name: str, seed: int) -> None:
    """One random encoder with its input and output."""
    fields, tokens, lengths = ENCODERS[name]
    config = T5Config(
        d_model=fields["width"],
        num_layers=fields["layers"],
        num_heads=fields["heads"],
        d_kv=fields["head_size"],
        d_ff=fields["mlp_width"],
        vocab_size=fields["vocabulary_size"],
        relative_attention_num_buckets=fields.get("relative_buckets", 32),
        relative_attention_max_distance=fields.get("relative_max_distance", 128),
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Larger than at initialization, so that a wrong bucket, scale or norm shows in the features.
            std = 1.0 if "shared" in parameter_name or "relative" in parameter_name else fields["width"] ** -0.5
            offset = 1.0 if "norm" in parameter_name else 0.0
            parameter.copy_(offset + std * torch.randn(parameter.shape, generator=draw))
        ids = torch.randint(3, fields["vocabulary_size"], (len(lengths), tokens), generator=draw)
        mask = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
        ids = ids * mask
        features = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    arrays = {key: value.detach().numpy() for key, value in model.named_parameters()}
    arrays["ids"] = ids.numpy().astype(np.int32)
    arrays["lengths"] = np.asarray(lengths, np.int32)
    arrays["features"] = np.concatenate([row[:length] for row, length in zip(features.numpy(), lengths, strict=True)])
    save_file(arrays, HERE / f"t5_encoder_{name}.safetensors")


def write_buckets() -> None:
    """t5_buckets.json: [buckets, largest distance, bucket of each distance -600..600]."""
    distances = torch.arange(-600, 601)
    rows = [
        [count, far, T5Attention._relative_position_bucket(distances, True, count, far).tolist()]
        for count, far in BUCKETS
    ]
    (HERE / "t5_buckets.json").write_text(json.dumps(rows, separators=(",", ":")) + "\n")


def main() -> None:
    """Writes every file."""
    write_prompts()
    write_buckets()
    for seed, name in enumerate(ENCODERS):
        write_encoder(name, seed)
    configs = {name: fields for name, (fields, _, _) in ENCODERS.items()}
    (HERE / "t5_encoders.json").write_text(json.dumps(configs, indent=1) + "\n")


if __name__ == "__main__":
    main()
