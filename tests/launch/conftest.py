"""Stand-ins for the tools of clouds and clusters: programs that record their arguments."""

import pytest


@pytest.fixture
def tools(tmp_path):
    """A folder for stand-ins: tools(name=shell code, ...) -> the folder."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def make(**programs):
        for name, code in programs.items():
            (folder / name).write_text(f"#!/bin/bash\n{code}\n")
            (folder / name).chmod(0o755)
        return folder

    return make


@pytest.fixture
def recorder(tools, tmp_path):
    """A folder of stand-ins that record their arguments, and `calls()`, which returns them."""
    notes = tmp_path / "calls"
    # In one write, as several stand-ins may run at once.
    note = f'echo "$(printf \'%s\\x1f\' "${{0##*/}}" "$@")" >>{notes}'
    names = ("gcloud", "git", "mkdir", "sbatch", "scontrol", "xpk")
    folder = tools(**dict.fromkeys(names, note), kubectl=f"{note}; cat >{notes}.stdin")

    def calls():
        text = notes.read_text() if notes.exists() else ""
        notes.unlink(missing_ok=True)
        return [line.removesuffix("\x1f").split("\x1f") for line in text.split("\n")[:-1]]

    return folder, calls
