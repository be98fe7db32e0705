"""Annotated photographs from a folder of the user's, in YOLO's or COCO's format: read whole, or not at all.

Every file is looked through before anything is returned. What is wrong is listed in one error, each thing by its file
and line, with what was expected there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel import data
from bilevel.applications.detection.augment import GREY, Letterbox

Place = str | os.PathLike[str]
Batch = dict[str, np.ndarray]

KINDS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Endings of the files that count as images."""

_SHOWN = 20


class FolderError(ValueError):
    """A folder of annotated images that is not what it should be; nothing of it was read."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Folder:
    """Annotated images on disk: the annotations are in memory, the images are not.

    Attributes:
        files: n images.
        sizes: width and height of each, (n, 2).
        boxes: for each image (m, 4) float32, x1, y1, x2, y2 in pixels of the file, within it.
        classes: for each image (m,) int32.
        crowd: for each image (m,) bool, true for a box around many (COCO's `iscrowd`).
        names: of the classes.
    """

    files: tuple[Path, ...]
    sizes: np.ndarray
    boxes: tuple[np.ndarray, ...]
    classes: tuple[np.ndarray, ...]
    crowd: tuple[np.ndarray, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        counts = np.bincount(np.concatenate([np.zeros(0, int), *self.classes]), minlength=len(self.names))
        empty = sum(not len(boxes) for boxes in self.boxes)
        listed = ", ".join(f"{name} {count}" for name, count in zip(self.names, counts, strict=True))
        return f"Folder({len(self)} images, {empty} of them without a box; boxes: {listed})"

    @property
    def most(self) -> int:
        """The largest number of boxes in an image."""
        return max((len(boxes) for boxes in self.boxes), default=0)

    def batch(
        self, rows: Sequence[int] | np.ndarray | None = None, *, size: int = 640, most: int | None = None
    ) -> Batch:
        """Images as arrays: each letterboxed into a square, its boxes with it.

        Args:
            rows: which images; None: all of them.
            size: of the square, in pixels.
            most: boxes per image, M; None: as many as an image of the folder has at most (one at least).

        Returns:
            "image" float32 (n, size, size, 3) in 0..1, "boxes" float32 (n, M, 4), "classes" int32 (n, M), "crowd" and
            "mask" bool (n, M).

        Raises:
            FolderError: an image that can't be decoded.
            ValueError: rows that are no indices; an image with more boxes than `most`.
        """
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        whole = rows.ndim == 1 and rows.dtype.kind in "iu"
        if rows.size and not (whole and -len(self) <= rows.min() and rows.max() < len(self)):
            raise ValueError(
                f"The rows are {rows.dtype}{list(rows.shape)}; whole numbers below {len(self)}, the number of images, "
                "are needed (np.flatnonzero gives those of a mask)."
            )
        most = max(self.most, 1) if most is None else most
        n = len(rows)
        batch = {
            "image": np.zeros((n, size, size, 3), np.float32),
            "boxes": np.zeros((n, most, 4), np.float32),
            "classes": np.zeros((n, most), np.int32),
            "crowd": np.zeros((n, most), bool),
            "mask": np.zeros((n, most), bool),
        }
        for k, row in enumerate(rows.tolist()):
            count = len(self.boxes[row])
            if count > most:
                raise ValueError(f"{self.files[row]} has {count} boxes and most={most} was given; raise it.")
            place = Letterbox.of(self.sizes[row, 1], self.sizes[row, 0], size)
            batch["image"][k] = _letterboxed(self.files[row], place, size)
            batch["boxes"][k, :count] = place.boxes(self.boxes[row])
            batch["classes"][k, :count], batch["crowd"][k, :count] = self.classes[row], self.crowd[row]
            batch["mask"][k, :count] = True
        return batch

    def stream(self, batch: int, *, size: int = 640, most: int | None = None, seed: int = 0) -> data.Stream:
        """Batches from disk for `solve`, without replacement in each epoch, for what does not fit into memory."""
        if not 1 <= batch <= len(self):
            raise ValueError(f"batch={batch} was given for {len(self)} images; it lies between 1 and their number.")
        per_epoch = len(self) // batch

        def items(start: int) -> Iterator[Batch]:
            epoch, place = divmod(start, per_epoch)
            while True:
                order = np.random.default_rng((seed, epoch)).permutation(len(self))
                for k in range(place, per_epoch):
                    yield self.batch(order[k * batch : (k + 1) * batch], size=size, most=most)
                epoch, place = epoch + 1, 0

        return data.Stream(items)


def yolo_folder(
    path: Place, split: str = "train", *, names: Sequence[str] | None = None, slack: float = 0.01
) -> Folder:
    """Images and labels in YOLO's format: Br35H, the sets of SCB, whatever Ultralytics and Roboflow export.

    Images are in `images/<split>` or `<split>/images`, labels in `labels/<split>` or `<split>/labels`, a text file of
    the image's name for each, with a line `class x y width height` for each box: a whole number from 0, centre and
    sides as shares of the image's width and height. An image without a label file has no boxes.

    Args:
        path: the folder.
        split: "train", "val", "test", ...; for "val" a folder "valid" will do.
        names: of the classes; None: those in the folder's `data.yaml` (or its only `.yaml`) or `classes.txt`.
        slack: by how much of the image's side a box may stick out; it is cut there (labels are often rounded: those of
            Br35H to two decimals).

    Raises:
        FileNotFoundError: a folder is missing, or there are no names; the message says which.
        FolderError: anything wrong in a label file, a label file without its image, an image that is none; by file and
            line.
    """
    top = Path(path).expanduser()
    if not top.is_dir():
        raise FileNotFoundError(f"{top} is no folder. {_YOLO}")
    known = _class_names(top) if names is None else tuple(names)
    images, labels = _yolo_places(top, split)
    problems: list[str] = []
    files = _image_files(images, problems)
    stems = {file.relative_to(images).with_suffix("") for file in files}
    texts = {file.relative_to(labels).with_suffix(""): file for file in sorted(labels.rglob("*.txt"))}
    texts = {stem: file for stem, file in texts.items() if file.name != "classes.txt"}
    problems += [
        f"{texts[stem]}: there is no image {stem}{{{','.join(KINDS)}}} in {images}."
        for stem in texts
        if stem not in stems
    ]
    sizes, boxes, classes = [], [], []
    for file in files:
        size = _size(file, problems)
        text = texts.get(file.relative_to(images).with_suffix(""))
        corners, numbers = _yolo_labels(text, size, known, slack, problems) if text and size else ([], [])
        sizes.append(size)
        boxes.append(corners)
        classes.append(numbers)
    if files and not texts:
        problems.append(f"{labels}: there is no label file for any of the {len(files)} images in {images}.")
    return _folder(files, sizes, boxes, classes, [[False] * len(b) for b in boxes], known, problems, top)


_YOLO = (
    "Expected are images/<split>/ and labels/<split>/ (or <split>/images and <split>/labels), with a file "
    "labels/<split>/a.txt for images/<split>/a.jpg, and the classes' names in data.yaml."
)


def _yolo_places(top: Path, split: str) -> tuple[Path, Path]:
    """The folders of images and of labels."""
    for name in (split, "valid") if split == "val" else (split,):
        for inside in (lambda kind, name=name: top / kind / name, lambda kind, name=name: top / name / kind):
            images, labels = inside("images"), inside("labels")
            if images.is_dir() and labels.is_dir():
                return images, labels
            if images.is_dir() or labels.is_dir():
                there, missing = (images, labels) if images.is_dir() else (labels, images)
                raise FileNotFoundError(f"{missing} is missing, beside {there}. {_YOLO}")
    raise FileNotFoundError(f"{top} has neither images/{split} nor {split}/images. {_YOLO}")


def _class_names(top: Path) -> tuple[str, ...]:
    """From `data.yaml`, the only `.yaml`, or `classes.txt`."""
    listed = sorted([*top.glob("*.yaml"), *top.glob("*.yml")])
    for file in [file for file in listed if file.stem == "data"] or listed[: len(listed) == 1]:
        return _yaml_names(file)
    for file in (top / "classes.txt", top / "labels" / "classes.txt"):
        if file.is_file():
            return tuple(line.strip() for line in _text(file).splitlines() if line.strip())
    several = f" ({', '.join(file.name for file in listed)} are several)" if listed else ""
    raise FileNotFoundError(
        f"{top} has neither a data.yaml{several} nor a classes.txt, which say what the classes are called: give "
        "names=('first', 'second', ...)."
    )


def _yaml_names(file: Path) -> tuple[str, ...]:
    """The entry `names` of a YAML file: `[a, b]`, a list of `- a`, or a mapping `0: a`."""
    lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in _text(file).splitlines()]
    start = next((k for k, line in enumerate(lines) if re.match(r"names\s*:", line)), None)
    where = f"{file}:{'' if start is None else start + 1}"
    cure = "Expected is names: [a, b, c], a list of lines '- a', or lines '0: a'; or give names=(...)."
    if start is None:
        raise FolderError(f"{file}: no entry 'names'. {cure}")
    first = lines[start].split(":", 1)[1].strip()
    rest = []
    for line in lines[start + 1 :]:
        if line and not line.startswith((" ", "\t", "-", "]", "}")):
            break
        rest.append(line.strip())
    unquoted = lambda text: text.strip().strip("'\"").strip()  # noqa: E731
    whole = " ".join([first, *rest]).strip()
    if whole.startswith("[") and whole.endswith("]"):
        names = [unquoted(part) for part in _parts(whole[1:-1]) if part.strip()]
    elif whole.startswith("{") and whole.endswith("}"):
        names = _numbered([part for part in _parts(whole[1:-1]) if part.strip()], where, cure)
    elif not first and all(line.startswith("-") for line in rest if line):
        names = [unquoted(line[1:]) for line in rest if line]
    else:
        names = _numbered([line for line in [first, *rest] if line], where, cure)
    if not names or not all(names):
        raise FolderError(f"{where} 'names' has no names. {cure}")
    counts = [int(match[1]) for line in lines if (match := re.match(r"nc\s*:\s*(\d+)$", line))]
    if counts and counts != [len(names)]:
        raise FolderError(
            f"{where} 'names' has {len(names)} names, {_listed(dict(enumerate(names)))}, and nc is {counts[0]}. {cure}"
        )
    return tuple(names)


def _parts(text: str) -> list[str]:
    """What commas part, but for those in a quoted name; an apostrophe within a name is no quote."""
    return re.findall(r"""(?:\s*\d+\s*:)?\s*(?:'(?:[^']|'')*'|"[^"]*")\s*(?=,|$)|[^,]+""", text)


