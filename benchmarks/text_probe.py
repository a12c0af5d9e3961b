"""What a linear map reads from a frozen encoder's vectors: who is where, and what each object is.

    .venv/bin/python benchmarks/text_probe.py --text=runs/demo/text

At the word for an object's colour in captions of two objects the map, least squares from captions
of the split `train`, is asked for the object's place in the relation (left, right, above, below),
its shape, and its colour; at the first object of a number for how many there are. Scored on the
split `held_out`. A place is a coin flip (.50) for an encoder that does not know roles. It takes
seconds, where a training of the picture model takes minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from imagen_jax.config.schema import TextConfig
from imagen_jax.text.encoders import TextEncoder, embed_prompts, load_text_encoder
from imagen_jax.worlds.shapes import scenes as shapes
from imagen_jax.worlds.shapes.scenes import Scene

Examples = tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]

RIDGE = 1e-2
MAX_LEN = 24
CAPTIONS = {"train": 1_500, "held_out": 500}


def scenes(split: str, kind: str) -> list[Scene]:
    """The first scenes of a kind in a split; of relations those with two colours."""
    found: list[Scene] = []
    index = 0
    while len(found) < CAPTIONS[split]:
        scene = shapes.scene(split, index)
        index += 1
        colours = {thing.color for thing in scene.objects}
        if scene.kind == kind and (kind != "relation" or len(colours) == 2):
            found.append(scene)
    return found


def examples(
    encoder: TextEncoder, shown: list[Scene], label: Callable[[Scene, int], int]
) -> Examples:
    """Vectors at the colour words that are one token, and what is asked of each."""
    words = {colour: int(encoder.tokenize([colour]).ids[0, 0]) for colour in shapes.COLORS}
    captions = [scene.caption for scene in shown]
    ids = encoder.tokenize(captions).ids
    vectors, _ = embed_prompts(encoder, captions, batch_size=64, max_len=MAX_LEN)
    inputs, labels = [], []
    for scene, row, emb in zip(shown, ids, vectors, strict=True):
        asked = range(2) if scene.relation else range(1)
        for k in asked:
            places = np.flatnonzero(row == words[scene.objects[k].color])
            if len(places) == 1:
                inputs.append(np.asarray(emb[places[0]], np.float64))
                labels.append(label(scene, k))
    return np.stack(inputs), np.array(labels)


def accuracy(train: Examples, test: Examples) -> float:
    """Share of `test` that the least-squares map from `train` gets right."""
    (x, y), (x_test, y_test) = train, test
    x, x_test = (np.pad(part, ((0, 0), (0, 1)), constant_values=1) for part in (x, x_test))
    wanted = np.eye(y.max() + 1)[y]
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ wanted)
    return float(np.mean((x_test @ weights).argmax(1) == y_test))


def place(scene: Scene, k: int) -> int:
    """Which of RELATIONS object k is in."""
    said = scene.relation
    word = said.word if k == said.first else shapes.OPPOSITE[said.word]
    return shapes.RELATIONS.index(word)


QUESTIONS: dict[str, tuple[str, Callable[[Scene, int], int]]] = {
    "place": ("relation", place),
    "axis": ("relation", lambda scene, k: place(scene, k) // 2),
    "own_shape": ("relation", lambda scene, k: shapes.SHAPES.index(scene.objects[k].shape)),
    "own_colour": ("relation", lambda scene, k: list(shapes.COLORS).index(scene.objects[k].color)),
    "number": ("count", lambda scene, k: len(scene.objects) - 2),
}


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="folder of the encoder")
    path = parser.parse_args().text
    encoder = load_text_encoder(TextConfig(path=path, max_len=MAX_LEN))
    right = {}
    for name, (kind, label) in QUESTIONS.items():
        train, test = (examples(encoder, scenes(split, kind), label) for split in CAPTIONS)
        right[name] = round(accuracy(train, test), 3)
    print(json.dumps({"text": path, "captions": CAPTIONS, "right": right}))


if __name__ == "__main__":
    main()
