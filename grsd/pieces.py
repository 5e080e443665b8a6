"""A store for pieces of work: each is made once, kept whole, and checked whenever it is read again.

A piece is the answer to its *inputs* by some *code*. Both make its key, so that a change of either
makes it anew and leaves everything else alone. A JSON piece is the file ``KEY.json``; a folder
piece is the folder ``KEY``, which counts once its manifest stands. Runs, experiments, sweeps,
suites and corpora are kept this way: `Store` says how, `grsd.dependencies.code` what the code of a
module is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from grsd.dependencies import code, imported, sha256
from grsd.results import atomic_write, dumps

__all__ = ["MANIFEST", "Store", "code", "imported", "key"]

MANIFEST = "piece.json"  # of a folder piece; written last

Inputs = Mapping[str, Any]
Content = dict[str, Any]


def key(inputs: Inputs, code: str) -> str:
    """24 hex digits that name the answer of ``code`` to ``inputs``; equal JSON gives equal keys."""
    return hashlib.sha256(dumps([code, inputs], where="inputs").encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Store:
    """Pieces of one kind, made by one code.

    Attributes
    ----------
    root : Path
        The folder that holds them; made when first needed.
    code : str
        What `code` says of the module that makes them.
    """

    root: Path
    code: str

    def path(self, inputs: Inputs) -> Path:
        """The folder of a folder piece; with ``.json`` behind it, the file of a JSON piece."""
        return self.root / key(inputs, self.code)

    def read(self, inputs: Inputs) -> Content | None:
        """The content of a JSON piece; None if there is none, or it is not as it was written."""
        return self._checked(self.path(inputs).with_suffix(".json"), inputs)

    def write(self, inputs: Inputs, content: Content) -> Content:
        """Keep a JSON piece whole, replacing an older one; return it as `read` will.

        Raises
        ------
        TypeError, ValueError
            The content is not a dict, or holds what JSON cannot: the message names the place.
        """
        if not isinstance(content, dict):
            raise TypeError(f"the content of a piece must be a dict, got {content!r:.80}")
        text = self._record(inputs, content)
        atomic_write(self.path(inputs).with_suffix(".json"), text)
        kept: Content = json.loads(text)["content"]
        return kept

    def get(self, inputs: Inputs, make: Callable[[], Content], *, resume: bool = True) -> Content:
        """The content of a JSON piece, made now if it is not there.

        Of several processes that ask for it at once, one makes it while the others wait for it.

        Parameters
        ----------
        inputs : mapping
            JSON values that, with the code, determine the content.
        make : callable
            Called without arguments. What it raises passes through, and nothing is kept.
        resume : bool
            False makes it in any case and replaces what was there.
        """
        if resume and (found := self.read(inputs)) is not None:
            return found
        with self.locked(inputs):
            # another process may have made it while this one waited
            if resume and (found := self.read(inputs)) is not None:
                return found
            return self.write(inputs, make())

    def folder(
        self,
        inputs: Inputs,
        make: Callable[[Path], object],
        *,
        enough: Callable[[Path], bool] = lambda folder: True,
    ) -> Path:
        """The folder of a folder piece, filled now if it is not whole.

        Parameters
        ----------
        make : callable
            Fills the folder that it is given. What an interrupted make or a smaller piece left in
            it is still there, for it to go on from or to write over; after damage it is empty.
            Hidden files are drafts, and no part of the piece.
        enough : callable
            Whether a whole folder holds all that is asked for. One that does not is made larger.
        """
        folder = self.path(inputs)
        if self.whole(inputs) and enough(folder):
            return folder
        with self.locked(inputs):
            # another process may have filled it while this one waited
            manifest, whole = folder / MANIFEST, self.whole(inputs)
            if whole and enough(folder):
                return folder

            # finished once and changed since: nothing in it can be trusted
            if manifest.exists() and not whole:
                shutil.rmtree(folder)

            # from here to the end the folder is unfinished, whatever happens
            manifest.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            make(folder)
            files = {
                path.relative_to(folder).as_posix(): sha256(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file() and "/." not in f"/{path.relative_to(folder).as_posix()}"
            }
            atomic_write(manifest, self._record(inputs, {"files": files}))
        return folder

    def whole(self, inputs: Inputs) -> bool:
        """Whether a folder piece is there and as it was made, which reads all of its files."""
        folder = self.path(inputs)
        content = self._checked(folder / MANIFEST, inputs)
        return content is not None and all(
            (path := folder / name).is_file() and sha256(path) == digest
            for name, digest in content["files"].items()
        )

    @contextmanager
    def locked(self, inputs: Inputs) -> Iterator[None]:
        """Keep other processes from these inputs; they must find the work done when they come in.

        `get` and `folder` do this by themselves. Who makes several pieces at once takes it around
        `read`, the work and `write`, with any inputs that name the group.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / f".{key(inputs, self.code)}.lock"
        with FileLock(path):
            yield
            # only after success, when a waiter on the old file and one on a new file do no harm
            with suppress(OSError):
                path.unlink()

    def _record(self, inputs: Inputs, content: Content) -> str:
        body = {"code": self.code, "content": content, "inputs": inputs}
        digest = hashlib.sha256(dumps(body, where="piece").encode()).hexdigest()
        return dumps({**body, "sha256": digest})

    def _checked(self, path: Path, inputs: Inputs) -> Content | None:
        """The content of a record, if the file is to the letter what this store would write."""
        try:
            text = path.read_text(encoding="utf-8")
            content: Content = json.loads(text)["content"]
            return content if text == self._record(inputs, content) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # any other OSError is no damage, and nothing to be made anew