def _numbered(lines: list[str], where: str, cure: str) -> list[str]:
    """The names in lines `0: a`, which have to be numbered from 0 on."""
    found = {}
    for line in lines:
        key, colon, name = line.partition(":")
        if not colon or not key.strip().isdigit():
            raise FolderError(f"{where} 'names' has {line!r}. {cure}")
        found[int(key)] = name.strip().strip("'\"").strip()
    if sorted(found) != list(range(len(found))):
        raise FolderError(f"{where} 'names' numbers {sorted(found)}; 0 to {len(found) - 1} were expected. {cure}")
    return [found[k] for k in range(len(found))]


def _yolo_labels(
    file: Path, size: tuple[int, int], names: Sequence[str], slack: float, problems: list[str]
) -> tuple[list[list[float]], list[int]]:
    """Corners in pixels and classes; what is wrong is added to the problems."""
    boxes, classes = [], []
    try:
        lines = _text(file).splitlines()
    except FolderError as error:
        problems.append(str(error))
        return [], []
    for k, line in enumerate(lines, 1):
        parts = line.split()
        if not parts:
            continue
        where = f"{file}:{k}"
        if len(parts) != 5:
            problems.append(f"{where}: {len(parts)} columns; 5 were expected, class x y width height.")
            continue
        values = [_number(part) for part in parts]
        if None in values:
            problems.append(f"{where}: {parts[values.index(None)]!r} is no number.")
            continue
        number, x, y, width, height = (float(v) for v in values if v is not None)
        if not all(map(math.isfinite, (number, x, y, width, height))):
            problems.append(f"{where}: {line.strip()!r} is not finite.")
        elif number != int(number) or not 0 <= number < len(names):
            problems.append(f"{where}: the class {parts[0]} is unknown; {_known(names)}.")
        elif wrong := _outside(
            (x - width / 2, y - height / 2, x + width / 2, y + height / 2), (1, 1), slack, "shares of the image's sides"
        ):
            problems.append(f"{where}: {wrong}.")
        else:
            corners = np.clip([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 0, 1)
            boxes.append((corners * [*size, *size]).tolist())
            classes.append(int(number))
    return boxes, classes


def coco_folder(annotations: Place, images: Place | None = None, *, slack: float = 0.01) -> Folder:
    """A JSON file of annotations in COCO's format, and the images that it names.

        {"images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}, ...],
         "categories": [{"id": 3, "name": "person"}, ...],
         "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [x, y, width, height], "iscrowd": 0}, ...]}

    Classes are numbered from 0 in the order of the categories' ids.

    Args:
        annotations: the JSON file.
        images: the folder that the names of files are relative to; None: that of the JSON file.
        slack: by how much of the image's side a box may stick out; it is cut there.

    Raises:
        FileNotFoundError: no such file or folder.
        FolderError: no JSON, or anything wrong in it (an entry that is missing, an id twice or of nothing, a broken
            box), an image that is missing or none; by file and line.
    """
    file = Path(annotations).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file. Give the JSON file of annotations, instances_train.json or so.")
    top = file.parent if images is None else Path(images).expanduser()
    if not top.is_dir():
        raise FileNotFoundError(f"{top} is no folder. Give the folder that has the images.")
    text = _text(file)
    try:
        content = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise FolderError(f"{file}:{error.lineno}: no JSON: {error.msg} (column {error.colno}).") from None
    except RecursionError:
        raise FolderError(f"{file}: no annotations: it is nested too deeply.") from None
    parts = ("images", "categories", "annotations")
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in parts):
        lacking = [p for p in parts if not isinstance(content, dict) or not isinstance(content.get(p), list)]
        raise FolderError(f"{file}: no list {' and no list '.join(map(repr, lacking))} in it; COCO's format has these.")
    return _Coco(file, text, content, top, slack).read()


