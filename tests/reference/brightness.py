"""A scorer beside those of the package: rows of the kinds `dark` and `bright`."""

import numpy as np

from imagen_jax.evaluation import samples


class Brightness:
    def can_score(self, row):
        return row.get("kind") in ("dark", "bright")

    def real_image(self, row, *, index, size=None):
        return np.full((size or 8, size or 8, 3), 255 * (row["kind"] == "bright"), np.uint8)

    def score_folder(self, samples_dir):
        return {k: tally["scores"] for k, tally in self.evaluate(samples_dir)["kinds"].items()}

    def evaluate(self, samples_dir, by="kind"):
        rows, hits = samples.read_rows(samples_dir), {}
        for row in rows:
            bright = samples.load(samples_dir, row["file"]).mean() > 127
            hits.setdefault(row[by], []).append(bool(bright == (row["kind"] == "bright")))
        kinds = {}
        for kind, marks in hits.items():
            rate = {"mean": float(np.mean(marks)), "low": 0.0, "high": 1.0, "n": len(marks)}
            kinds[kind] = {"n": len(marks), "scores": {"exact": rate}, "ceiling": {}, "chance": {}}
        return {"title": "Brightness", "pictures": len(rows), "kinds": kinds}

    def format_table(self, report):
        kinds = report["kinds"].items()
        return "\n".join(f"{kind} {tally['scores']['exact']['mean']:.2f}" for kind, tally in kinds)


SCORER = Brightness()
