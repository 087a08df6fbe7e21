"""What a training of a segmentation network says at its beginning, and what an evaluation says at its end."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dino.downstream.length import Length
from dino.downstream.segmentation.data import SegmentationData
from dino.downstream.segmentation.evaluation import Evaluation
from dino.downstream.segmentation.network import NamedSegmenter
from dino.downstream.segmentation.options import SegmentOptions
from dino.downstream.segmentation.scores import table
from dino.evaluation.results import write_results
from dino.runtime import distributed
from dino.runtime.backbones import tensors_sha256


def opening_lines(
    options: SegmentOptions,
    data: SegmentationData,
    named: NamedSegmenter,
    length: Length,
    scale: tuple[int, int] | None,
    computing: str,
) -> list[str]:
    """What a training says before it begins."""
    fitted = f"fitted into {scale[0]} x {scale[1]}" if scale else "of their own size"
    return [
        f"pictures:  {len(data.train):,} to train on and {len(data.val):,} to evaluate on, in {len(data.classes)} "
        f"classes ({', '.join(data.classes.names[:6])}{', ...' if len(data.classes) > 6 else ''})",
        *(f"           {note}" for note in data.notes),
        f"network:   {named}",
        f"steps:     {length.steps:,} of {length.global_batch} crops of {options.crop} px, from pictures {fitted}, "
        f"times {options.ratios[0]:g} to {options.ratios[1]:g}",
        f"computing: {computing}",
        f"output:    {Path(options.output_dir).resolve()}",
    ]


def report(
    options: SegmentOptions,
    named: NamedSegmenter,
    evaluation: Evaluation,
    name: str,
    facts: Mapping[str, Any],
) -> None:
    """Print the scores of an evaluation as a table, and write them to results.json.

    Args:
        name: of the result there.
        facts: plain values that belong to it.
    """
    scores = evaluation.scores
    assert scores is not None
    rows = scores.by_class(evaluation.pictures.classes)
    print(*table(rows), sep="\n")
    measures = scores.measures()
    for broken in evaluation.broken:
        print(f"left out: {broken}")
    print(
        f"mIoU {measures['miou']:.2f}, pixel accuracy {measures['pixel_accuracy']:.2f}, mean class accuracy "
        f"{measures['mean_accuracy']:.2f} %, on {len(evaluation.pictures) - len(evaluation.broken)} pictures"
    )
    result = {
        **measures,
        "classes": rows,
        "arch": named.arch,
        "head": named.head,
        "network_sha256": tensors_sha256(named.network),
        "broken": evaluation.broken,
        "device": distributed.describe(evaluation.predictor.device),
        "options": asdict(options),
        **facts,
    }
    print(f"written to {write_results(Path(options.output_dir), name, result)}")
