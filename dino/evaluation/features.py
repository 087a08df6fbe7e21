"""Frozen features of any pictures as files, for whatever one wants to do with them.

python -m dino.evaluation.features --pretrained_weights checkpoint.pth --data_path photos/ --output_dir features/
"""

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino.evaluation.evaluation_options import FeatureOptions
from dino.evaluation.kinds import CLASS_TOKEN, KINDS, LAST_BLOCKS, PATCH_MEAN
from dino.evaluation.labelled_features import set_features
from dino.evaluation.results import provenance
from dino.evaluation.subject import Subject, create_subject, say
from dino.runtime.options import UserError, command, option

FORMATS = ("npy", "npz", "parquet")


@dataclass(frozen=True)
class FeaturesOptions(FeatureOptions):
    data_path: str = option(
        "/path/to/pictures/",
        "Pictures with classes or without: a folder, a list, a glob, tar shards, a torchvision set's name, or demo. "
        "Of a folder that holds train/ and val/, both.",
    )
    output_dir: str = option("features", "Folder for the files, one set of them for train and for val.")
    kinds: tuple[str, ...] = option(
        (CLASS_TOKEN, PATCH_MEAN),
        f"Which features, one or more of {', '.join(KINDS)}: class token, mean of the patch tokens, class tokens of "
        "a ViT's last four blocks, all patch tokens (rows x columns of them per picture).",
    )
    format: str = option(
        "npz",
        "npy = a folder with one array per kind; npz = one file; parquet = one table (needs pyarrow).",
        choices=FORMATS,
    )
    precision: str = option(
        "auto",
        "Of the forward pass; auto = bf16 where the device has it, kept as float16; fp32 is kept as float32.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )


def run(options: FeaturesOptions) -> None:
    from dino.evaluation.feature_files import check_format, write_features
    from dino.evaluation.labelled_sets import are_one_set
    from dino.runtime import distributed
    from dino.runtime.backbones import reads_blocks
    from dino.runtime.files import make_writable
    from dino.runtime.pictures import open_pictures

    unknown = [kind for kind in options.kinds if kind not in KINDS]
    if unknown or not options.kinds:
        raise UserError(
            f"--kinds takes one or more of {', '.join(KINDS)}; got {', '.join(unknown) or 'none'}"
        )
    check_format(options.format)
    device = distributed.pick_device(options.device, options.local_rank)
    with distributed.processes(device, dist_url=options.dist_url):
        output = Path(options.output_dir)
        with distributed.together():
            make_writable(output, "--output_dir")
            train, val = (open_pictures(options.data_path, split=split) for split in ("train", "val"))
            sets = {"pictures": train} if are_one_set(train, val) else {"train": train, "val": val}
            subject = create_subject(options, device)
            if LAST_BLOCKS in options.kinds and not reads_blocks(subject.extractor.backbone):
                raise UserError(f"--kinds {LAST_BLOCKS}: {subject.origin.arch} is no ViT with a class token")
            _check_room(options, subject, sum(map(len, sets.values())))
        with _rows_on_disk(options.features_dir, output) as folder:
            on_disk = dataclasses.replace(options, features_dir=folder)
            for name, pictures in sets.items():
                features, data_sha256 = set_features(on_disk, subject, name, pictures, options.kinds)
                facts: dict[str, Any] = {
                    **provenance(),
                    **subject.facts,
                    "data_path": options.data_path,
                    "data_sha256": data_sha256,
                    "classes": pictures.classes,
                    "broken": features.broken,
                }
                with distributed.together():
                    if distributed.is_main():
                        stem = output / name
                        written = write_features(features, pictures.classes, facts, stem, options.format)
                        shapes = ", ".join(f"{kind} {rows.shape}" for kind, rows in features.rows.items())
                        say(f"{written}: {shapes} {next(iter(features.rows.values())).dtype}")


def _check_room(options: FeaturesOptions, subject: Subject, count: int) -> None:
    """For the files, and for the rows that grow beside them."""
    from dino.runtime.files import check_room

    shapes = subject.extractor.row_shapes(options.kinds).values()
    numbers = count * sum(math.prod(shape) for shape in shapes)
    rows = numbers * subject.extractor.preparation.dtype.itemsize
    files = 4 * numbers if options.format == "parquet" else rows  # float32, before compression
    needed = files if options.features_dir else files + rows
    check_room(Path(options.output_dir), needed, f"the features of {count} pictures", "--output_dir")


@contextmanager
def _rows_on_disk(features_dir: str, output: Path) -> Iterator[str]:
    """Where the rows grow, since all patch tokens may not fit into memory; gone afterwards if not asked for."""
    from dino.runtime import distributed

    if features_dir:
        yield features_dir
        return
    (folder,) = distributed.gather(
        [tempfile.mkdtemp(prefix=".rows-", dir=output)] if distributed.is_main() else []
    )
    try:
        yield folder
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def main(prog: str = "dino-features") -> None:
    command(FeaturesOptions, run, prog=prog, description="Write frozen features of pictures to files.")


if __name__ == "__main__":
    main()
