"""Digits against scikit-learn's own arrays, and CIFAR-10 against files written here in its published format."""

from __future__ import annotations

import builtins
import hashlib
import io
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grsd.lab.data import images

NAMES = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
RECORDS = 40


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 40 records, and no network."""
    monkeypatch.setattr(images, "CIFAR_RECORDS", RECORDS)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def write(folder: Path, names: list[str] = NAMES) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Six files of 40 images, four of each label, pixel by pixel as the format is described; returns (images, labels)."""
    folder.mkdir(parents=True)
    made = {}
    for k, name in enumerate(names):
        rng = np.random.default_rng(k)
        pixels = rng.integers(0, 256, (RECORDS, 3, 32, 32), dtype=np.uint8)
        labels = rng.permutation(np.arange(RECORDS) % 10).astype(np.uint8)
        with (folder / name).open("wb") as out:
            for image, label in zip(pixels, labels, strict=True):
                out.write(bytes([label]))
                for channel in image:  # red, green, blue
                    for row in channel:
                        out.write(row.tobytes())
        made[name] = (pixels, labels)
    return made


def whitened(x: np.ndarray) -> np.ndarray:
    y = x.astype(np.float64)
    out: np.ndarray = (y - y.mean((0, 2, 3), keepdims=True)) / y.std((0, 2, 3), keepdims=True)
    return out


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    x, y = images.digits((3, 8), 31, seed=4)
    assert x.shape == (31, 1, 8, 8) and x.dtype == y.dtype == torch.float64
    assert (y == -1).sum() == 16 and (y == 1).sum() == 15
    # up to one affine map, every image is one of the set, with the right label, and none occurs twice
    data = load_digits()
    unit = data.images.reshape(len(data.images), -1)
    unit = unit - unit.mean(1, keepdims=True)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    mine = x.reshape(31, 64) - x.reshape(31, 64).mean(1, keepdim=True)
    likeness = (mine / mine.norm(dim=1, keepdim=True)).numpy() @ unit.T
    best = likeness.argmax(1)
    assert np.allclose(likeness.max(1), 1, atol=1e-12) and len(set(best)) == 31
    assert np.array_equal(np.where(data.target[best] == 3, -1.0, 1.0), y.numpy())


def test_digits_are_standardized_and_follow_the_seed() -> None:
    first, same, other = (images.digits(((0, 2), (1, 3)), 40, seed=s) for s in (0, 0, 1))
    assert (
        abs(float(first.inputs.mean())) < 1e-13
        and abs(float(first.inputs.square().mean()) - 1) < 1e-13
    )
    assert torch.equal(first.inputs, same.inputs) and torch.equal(first.targets, same.targets)
    assert not torch.equal(first.inputs, other.inputs)
    assert float(first.targets.sum()) == 0 and bool(
        (first.targets[:20] != first.targets[0]).any()
    )  # shuffled


def test_without_scikit_learn_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        images.digits(seed=0)


