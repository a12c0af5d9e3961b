"""A TPU slice of this machine's folders: stand-ins for gcloud, and for what its workers call.

Each worker has a home folder of its own, and finds the others over loopback.
"""

import os
import pathlib
import shutil
import subprocess
import sys

WORKERS = 4

# $POD holds a folder for each worker. `ssh` runs the command on all of them at once, and its status
# is that of a worker that failed.
GCLOUD = """
pod_workers() { case "$*" in *--worker=[0-9]*) echo "$*" | grep -o 'worker=[0-9]*' | tr -dc '0-9' ;;
  *) ls "$POD" ;; esac; }
case $4 in
  create) for i in $(seq 0 $((WORKERS - 1))); do mkdir -p "$POD/$i"; done ;;
  scp) for i in $(pod_workers "$@"); do cp "$5" "$POD/$i/${6#*:}"; done ;;
  ssh)
    for word; do case $word in --command=*) command=${word#*=} ;; esac; done
    pids=() status=0
    for i in $(pod_workers "$@"); do
      (cd "$POD/$i" && HOME=$PWD XDG_CACHE_HOME=$PWD/cache WORKER=$i exec bash -c "$command") &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    exit $status ;;
  delete) mv "$POD" "$POD.deleted" ;;
  *) exit 64 ;;
esac
"""
# The metadata server of Google's machines.
CURL = """
case $* in
  *agent-worker-number*) echo "$WORKER" ;;
  *worker-network-endpoints*)
    line=$(for i in $(seq 1 "$WORKERS"); do printf 'unknown:unknown:127.0.0.1,'; done)
    echo "${line%,}" ;;
  *) exit 22 ;;
esac
"""
# uv: the virtual environment of a worker is that of the tests.
PYTHON3 = """
case $* in
  *'uv venv'*)
    mkdir -p .venv/bin
    printf '#!/bin/sh\\nexec %s "$@"\\n' "$INTERPRETER" >.venv/bin/python
    chmod +x .venv/bin/python ;;
  *'uv pip install'*) [ -e constraints.txt ] && [ -e setup.py ] ;;
  *'pip install'*) ;;
  *) exit 64 ;;
esac
"""
# The user watches the log until the training ends, then presses Ctrl-C.
TAIL = """
while [ -e train.pid ] && kill -0 "$(<train.pid)" 2>/dev/null; do sleep 0.5; done
cat train.log
"""
IMAGEN = 'exec "$INTERPRETER" -m imagen_jax "$@"'


def write_tools(folder: pathlib.Path) -> None:
    """Writes the stand-ins, for PATH."""
    folder.mkdir()
    tools = {"gcloud": GCLOUD, "curl": CURL, "python3": PYTHON3, "tail": TAIL, "imagen": IMAGEN}
    for name, code in tools.items():
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Variables of a shell in which the tools of `folder`/tools stand for a pod."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return plain | {
        "PATH": f"{folder / 'tools'}:{os.environ['PATH']}",
        "POD": str(folder / "pod"),
        "WORKERS": str(WORKERS),
        "INTERPRETER": sys.executable,
        "XDG_CACHE_HOME": str(folder / "laptop"),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def checkout(folder: pathlib.Path, root: pathlib.Path, files: dict[str, str]) -> None:
    """A git repository with the code of `root` and further files, committed."""
    names = ["imagen_jax", "configs", "launch", "setup.py", "constraints.txt"]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *names],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)  # With its mode.
    for name, text in files.items():
        (folder / name).write_text(text)
    identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "Start"]):
        subprocess.run(["git", *words], cwd=folder, check=True)


def end(folder: pathlib.Path) -> None:
    """Ends what a failed test has left on the workers."""
    for file in (folder / "pod").glob("*/imagen_jax/train.pid"):
        # keep_running.sh leads a session; the training has a process group of its own.
        subprocess.run(["pkill", "-KILL", "-s", file.read_text().strip()], check=False)