class _Coco:
    """One reading of a COCO file, which gathers what is wrong."""

    def __init__(self, file: Path, text: str, content: dict[str, list[Any]], top: Path, slack: float) -> None:
        self.file, self.text, self.content, self.top, self.slack = file, text, content, top, slack
        self.found: list[tuple[str, int, str]] = []  # a list's name, the place in it, what is wrong there

    def entries(
        self,
        part: str,
        needed: Mapping[str, Callable[[Any], bool]],
        optional: Mapping[str, Callable[[Any], bool]] | None = None,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The entries of a list that have what is needed, with their places; ids come once."""
        asked = {**needed, **(optional or {})}
        seen: dict[Any, int] = {}
        for k, entry in enumerate(self.content[part]):
            if not isinstance(entry, dict):
                self.found.append((part, k, f"{entry!r:.40} is no entry of 'images', 'categories' or 'annotations'"))
                continue
            wrong = [
                key for key, fits in asked.items() if not (fits(entry[key]) if key in entry else key not in needed)
            ]
            if wrong:
                what = f"{wrong[0]!r} is {entry[wrong[0]]!r:.60}" if wrong[0] in entry else f"no {wrong[0]!r}"
                self.found.append((part, k, f"{what}; {_NEEDED[wrong[0]]} was expected"))
            elif "id" in entry and entry["id"] in seen:
                self.found.append((part, k, f"the id {entry['id']} stands there for the second time"))
            else:
                seen[entry.get("id")] = k
                yield k, entry

    def read(self) -> Folder:
        """The folder, or an error with all that is wrong."""
        whole = lambda value: isinstance(value, int) and not isinstance(value, bool)  # noqa: E731
        text = lambda value: isinstance(value, str) and bool(value)  # noqa: E731
        categories = dict(
            sorted((e["id"], e["name"]) for _, e in self.entries("categories", {"id": whole, "name": text}))
        )
        number = {identity: k for k, identity in enumerate(categories)}
        files: list[Path] = []
        sizes: list[tuple[int, int] | None] = []
        place: dict[int, int] = {}
        for k, entry in self.entries("images", {"id": whole, "file_name": text}):
            file = self.top / entry["file_name"]
            problems: list[str] = []
            if not file.is_file():
                problems.append(f"the image {file} is missing")
            size = _size(file, problems) if not problems else None
            said = (entry.get("width", size and size[0]), entry.get("height", size and size[1]))
            if size and said != size:
                problems.append(f"{file} has {size[0]} x {size[1]} pixels, and {said[0]} x {said[1]} are said")
            self.found += [("images", k, problem) for problem in problems]
            place[entry["id"]] = len(files)
            files.append(file)
            sizes.append(size)
        boxes: list[list[list[float]]] = [[] for _ in files]
        classes: list[list[int]] = [[] for _ in files]
        crowd: list[list[bool]] = [[] for _ in files]
        needed = {"image_id": whole, "category_id": whole, "bbox": _four_numbers}
        optional = {"id": lambda value: not isinstance(value, (list, dict)), "iscrowd": lambda value: value in (0, 1)}
        for k, entry in self.entries("annotations", needed, optional):
            x, y, width, height = map(float, entry["bbox"])
            wrong = ""
            if entry["image_id"] not in place:
                wrong = f"there is no image {entry['image_id']}"
            elif entry["category_id"] not in number:
                wrong = f"the category {entry['category_id']} is unknown; there are {_listed(categories)}"
            elif not all(map(math.isfinite, (x, y, width, height))):
                wrong = f"the box {entry['bbox']} is not finite"
            elif size := sizes[place[entry["image_id"]]]:
                corners = (x, y, x + width, y + height)
                wrong = _outside(corners, size, self.slack, "x, y, width and height in pixels")
                if not wrong:
                    at = place[entry["image_id"]]
                    boxes[at].append(np.clip(corners, 0, [*size, *size]).tolist())
                    classes[at].append(number[entry["category_id"]])
                    crowd[at].append(bool(entry.get("iscrowd", 0)))
            if wrong:
                self.found.append(("annotations", k, wrong))
        lines = _lines(self.text) if self.found else {}
        problems = [f"{self.file}:{lines[part][k]}: {what} ({part}, entry {k})." for part, k, what in self.found]
        return _folder(files, sizes, boxes, classes, crowd, tuple(categories.values()), problems, self.file)


_NEEDED = {
    "id": "a whole number", "image_id": "a whole number", "category_id": "a whole number", "name": "a text",
    "file_name": "the name of a file", "bbox": "[x, y, width, height] in numbers", "iscrowd": "0 or 1",
}  # fmt: skip

# A whole number of hundreds of digits is no float, and Python reads none of thousands: it is infinite.
_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 100 else float(digits))


def _four_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    )


def _lines(text: str) -> dict[str, list[int]]:
    """By name of a list at the top of a JSON text, the lines on which its entries begin. The text is valid."""
    found = {}
    space = re.compile(r"[\s,:]*")

    def after(at: int) -> int:
        match = space.match(text, at)
        return match.end() if match else at

    at = after(after(0) + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = after(at)
        if text[at] != "[":
            _, at = _DECODER.raw_decode(text, at)
        else:
            starts: list[int] = []
            line, last = 1, 0
            at = after(at + 1)
            while text[at] != "]":
                line += text.count("\n", last, at)
                last = at
                starts.append(line)
                _, at = _DECODER.raw_decode(text, at)
                at = after(at)
            found[key], at = starts, at + 1
        at = after(at)
    return found


def _outside(corners: tuple[float, ...], size: tuple[int, int], slack: float, unit: str) -> str:
    """What is wrong with a box in an image of this width and height; empty where nothing is."""
    x1, y1, x2, y2 = corners
    if x2 <= x1 or y2 <= y1:
        return (
            f"the box has the width {x2 - x1:g} and the height {y2 - y1:g}: its corners are swapped, or it has no area"
        )
    outside = [max(-x1, x2 - size[0]) / size[0], max(-y1, y2 - size[1]) / size[1]]
    if max(outside) > slack + 1e-9 or min(x2, y2) <= 0 or x1 >= size[0] or y1 >= size[1]:
        return (
            f"the box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) lies outside the image, (0, 0) to ({size[0]}, "
            f"{size[1]}); {unit} were expected"
        )
    return ""


def _folder(
    files: Sequence[Path],
    sizes: Sequence[tuple[int, int] | None],
    boxes: Sequence[Sequence[Sequence[float]]],
    classes: Sequence[Sequence[int]],
    crowd: Sequence[Sequence[bool]],
    names: tuple[str, ...],
    problems: list[str],
    place: Path,
) -> Folder:
    """The folder; an error where there is a problem, or no image."""
    if not files and not problems:
        problems = [f"{place}: there is no image ({', '.join(KINDS)})."]
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        count = "One thing is wrong" if len(problems) == 1 else f"{len(problems)} things are wrong"
        raise FolderError(f"{count}, and nothing was read:\n  " + "\n  ".join(problems[:_SHOWN]) + more)
    return Folder(
        tuple(files),
        np.array(sizes, np.int64).reshape(-1, 2),
        tuple(np.array(b, np.float32).reshape(-1, 4) for b in boxes),
        tuple(np.array(c, np.int32) for c in classes),
        tuple(np.array(c, bool) for c in crowd),
        names,
    )


def _image_files(folder: Path, problems: list[str]) -> list[Path]:
    """The images in a folder, in the order of their names; two that differ in their ending alone are a problem."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in KINDS and file.is_file())
    stems: dict[Path, Path] = {}
    for file in files:
        if file.with_suffix("") in stems:
            problems.append(f"{file}: its label file would be that of {stems[file.with_suffix('')].name} too.")
        stems[file.with_suffix("")] = file
    return files


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _known(names: Sequence[str]) -> str:
    return f"there are {_listed(dict(enumerate(names)))}"


def _listed(names: dict[int, str]) -> str:
    shown = [f"{k} {name}" for k, name in names.items()][:10]
    return ", ".join(shown) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FolderError(f"{file}: no text in UTF-8 ({error.reason} at byte {error.start}).") from None


def _opened(file: Path) -> Any:
    """An image by Pillow, of which no pixel is read yet."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Images are read by Pillow: pip install 'bilevel[detection]' or pip install pillow."
        ) from error
    return Image.open(file)


def _undecodable(file: Path, error: Exception) -> str:
    return f"{file}: no image that can be decoded ({str(error)[:100]})."


_WRONG = (OSError, ValueError, SyntaxError)  # what Pillow raises for what is no image
_SIDEWAYS, _ORIENTATION = (5, 6, 7, 8), 274  # a camera's note that rows are columns


def _size(file: Path, problems: list[str]) -> tuple[int, int] | None:
    """Width and height as one looks at it; None, and a problem, where the file is no image."""
    try:
        with _opened(file) as image:
            width, height = image.size
            if image.mode in ("I", "F"):
                problems.append(f"{file}: its pixels are of mode {image.mode!r}, of no known range; save 8 or 16 bits.")
                return None
            return (height, width) if image.getexif().get(_ORIENTATION) in _SIDEWAYS else (width, height)
    except _WRONG as error:
        problems.append(_undecodable(file, error))
        return None


def _letterboxed(file: Path, place: Letterbox, size: int) -> np.ndarray:
    """The image in a grey square, (size, size, 3) in 0..1."""
    from PIL import Image, ImageOps

    try:
        with _opened(file) as image:
            turned = ImageOps.exif_transpose(image)
            if turned.mode.startswith("I;16"):  # 16 bits of grey, which PIL itself would clip at 255
                turned = Image.fromarray((np.asarray(turned) / 257).round().astype(np.uint8))
            turned = turned.convert("RGB")
            pixels = np.asarray(turned.resize((place.columns, place.rows), Image.Resampling.BILINEAR))
    except _WRONG as error:
        raise FolderError(_undecodable(file, error)) from error
    square = np.full((size, size, 3), GREY, np.float32)
    square[place.top : place.top + place.rows, place.left : place.left + place.columns] = pixels / np.float32(255)
    return square