@pytest.mark.parametrize(
    ("classes", "samples", "match"),
    [
        ((0, 0), 8, r"\(0, 0\)"),
        ((0, 10), 8, r"\(0, 10\)"),
        (((0, 1), (1, 2)), 8, "different labels"),
        (((), (1,)), 8, "different labels"),
        ((0, 1, 2), 8, "expected two"),
        ((0, 1), 1, "samples is 1"),
        ((0, 1), 1000, "500 images of"),
    ],
)
def test_bad_draws_are_quoted(classes: Any, samples: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        images.digits(classes, samples, seed=0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("inner", [True, False])
def test_cifar_reads_the_published_format(tmp_path: Path, inner: bool) -> None:
    folder = tmp_path / images.CIFAR_FOLDER
    made = write(folder)
    root = tmp_path if inner else folder
    for train, names, samples in ((True, NAMES[:5], 40), (False, NAMES[5:], 8)):
        x, y = images.cifar(root, (3, 7), samples, seed=0, train=train)
        pixels, labels = (np.concatenate([made[name][k] for name in names]) for k in (0, 1))
        mine = np.isin(labels, (3, 7))  # all there are: 4 a file and label
        assert (
            x.shape == (samples, 3, 32, 32) and x.dtype == torch.float64 and mine.sum() == samples
        )
        expected, wanted = whitened(pixels[mine]), np.where(labels[mine] == 3, -1.0, 1.0)
        order, order2 = (np.lexsort((a[:, 0, 0, 1], a[:, 0, 0, 0])) for a in (x.numpy(), expected))
        assert np.allclose(x.numpy()[order], expected[order2], atol=1e-12)
        assert np.array_equal(y.numpy()[order], wanted[order2])


@pytest.mark.usefixtures("small")
def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="download=True"):
        images.cifar(tmp_path, seed=0)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(FileNotFoundError, match="unpickling runs code"):
        images.cifar(tmp_path, seed=0)
    folder = tmp_path / images.CIFAR_FOLDER
    write(folder)
    one = folder / "data_batch_2.bin"
    whole = one.read_bytes()
    for broken in (whole[:-1], whole[:-3073], whole + b"\0", b""):
        one.write_bytes(broken)
        with pytest.raises(ValueError, match=f"data_batch_2.bin has {len(broken)} bytes.*cut off"):
            images.cifar(tmp_path, samples=8, seed=0)
    one.write_bytes(whole[:3073] + bytes([10]) + whole[3074:])
    with pytest.raises(ValueError, match="label 10"):
        images.cifar(tmp_path, samples=8, seed=0)
    one.unlink()
    (tmp_path / "cifar-10-batches-py").rmdir()
    with pytest.raises(FileNotFoundError, match="six files"):
        images.cifar(tmp_path, samples=8, seed=0)


def test_cifar_files_have_their_published_length(tmp_path: Path) -> None:
    """Without the small files of the other tests: 10000 records of 3073 bytes."""
    folder = tmp_path / images.CIFAR_FOLDER
    folder.mkdir()
    for name in NAMES:
        with (folder / name).open("wb") as out:
            out.truncate(30_730_000)  # sparse, all zero
    with pytest.raises(ValueError, match=r"1 images of \(1,\) were asked for and there are 0"):
        images.cifar(tmp_path, samples=2, seed=0)
    (folder / NAMES[0]).write_bytes(b"\0" * 3073)
    with pytest.raises(ValueError, match="30730000"):
        images.cifar(tmp_path, samples=2, seed=0)


def test_download_unpacks_only_what_has_the_published_sum(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del small
    made = write(tmp_path / "there" / images.CIFAR_FOLDER)
    archive = tmp_path / "archive.tar.gz"
    (tmp_path / "evil").write_text("outside")
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "evil", arcname="../../evil")
        packed.add(tmp_path / "there" / images.CIFAR_FOLDER, arcname=images.CIFAR_FOLDER)
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda url, timeout: io.BytesIO(archive.read_bytes())
    )
    root = tmp_path / "a" / "b"
    with pytest.raises(ValueError, match="not unpacked"):
        images.cifar(root, samples=8, seed=0, download=True)
    assert list(root.iterdir()) == []
    monkeypatch.setattr(images, "CIFAR_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    found = images.cifar(root, samples=8, seed=0, download=True)
    assert sorted(path.name for path in root.rglob("*")) == sorted(
        [images.CIFAR_FOLDER, *NAMES]
    )  # and nothing else
    assert (root / images.CIFAR_FOLDER / NAMES[5]).stat().st_size == made[NAMES[5]][
        0
    ].size + RECORDS
    monkeypatch.setattr(
        urllib.request, "urlopen", None
    )  # files that are there are not fetched again
    again = images.cifar(root, samples=8, seed=0, download=True)
    assert torch.equal(found.inputs, again.inputs)
