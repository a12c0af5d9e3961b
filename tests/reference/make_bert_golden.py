"""Writes tests/golden/bert with transformers 4 and torch.

    python -m tests.reference.make_bert_golden tests/golden VOCAB_TXT

VOCAB_TXT is the vocabulary of a public BERT. A few hundred of its pieces are kept, the weights are
random. The ids are those of transformers' tokenizer in plain Python, which transformers 5 no longer
has; it shares no code with the package tokenizers.
"""

import json
import pathlib
import string
import sys

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, BertTokenizerFast

CAPTIONS = [
    "raven",
    "A black bird, sitting on a fire-truck!",
    "grinning face with smiling eyes",
    "it's the café's 12th naïve piñata; ÀÉÎ",
    "cafe\u0301 re\u0301sume\u0301",
    "日本語の猫 and 한국어 and 中文字",
    "party 🎉 astronaut 👩🏽\u200d🚀 flag 🇯🇵 keycap 1️⃣",
    "",
    " \t\n\u00a0\u3000 ",
    "a\tb\nc\u00a0d\u3000e\u2003f",
    "zero\u200bwidth \ufeffmark soft\u00adhyphen nul\x00 bell\x07 \ufffd",
    "a" * 100,
    "a" * 101 + " bird",
    "antidisestablishmentarianism unbirdlike facetruckfire",
    "[CLS] bird [SEP] [MASK] [UNK] [PAD] [sep] [ SEP ]",
    "##ing # hash $100 ^ `x` ~ <tag> @home c++ a/b {x} |y| \\z _w_ 50%",
    "İstanbul ıstanbul STRASSE straße ﬁre ½ ² ٣ ﷺ Ωmega ПТИЦА ñandú",
    "don't—can’t “quoted” … ¡hola! ¿qué? «x» 、。！",
    "a bird on a fire truck " * 8,
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
POSITIONS = 40
# Name in the golden file -> settings of tokenizer_config.json.
SETTINGS = {
    "uncased": {"do_lower_case": True},
    "cased": {"do_lower_case": False},
    "accents": {"do_lower_case": True, "strip_accents": False},
    "chinese": {"do_lower_case": True, "tokenize_chinese_chars": False},
}


def vocabulary(source: pathlib.Path) -> list[str]:
    """Pieces of a public vocabulary: those of the captions, and single characters."""
    whole = BertTokenizer(str(source))
    pieces = whole.get_vocab()
    wanted = {piece for caption in CAPTIONS for piece in whole.tokenize(caption)}
    for letter in string.ascii_lowercase + string.digits:
        wanted |= {letter, f"##{letter}"}
    wanted |= set(string.punctuation) | {"é", "##é", "a", "the", "truck", "##ly", "##s"}
    kept = sorted((piece for piece in wanted if piece in pieces), key=lambda piece: pieces[piece])
    return SPECIAL + [piece for piece in kept if piece not in SPECIAL]


def randomize(model: torch.nn.Module) -> None:
    """Noise in all parameters: an error in one that is zero or one would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(start + 0.3 * torch.randn_like(parameter))


def tokenize(folder: pathlib.Path, settings: dict) -> dict[str, np.ndarray]:
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), **settings)
    encoded = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=POSITIONS)
    return {
        "tokens": np.array(encoded["input_ids"]),
        "mask": np.array(encoded["attention_mask"]).astype(bool),
    }


def main() -> None:
    folder = pathlib.Path(sys.argv[1]) / "bert"
    folder.mkdir(parents=True, exist_ok=True)
    pieces = vocabulary(pathlib.Path(sys.argv[2]))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    # As in public folders, tokenizer.json also holds truncation and padding.
    fast = BertTokenizerFast(str(folder / "vocab.txt")).backend_tokenizer
    fast.enable_truncation(8)
    fast.enable_padding(length=8)
    fast.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS["uncased"]) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
    )
    model = BertForMaskedLM(config).eval()
    randomize(model)
    ids = {name: tokenize(folder, settings) for name, settings in SETTINGS.items()}
    with torch.no_grad():
        out = model(
            torch.tensor(ids["uncased"]["tokens"]),
            attention_mask=torch.tensor(ids["uncased"]["mask"]),
            output_hidden_states=True,
        )
    hidden = torch.stack(out.hidden_states).numpy() * ids["uncased"]["mask"][..., None]
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        folder / "encoder_golden.npz",
        hidden_states=hidden.astype(np.float32),
        captions=np.array(CAPTIONS),
        **{f"{kind}_{name}": array for name, row in ids.items() for kind, array in row.items()},
    )


if __name__ == "__main__":
    main()
