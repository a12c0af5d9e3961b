"""Makes tests/golden/clip_text with transformers and torch, from random weights.

    python -m tests.reference.make_clip_golden tests/golden/clip_text

The vocabulary is CLIP's in small: all bytes, all bytes at a word's end, and a few merges.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

CAPTIONS = [
    "a red circle above a blue square",
    "A RED   Circle,\n 3 of them!",
    "it's the café's 12th naïve 日本語 picture 🎉",
    "",
    "reddish redredred cir circles",
    "a red circle above a blue square " * 4,
]
MERGES = [
    "r e",
    "re d</w>",
    "re d",
    "c i",
    "ci r",
    "cir c",
    "circ l",
    "circl e</w>",
    "a b",
    "' s</w>",
]
POSITIONS = 32


def vocabulary() -> dict[str, int]:
    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [f"{letter}</w>" for letter in letters]
    pieces += [merge.replace(" ", "") for merge in MERGES]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(pieces)}


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    vocab = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    encoded = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=POSITIONS)
    tokens, mask = np.array(encoded["input_ids"]), np.array(encoded["attention_mask"]).astype(bool)

    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            projection_dim=16,
            bos_token_id=len(vocab) - 2,
            eos_token_id=len(vocab) - 1,
            pad_token_id=len(vocab) - 1,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Nothing stays at its start of zero or one, where a mistake would not show.
            start = 1.0 if name.endswith("weight") and "norm" in name else 0.0
            parameter.copy_(start + 0.3 * torch.randn_like(parameter))
        out = model(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), output_hidden_states=True
        )
    model.save_pretrained(folder)
    np.savez_compressed(
        folder / "encoder_golden.npz",
        tokens=tokens,
        mask=mask,
        penultimate=out.hidden_states[-2].numpy(),
        captions=np.array(CAPTIONS),
    )


if __name__ == "__main__":
    main()
