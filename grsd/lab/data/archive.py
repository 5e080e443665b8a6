"""Two classes of CIFAR-10 from a part of it that somebody packed as arrays, or from its own files.

The archive is an ``.npz`` with ``train_images`` (n, 32, 32, 3) uint8 and ``train_labels`` (n,);
nothing is unpickled. A folder is read by `grsd.lab.data.images.cifar`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from grsd.lab.data import images
from grsd.lab.data.images import Classes, Images
from grsd.scale import cache_dir


def find(name: str) -> Path:
    """Return the path of an archive or a folder: as given, or in the folder ``images`` of the
    cache."""
    for place in (Path(name), cache_dir() / "images" / name):
        if place.exists():
            return place
    raise FileNotFoundError(
        f"no {name!r} here or in {cache_dir() / 'images'}: give an .npz with train_images (n, 32, "
        "32, 3) uint8 and train_labels (n,), or the folder of CIFAR-10's binary version"
    )


def fingerprint(name: str) -> str:
    """Return the SHA-256 of an archive, or of the first file of a folder of CIFAR-10.

    Empty where there is none, which `find` refuses when it is read.
    """
    try:
        path = find(name)
    except FileNotFoundError:
        return ""
    if path.is_dir():
        path = images._folder(path, download=False) / images._TRAIN[0]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def two_classes(path: Path, classes: Classes, samples: int, *, seed: int) -> Images:
    """Return a balanced sample of two classes, drawn and standardized as `images.cifar` does.

    Inputs (n, 3, 32, 32) have mean 0 and mean square 1 per channel, targets are −1 and +1; float64.
    """
    if path.is_dir():
        return images.cifar(path, classes, samples, seed=seed)
    with np.load(path, allow_pickle=False) as archive:
        missing = {"train_images", "train_labels"} - set(archive)
        if missing:
            raise ValueError(f"{path.name} has {sorted(archive)}; {sorted(missing)} are missing")
        pixels, labels = archive["train_images"], archive["train_labels"]
    if pixels.shape != (len(labels), 32, 32, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"{path.name}: train_images are {pixels.dtype} {pixels.shape}; expected uint8 "
            f"({len(labels)}, 32, 32, 3)"
        )
    chosen, targets = images._draw(labels, classes, samples, seed)
    return images._standardized(pixels[chosen].transpose(0, 3, 1, 2), targets)
