"""Writes the tables of docs/plan.md; every row is one run of `imagen plan`.

    .venv/bin/python benchmarks/plan_table.py --out=runs/plans --docs=docs/plan.md

Needs the extra `tpu` and, for the largest models, 8 GB of memory; a row takes some minutes. A row
with a file in --out is not run again; a table of --docs has the rows with a file.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import resource
import subprocess
import sys
import time

import reporting

GIB = 2**30
IMAGEN = [sys.executable, "-m", "imagen_jax"]

# Batch 2048 as in the paper; settings found with `plan --search` or by hand.
TRAIN = [
    ("base_64", "v4-512", "--config.mesh.fsdp=16"),
    ("base_64", "v5e-256", "--config.mesh.fsdp=16"),
    ("base_64", "v5p-128", "--config.mesh.fsdp=16"),
    ("base_64", "v4-128", "--config.mesh.fsdp=16 --config.train.accumulation=4"),
    ("base_64", "v6e-64", "--config.mesh.fsdp=16 --config.train.accumulation=4"),
    ("sr_256", "v4-128", "--config.mesh.fsdp=4 --config.train.accumulation=8"),
    ("sr_1024", "v4-128", "--config.mesh.fsdp=4 --config.train.accumulation=8"),
    ("sr_256", "v5e-256", "--config.mesh.fsdp=4 --config.train.accumulation=4"),
    ("sr_1024", "v5e-256", "--config.mesh.fsdp=4 --config.train.accumulation=4"),
    ("sr_256", "v5p-128", "--config.mesh.fsdp=4 --config.train.accumulation=4"),
    ("sr_1024", "v5p-128", "--config.mesh.fsdp=4 --config.train.accumulation=4"),
    ("sr_256", "v6e-64", "--config.mesh.fsdp=4 --config.train.accumulation=8"),
    ("sr_1024", "v6e-64", "--config.mesh.fsdp=4 --config.train.accumulation=8"),
]
# The paper's cascade with T5-XXL; the last row has one image of 1024 pixels on all chips.
CASCADE = "--cascade=configs/imagen.py:sr_256,configs/imagen.py:sr_1024"
XXL_BF16 = "--config.text.preset=t5_v1_1_xxl --config.text.dtype=bfloat16"
SPATIAL = '--stage_settings={"sr_1024":{"height":8,"batch_size":1}}'
SAMPLE = [
    ("base_64", slice_name, f"--stage=sample {CASCADE} {XXL_BF16}")
    for slice_name in ("v5e-8", "v6e-8", "v4-8", "v5p-8")
] + [("base_64", "v5e-8", f"--stage=sample {CASCADE} {XXL_BF16} {SPATIAL}")]
XXL = "--config.text.preset=t5_v1_1_xxl --config.text.dtype=bfloat16 --config.mesh.fsdp="
EMBED = [
    ("base_64", slice_name, f"--stage=embed --batch={batch} {XXL}{fsdp}")
    for slice_name, batch, fsdp in (
        ("v5e-8", 256, 8),
        ("v4-8", 256, 4),
        ("v4-128", 2048, 4),
        ("v5e-256", 8192, 8),
        ("v5p-128", 2048, 4),
        ("v6e-64", 2048, 4),
    )
]
TABLES = {"train": TRAIN, "embed": EMBED, "sample": SAMPLE}


def command(model: str, slice_name: str, rest: str) -> list[str]:
    """The arguments of `imagen` for a row."""
    return [
        "plan",
        f"--config=configs/imagen.py:{model}",
        f"--topology={slice_name}",
        *rest.split(),
        "--mfu=0.4",
    ]


def row_name(table: str, row: tuple[str, str, str]) -> str:
    """Name of a row and of its file."""
    return f"{table}_{row[0]}_{row[1]}" + ("_height" if "height" in row[2] else "")


def run_row(out: pathlib.Path, table: str, row: tuple[str, str, str]) -> None:
    """Runs a row unless its file exists. A failed row is printed and omitted from the table."""
    path = out / f"{row_name(table, row)}.json"
    if path.is_file() and json.loads(path.read_text())["command"] == command(*row):
        return
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    numbers = path.with_suffix(".numbers")
    arguments = command(*row)
    print("imagen", *arguments, flush=True)
    done = subprocess.run(
        [*IMAGEN, *arguments, f"--json={numbers}"], capture_output=True, text=True
    )
    if done.returncode:
        print(done.stderr.strip(), flush=True)
        return
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    path.write_text(
        json.dumps(
            {
                "command": arguments,
                "numbers": json.loads(numbers.read_text()),
                "text": done.stdout,
                "seconds": time.monotonic() - begin,
                "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                # ru_maxrss is the maximum over all rows of this process so far.
                "host_gib": after.ru_maxrss / 2**20,
            },
            indent=2,
        )
        + "\n"
    )
    numbers.unlink()
    print(done.stdout, flush=True)


def sample_markdown(out: pathlib.Path) -> str:
    """Markdown table of the cascades that have a file: a row per program."""
    lines = [
        "| slice | program | images at a time | fsdp | height | arguments | temporaries | peak "
        "| capacity | TFLOP | sent | fits |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    commands = []
    for row in SAMPLE:
        path = out / f"{row_name('sample', row)}.json"
        if not path.is_file():
            continue
        kept = json.loads(path.read_text())
        whole = kept["numbers"]
        commands.append(f"- `imagen {' '.join(kept['command'])}`: keep={whole['keep']}")
        for program in whole["programs"]:
            memory = [f"{v / GIB:.2f}" for v in program["hbm_per_chip"].values()]
            sent = sum(c["bytes"] for c in program["collectives"]) / GIB
            cells = [row[1], program["name"], program["batch"], program["fsdp"], program["height"]]
            cells += [*memory, f"{program['flops_per_chip_step'] / 1e12:.4g}", f"{sent:.2f}"]
            lines.append(f"| {' | '.join(map(str, [*cells, yes(program['fits'])]))} |")
        cells = [
            row[1],
            "cascade",
            "",
            "",
            "",
            "",
            "",
            f"{whole['hbm_per_chip']['peak'] / GIB:.2f}",
        ]
        cells += [f"{whole['hbm_per_chip']['capacity'] / GIB:.2f}", "", "", yes(whole["fits"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *commands])


def yes(fits: bool) -> str:
    return "yes" if fits else "no"


def markdown(out: pathlib.Path, table: str) -> str:
    """Markdown table of the rows that have a file."""
    if table == "sample":
        return sample_markdown(out)
    what = "days" if table == "train" else "chip-hours"
    lines = [
        "| model | slice | at a time | arguments | temporaries | peak | capacity | fits "
        f"| TFLOP | sent | seconds | {what} | `imagen plan` |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in TABLES[table]:
        model, slice_name, _ = row
        path = out / f"{row_name(table, row)}.json"
        if not path.is_file():
            continue
        kept = json.loads(path.read_text())
        numbers, text = kept["numbers"], kept["text"]
        memory = [f"{v / GIB:.2f}" for v in numbers["hbm_per_chip"].values()]
        sent = sum(c["bytes"] for c in numbers["collectives"]) / GIB
        cells = [
            "t5_v1_1_xxl" if table == "embed" else model,
            slice_name,
            re.search(r"(\d+) \w+ at a time", text)[1],
            *memory,
            "yes" if numbers["fits"] else "no",
            f"{numbers['flops_per_chip_step'] / 1e12:.4g}",
            f"{sent:.2f}",
            _number(text, "seconds"),
            _number(text, what),
            "`" + " ".join(kept["command"][1:]) + "`",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(text: str, name: str) -> str:
    return re.search(rf"^  {name} +(\S+)", text, re.M)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/plans")
    parser.add_argument("--docs", default="", help="page whose tables of these rows are updated")
    parser.add_argument("--only", default="", help="rows to run, such as train_sr_256; '': all")
    flags = parser.parse_args()
    out = pathlib.Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    chosen = {
        table: [row for row in rows if flags.only in row_name(table, row)]
        for table, rows in TABLES.items()
    }
    for table, rows in chosen.items():
        for row in rows:
            run_row(out, table, row)
    for table in (table for table, rows in chosen.items() if rows):
        text = markdown(out, table)
        print(f"\n{text}")
        if flags.docs:
            reporting.write_between(flags.docs, table, text)


if __name__ == "__main__":
    main()
