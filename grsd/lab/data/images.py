"""Two classes of small images as regression: scikit-learn's digits, and CIFAR-10.

`digits` needs no file and no network. `cifar` reads the binary version of CIFAR-10, fixed records
of one label and 3072 pixels, so that nothing is unpickled; it downloads only when asked to.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grsd.checks import at_least, positive

Classes = tuple[int, int] | tuple[Sequence[int], Sequence[int]]

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 162 MB
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as printed beside it by its author
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_RECORDS = 10_000  # images in a file
_RECORD = 1 + 3 * 32 * 32
_TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
_TEST = ("test_batch.bin",)


class Images(NamedTuple):
    """Inputs (n, channels, side, side) and targets (n,), −1 or +1 by class; float64."""

    inputs: Tensor
    targets: Tensor


def _sides(classes: Classes) -> list[tuple[int, ...]]:
    """The labels of the two classes, each one label or several."""
    if len(classes) != 2:
        raise ValueError(f"classes are {classes!r}; expected two, each a label or several labels")
    sides = [(side,) if isinstance(side, (int, np.integer)) else tuple(side) for side in classes]
    labels = [label for side in sides for label in side]
    if not all(sides) or len(set(labels)) < len(labels) or set(labels) - set(range(10)):
        expected = "different labels from 0 to 9 on both sides"
        raise ValueError(f"classes are {classes!r}; expected {expected}")
    return sides


def _draw(
    labels: np.ndarray, classes: Classes, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (n,) of a balanced sample without repetition, in random order; their targets."""
    at_least("samples", samples, 2, "two classes need at least 2")
    rng = np.random.default_rng(seed)
    counts = samples - samples // 2, samples // 2
    chosen = []
    for side, count in zip(_sides(classes), counts, strict=True):
        there = np.flatnonzero(np.isin(labels, side))
        if len(there) < count:
            asked = f"{count} images of {side} were asked for"
            raise ValueError(f"{asked} and there are {len(there)}: take fewer samples")
        chosen.append(rng.choice(there, count, replace=False))
    order = rng.permutation(samples)
    return np.concatenate(chosen)[order], np.repeat([-1.0, 1.0], counts)[order]


def _standardized(pixels: np.ndarray, targets: np.ndarray) -> Images:
    """Mean 0 and mean square 1 in every channel, over all pixels of the sample."""
    x = torch.from_numpy(np.asarray(pixels, dtype=np.float64))
    x = x - x.mean((0, 2, 3), keepdim=True)
    size = x.square().mean((0, 2, 3), keepdim=True).sqrt()
    positive("spread of a channel", size, "all its pixels are equal: it cannot be standardized")
    return Images(x / size, torch.from_numpy(targets))


def digits(classes: Classes = (0, 1), samples: int = 48, *, seed: int) -> Images:
    """Two classes of handwritten digits, 8 × 8 pixels, from the 1797 that come with scikit-learn.

    Inputs (n, 1, 8, 8) have mean 0 and mean square 1 over all pixels of the sample.

    Parameters
    ----------
    classes
        Two disjoint sets of labels 0 to 9, e.g. ``(3, 8)`` or ``((0, 2, 4), (1, 3, 5, 7, 9))``.
    samples : n
        Half of each class (one more of the first when n is odd), drawn without repetition. A digit
        occurs 174 to 183 times.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    chosen, targets = _draw(data.target, classes, samples, seed)
    return _standardized(data.images[chosen][:, None], targets)


def cifar(
    root: Path | str,
    classes: Classes = (0, 1),
    samples: int = 1024,
    *,
    seed: int,
    train: bool = True,
    download: bool = False,
) -> Images:
    """Two classes of CIFAR-10, 3 × 32 × 32 pixels, from the files of its binary version.

    Inputs (n, 3, 32, 32) have mean 0 and mean square 1 per channel over the sample.

    Parameters
    ----------
    root
        A folder that holds ``cifar-10-batches-bin`` or is it.
    classes, samples, seed
        As `digits`; a label occurs 5000 times in the training files and 1000 times in the test
        file. 0 airplane, 1 automobile, 2 bird, 3 cat, 4 deer, 5 dog, 6 frog, 7 horse, 8 ship, 9
        truck.
    train
        The five training files, or the test file.
    download
        If the folder is not there, get the published archive (162 MB), compare its MD5 sum, and
        unpack the six files that are read here. The network is not touched otherwise, and missing
        files are a FileNotFoundError that says what to do.

    Notes
    -----
    Krizhevsky, Learning multiple layers of features from tiny images (2009). A record is one byte
    of label and 3072 of pixels: red, green, blue, each row by row.
    """
    folder = _folder(Path(root), download)
    records = [_records(folder / name) for name in (_TRAIN if train else _TEST)]
    labels = np.concatenate([np.asarray(one[:, 0]) for one in records])
    chosen, targets = _draw(labels, classes, samples, seed)
    pixels = np.stack([records[k // CIFAR_RECORDS][k % CIFAR_RECORDS, 1:] for k in chosen])
    return _standardized(pixels.reshape(-1, 3, 32, 32), targets)


def _folder(root: Path, download: bool) -> Path:
    for folder in (root / CIFAR_FOLDER, root):
        if all((folder / name).is_file() for name in _TRAIN + _TEST):
            return folder
    if download:
        return _download(root)
    if (root / "cifar-10-batches-py").is_dir():
        raise FileNotFoundError(
            f"{root} holds the Python version of CIFAR-10, which is pickled and not read here, "
            f"since unpickling runs code: get the binary version {CIFAR_URL}, or pass download=True"
        )
    do = f"unpack {CIFAR_URL} there, or pass download=True to do so"
    raise FileNotFoundError(f"no {CIFAR_FOLDER} with its six files in {root}: {do}")


def _records(path: Path) -> np.ndarray:
    """A file as uint8 (records, 3073), mapped and not read."""
    size, expected = path.stat().st_size, CIFAR_RECORDS * _RECORD
    if size != expected:
        what = f"a file of CIFAR-10 has {expected}: it is cut off or another"
        raise ValueError(f"{path} has {size} bytes; {what}")
    records = np.memmap(path, dtype=np.uint8, mode="r", shape=(CIFAR_RECORDS, _RECORD))
    if (label := int(records[:, 0].max())) > 9:
        raise ValueError(f"{path} has the label {label}; labels go to 9: it is damaged")
    return records


def _download(root: Path) -> Path:
    """Fetch the archive beside its place, compare its sum, and move the six files there whole."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        archive, digest = Path(scratch) / "archive", hashlib.md5(usedforsecurity=False)
        with urllib.request.urlopen(CIFAR_URL, timeout=60) as source, archive.open("wb") as kept:
            while block := source.read(1 << 20):
                digest.update(block)
                kept.write(block)
        if (md5 := digest.hexdigest()) != CIFAR_MD5:
            what = f"gave a file with the MD5 sum {md5}; that of CIFAR-10 is {CIFAR_MD5}"
            raise ValueError(f"{CIFAR_URL} {what}: not unpacked")
        # nothing but the six files is unpacked, whatever else the archive holds
        with tarfile.open(archive) as packed:
            for name in _TRAIN + _TEST:
                member = packed.extractfile(f"{CIFAR_FOLDER}/{name}")
                if member is None:
                    raise ValueError(f"{name} in the archive is no file")
                with (Path(scratch) / name).open("wb") as unpacked:
                    shutil.copyfileobj(member, unpacked)
        folder = root / CIFAR_FOLDER
        folder.mkdir(exist_ok=True)
        for name in _TRAIN + _TEST:
            (Path(scratch) / name).replace(folder / name)
    return folder
