"""Where an index is kept: beside the data, or in a cache where these are read-only."""

from __future__ import annotations

import hashlib
import os
import pathlib
import stat
import tempfile
import warnings

from imagen_jax.config.fields import ConfigError


def cache_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Where an index may be: `folder`, the user's cache, the user's folder of temporary files.

    The last one is for read-only data and a user without a home folder, as in containers. Its name
    is the same in every command, so the index is found again.
    """
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    homes = [pathlib.Path(home) / "imagen_jax"] if os.path.isabs(home) else []
    own = [root for root in (_temporary(),) if not root.exists() or _is_own(root)]
    return [folder, *(root / name for root in (*homes, *own))]


def _temporary() -> pathlib.Path:
    return pathlib.Path(tempfile.gettempdir()) / f"imagen_jax_{os.getuid()}"


def _is_own(folder: pathlib.Path) -> bool:
    """Whether this is a folder, no link, of this user."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def writable(folders: list[pathlib.Path]) -> pathlib.Path:
    """The first folder that is writable, created if missing; warns if it is a temporary one.

    Raises:
      ConfigError: none is.
    """
    for folder in folders:
        is_temporary = folder.parent == _temporary()
        try:
            if is_temporary:
                folder.parent.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            if is_temporary:
                warnings.warn(
                    f"the index is kept in {folder}, which the system may delete: neither the data "
                    "nor a home folder is writable; set XDG_CACHE_HOME to a lasting folder",
                    stacklevel=2,
                )
            return folder
    names = ", ".join(map(str, folders))
    raise ConfigError(f"no folder for the index is writable ({names}); set XDG_CACHE_HOME to one")
