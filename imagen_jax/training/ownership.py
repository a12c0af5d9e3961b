"""One run per workdir, also where several machines share it and the file system has no locks.

The run that owns a workdir keeps a record in WORKDIR/owner.N.json, in a bucket in
WORKDIR/owner/owner.N.json, and rewrites it every HEARTBEAT seconds. N grows with every owner; a
file of the next number, which one process alone can create, makes the next owner. An owner is dead
if its process is gone, where that can be seen from here, or if its record did not change for
DEAD_AFTER seconds by the clock of the waiting run. Clocks of different machines are never compared.
An owner that was suspended for longer finds the next record before it saves, and stops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath

from imagen_jax.io import buckets, mirrors
from imagen_jax.parallel import distributed
from imagen_jax.training import workdirs

HEARTBEAT = 10.0
DEAD_AFTER = 60.0

_NAME = re.compile(r"owner\.(\d+)\.json")


class OwnershipError(ValueError):
    """Another run owns the workdir; the message names its machine, process and last heartbeat."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a record says about its owner.

    Attributes:
      host: name of the machine.
      process: id of the process.
      machine: identifies kernel and PID namespace; "": unknown.
      started: start of the process in the kernel's ticks, as ids are used again.
      token: different for every run.
      heartbeat: time of the last heartbeat by the owner's clock, ISO 8601.
      released: the run has ended.
    """

    host: str = ""
    process: int = 0
    machine: str = ""
    started: int = 0
    token: str = ""
    heartbeat: str = ""
    released: bool = False


class Ownership:
    """Ownership of a workdir by this process, from `acquire` to `release`."""

    def __init__(self, workdir: str, log: Callable[[str], None] = print):
        """Args: workdir: folder of the run. log: called with one line when `acquire` must wait."""
        self._folder, self._log = epath.Path(workdir), log
        # A folder of its own in a bucket: its list is short.
        self._address = mirrors.origin(self._folder / "owner")
        self._record = Record(
            host=socket.gethostname(),
            process=os.getpid(),
            machine=_machine(),
            started=(_state_of(os.getpid()) or ("", 0))[1],
            token=secrets.token_hex(8),
        )
        self._number = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)

    def acquire(self) -> None:
        """Becomes the owner; waits up to DEAD_AFTER seconds for the heartbeat of another one.

        Raises:
          OwnershipError: another run owns the workdir.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            number, owner = self._newest()
            if number >= 0 and self._is_alive(number, owner):
                raise OwnershipError(
                    f"--workdir={self._folder} belongs to a run: {_describe(owner)}; stop it, or "
                    "name another workdir"
                )
            if self._newest()[0] != number or not self._create(number + 1):
                continue
            if self._newest()[0] == number + 1:
                break
            # This process stood still before it wrote: later owners have come, and the number was
            # free because they had removed it.
            self._remove(number + 1)
        self._number = number + 1
        for older in self._numbers():
            if older < self._number:
                self._remove(older)
        self._thread.start()

    def check(self) -> None:
        """Raises OwnershipError if another run has taken the workdir over; call before a save."""
        try:
            number, owner = self._newest()
            if number < self._number:  # Someone has removed the records.
                self._write()
                return
        except OSError:  # It says nothing about the owner, and the save will meet it too.
            return
        if number > self._number or owner.token not in ("", self._record.token):
            raise OwnershipError(
                f"--workdir={self._folder} was taken over by another run ({_describe(owner)}), as "
                f"this one gave no heartbeat for {DEAD_AFTER:g} s; nothing more is saved here"
            )

    def release(self) -> None:
        """Gives the workdir free for the next run."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._number >= 0:
            with contextlib.suppress(OwnershipError, OSError):
                self.check()
                self._write(released=True)

    def _is_alive(self, number: int, owner: Record) -> bool:
        """Whether the owner lives: it is seen, or its record changes while this process waits."""
        if owner.released:
            return False
        here = owner.machine and owner.machine == self._record.machine
        if here and (seen := _state_of(owner.process)) is not None:
            state, started = seen
            return started == owner.started and state not in ("Z", "X", "")
        self._log(
            f"{self._folder} was in use: {_describe(owner)}; waiting up to {DEAD_AFTER:g} s for "
            "a heartbeat"
        )
        before, end = self._content(number), time.monotonic() + DEAD_AFTER
        while time.monotonic() < end:
            time.sleep(min(1.0, DEAD_AFTER / 10))
            try:
                now = self._content(number)
                newest, other = self._newest()
            except OSError:  # A file system that fails for a while says nothing of the owner.
                continue
            if newest != number:
                return self._is_alive(newest, other)
            if now != before:
                return not other.released
        return False

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            # A file system that fails for a while costs heartbeats, not the run.
            with contextlib.suppress(OSError):
                try:
                    self.check()
                except OwnershipError:
                    return  # Known to the next save.
                self._write()

    def _write(self, *, released: bool = False) -> None:
        path = self._path(self._number)
        if self._address:
            buckets.write(self._in_bucket(self._number), self._text(released=released).encode())
            return
        temporary = path.with_name(f".{path.name}.{self._record.token}.tmp")
        temporary.write_text(self._text(released=released))
        temporary.replace(path)

    def _create(self, number: int) -> bool:
        """Creates the record of that number; False if another process did."""
        path, text = self._path(number), self._text()
        try:
            if self._address:
                buckets.write(self._in_bucket(number), text.encode(), new=True)
            else:
                with pathlib.Path(path).open("x") as file:
                    file.write(text)
        except FileExistsError:
            return False
        return True

    def _remove(self, number: int) -> None:
        if self._address:
            buckets.delete([self._in_bucket(number)])
        else:
            self._path(number).unlink(missing_ok=True)

    def _in_bucket(self, number: int) -> str:
        return buckets.join(str(self._address), f"owner.{number}.json")

    def _text(self, *, released: bool = False) -> str:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        record = dataclasses.replace(self._record, heartbeat=now, released=released)
        return json.dumps(dataclasses.asdict(record))

    def _newest(self) -> tuple[int, Record]:
        """Number and content of the newest record; -1 without one."""
        number = max(self._numbers(), default=-1)
        return number, self._read(number)

    def _numbers(self) -> list[int]:
        if self._address:
            names = buckets.names(self._address)
        else:
            names = [path.name for path in self._folder.glob("owner.*.json")]
        return [int(name[1]) for name in map(_NAME.fullmatch, names) if name]

    def _read(self, number: int) -> Record:
        """A record; an empty one if it is being written or is gone."""
        try:
            values = json.loads(self._content(number))
            return Record(
                **{field.name: values[field.name] for field in dataclasses.fields(Record)}
            )
        except (ValueError, KeyError, TypeError):
            return Record()

    def _content(self, number: int) -> bytes:
        """A record as it is written, also by another version; b"" if it is gone."""
        try:
            if self._address:
                return buckets.read(self._in_bucket(number)).data
            return self._path(number).read_bytes()
        except FileNotFoundError:
            return b""

    def _path(self, number: int) -> epath.Path:
        return self._folder / f"owner.{number}.json"


@contextlib.contextmanager
def owned(workdir: str, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A context in which this run owns `workdir`; every process must enter it.

    Yields:
      Raises OwnershipError if the run no longer owns it; call before a save. Of several processes,
      the first one keeps the record.

    Raises:
      OwnershipError: in all processes.
    """
    ownership = Ownership(workdir, log) if distributed.is_first() else None
    refused = ""
    try:
        if ownership:
            ownership.acquire()
    except OwnershipError as error:
        refused = str(error)
    if refused := distributed.share(refused)[0]:
        raise OwnershipError(refused)
    check = ownership.check if ownership else lambda: None
    try:
        workdirs.begin(workdir, check)
        yield check
        workdirs.publish(workdir)  # An error here is one of the run.
    finally:
        workdirs.end(workdir)
        if ownership:
            ownership.release()


def _describe(owner: Record) -> str:
    if not owner.host:
        return "its record cannot be read"
    return f"process {owner.process} on {owner.host}, last heartbeat {owner.heartbeat}"


def _machine() -> str:
    """Kernel and PID namespace, within which a process id means one process; "" if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state_of(process: int) -> tuple[str, int] | None:
    """State and start of a process in the kernel's ticks; ("", 0) without one, None if unknown."""
    try:
        text = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return "", 0
        except OSError:
            pass
        return None  # It lives, and belongs to a user whose processes cannot be looked up.
    fields = text.rpartition(")")[2].split()  # A program's name may hold spaces.
    return fields[0], int(fields[19])
