"""iNaturalist 2018 and 2019 as their competitions give them: pictures, and JSON files that say which is what."""

import json
from pathlib import Path
from typing import Any

from dino.runtime.options import UserError
from dino.runtime.picture_files import PictureFiles
from dino.runtime.pictures import Pictures, Split, number_classes


def open_inaturalist(root: Path, year: int, split: Split, level: str) -> Pictures:
    """The pictures of a split, with the classes of a level of the taxonomy.

    Args:
        root: folder that holds `train2018.json`, `val2018.json`, `categories.json` and the pictures.
        level: `name`, `genus`, `family`, ... , a key of `categories.json`; its values are the classes, in
            alphabetical order over the whole taxonomy, the same for both splits.

    Raises:
        UserError: a file is missing or is something else, or the taxonomy has no such level.
    """
    taxonomy = {entry["id"]: entry for entry in _entries(root / "categories.json", None)}
    content = root / f"{split}{year}.json"
    names = {entry["id"]: str(entry["file_name"]) for entry in _entries(content, "images")}
    if any(level not in entry for entry in taxonomy.values()):
        levels = sorted(set.intersection(*(set(entry) for entry in taxonomy.values())) - {"id"})
        raise UserError(
            f"{root / 'categories.json'} has no '{level}' for every category; "
            f"--inat_category can be {', '.join(levels)}"
        )
    try:
        found = [
            (names[entry["image_id"]], str(taxonomy[entry["category_id"]][level]))
            for entry in _entries(content, "annotations")
        ]
    except KeyError as error:
        raise UserError(
            f"{content} refers to {error}, which is nowhere in it or in categories.json"
        ) from error
    classes, _ = number_classes([str(entry[level]) for entry in taxonomy.values()])
    number = {name: label for label, name in enumerate(classes)}
    return PictureFiles(root, [file for file, _ in found], classes, [number[name] for _, name in found])


def _entries(file: Path, key: str | None) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}; --data_path must be the folder of the competition's JSON files"
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON file: {error}") from error
    entries = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file} holds no list of {key or 'categories'}, as iNaturalist's files do")
    return entries
