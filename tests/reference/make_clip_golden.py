"""Writes tests/golden/clip_text and tests/golden/clip with transformers and torch.

    python -m tests.reference.make_clip_golden tests/golden

The weights are random. The vocabulary is a small version of CLIP's: all bytes, all bytes at the end
of a word, and a few merges. `clip` has both towers, and images that are not square.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

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


def tokens_and_mask(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes the vocabulary; returns ids and mask of the captions."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    encoded = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=POSITIONS)
    return np.array(encoded["input_ids"]), np.array(encoded["attention_mask"]).astype(bool)


def randomize(model: torch.nn.Module) -> None:
    """Adds noise to all parameters: an error in one that is zero or one would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = 1.0 if name.endswith("weight") and "norm" in name else 0.0
            parameter.copy_(start + 0.3 * torch.randn_like(parameter))


def text_fields() -> dict:
    count = len(vocabulary())
    return {
        "vocab_size": count,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "projection_dim": 16,
        "bos_token_id": count - 2,
        "eos_token_id": count - 1,
        "pad_token_id": count - 1,
    }


def make_text(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokens, mask = tokens_and_mask(folder)
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(CLIPTextConfig(**text_fields())).eval()
    randomize(model)
    with torch.no_grad():
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


def make_whole(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokens, mask = tokens_and_mask(folder)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 7,
        "projection_dim": 16,
    }
    config = CLIPConfig(text_config=text_fields(), vision_config=vision, projection_dim=16)
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    randomize(model)
    size = {"shortest_edge": 28}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 28, "width": 28})
    rng = np.random.default_rng(0)
    pictures = {
        f"picture_{i}": rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        for i, shape in enumerate([(60, 41), (33, 50), (28, 28)])
    }
    inputs = processor(list(pictures.values()), return_tensors="np")["pixel_values"]
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            pixel_values=torch.tensor(inputs),
        )
        text = model.text_projection(model.text_model(torch.tensor(tokens)).pooler_output)
        picture = model.visual_projection(model.vision_model(torch.tensor(inputs)).pooler_output)
    cosines = (out.logits_per_image / model.logit_scale.exp()).detach()
    model.save_pretrained(folder)
    np.savez_compressed(
        folder / "golden.npz",
        **pictures,
        inputs=inputs.transpose(0, 2, 3, 1),
        captions=np.array(CAPTIONS),
        picture_embeddings=picture.numpy(),
        text_embeddings=text.numpy(),
        cosines=cosines.numpy(),
    )


def main() -> None:
    make_text(pathlib.Path(sys.argv[1]) / "clip_text")
    make_whole(pathlib.Path(sys.argv[1]) / "clip")


if __name__ == "__main__":
    main()
