"""Published numbers measured again, by the protocols behind them.

python -m dino.evaluation.verify dino_xcit_small_12_p16 --data_path imagenet/
python -m dino.evaluation.verify supervised --data_path imagenet/
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.evaluation.evaluation_options import FeatureOptions
from dino.evaluation.knn import knn_accuracy
from dino.evaluation.labelled_features import extract_both
from dino.evaluation.labelled_sets import open_val
from dino.evaluation.results import check_results, write_results
from dino.evaluation.subject import Subject, create_subject, say
from dino.runtime.options import RunStopped, UserError, command, option

if TYPE_CHECKING:
    import torch

    from dino.runtime.pictures import Pictures
    from xcit.zoo import PublishedWeights

_NEIGHBOURS = 20  # of the published k-NN accuracies
_TOP1, _KNN, _LINEAR = "supervised top-1", f"{_NEIGHBOURS}-NN", "linear"


@dataclass(frozen=True)
class VerifyOptions:
    name: str = option(
        "",
        "Published weights, such as xcit_small_12_p16_224_dist; supervised = all 42 of XCiT, dino = all of DINO, "
        "one after the other.",
        positional=True,
    )
    data_path: str = option(
        "/path/to/imagenet/", "ImageNet: a folder that holds train/ (for k-NN) and val/, folders per class."
    )
    tolerance: float = option(
        0.15, "Points by which the measured accuracy may differ; the published ones are rounded."
    )
    skip_knn: bool = option(False, "Leave k-NN out, which takes the features of the whole training set.")
    batch_size_per_gpu: int = option(128, "Pictures per forward pass.")
    num_workers: int = option(
        10, "Loading processes, at most the usable cores, half of them on a CPU; 0 = none."
    )
    output_dir: str = option(".", "Folder for results.json.")
    features_dir: str = option("", "Folder that keeps features for k-NN. Empty = they are not kept.")
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps.")
    precision: str = option(
        "fp32", "Of the forward pass; fp32 is the originals'.", choices=("auto", "fp32", "bf16", "fp16")
    )
    dist_url: str = option("env://", "Where processes meet; env:// = as torchrun says.")
    local_rank: int = option(0, "GPU of this process where torchrun does not say it.")


@dataclass(frozen=True)
class Comparison:
    """One published number and what was measured.

    Attributes:
        published, measured: accuracies in percent.
        pictures: how many were scored.
        missing: in what the pictures fall short of ImageNet; None where they do not.
    """

    measure: str
    published: float
    measured: float
    pictures: int
    missing: str | None

    @property
    def difference(self) -> float:
        return self.measured - self.published

    def passes(self, tolerance: float) -> bool:
        return abs(self.difference) <= tolerance


def run(options: VerifyOptions) -> None:
    from dino.runtime import distributed

    names = _names(options.name)
    check_results(Path(options.output_dir))
    device = distributed.pick_device(options.device, options.local_rank)
    failed: list[str] = []
    with distributed.processes(device, dist_url=options.dist_url):
        for name, published in names.items():
            verify = _supervised if published.top1 is not None else _self_supervised
            comparisons, facts = verify(options, published, device)
            if distributed.is_main():
                failed += _report(replace(options, name=name), comparisons, facts)
        if failed and distributed.is_main():
            raise RunStopped(f"not reproduced: {'; '.join(failed)}")


def _names(asked: str) -> "dict[str, PublishedWeights]":
    from xcit.zoo import DINO, PUBLISHED, SUPERVISED, nearest

    together = {"supervised": SUPERVISED, "dino": DINO}
    if asked in together:
        return together[asked]
    if asked not in PUBLISHED:
        raise UserError(f"no published weights '{asked}'; {nearest(asked, [*PUBLISHED, *together])}")
    return {asked: PUBLISHED[asked]}


def _supervised(
    options: VerifyOptions, published: "PublishedWeights", device: "torch.device"
) -> tuple[list[Comparison], dict[str, Any]]:
    """Top-1 of a classifier on pictures resized and cropped to the full size, as the authors and timm evaluate."""
    from dino.evaluation.extraction import Extractor, Preparation
    from dino.evaluation.linear_classifier import score
    from dino.runtime import distributed
    from dino.runtime.backbones import create_published_classifier, tokens

    with distributed.together():
        val, numbers = _val(options.data_path)
        model, report = create_published_classifier(published.name)
    say(f"{published.name}: {report}")
    preparation = Preparation(
        published.input_size, 1.0, distributed.pick_precision(options.precision, device)
    )
    extractor = Extractor(
        model.to(device),
        preparation,
        batch_size=options.batch_size_per_gpu,
        device=device,
        num_workers=distributed.share_cores(device, options.num_workers),
    )
    scores = score(
        extractor,
        lambda backbone, images: tokens(backbone, images)[0].float(),
        model.get_submodule("head"),
        val,
        numbers,
        progress="val pictures",
    )
    assert published.top1 is not None
    missing = _missing(len(val.classes), len(val))
    facts = {
        "weights_sha256": report.sha256,
        "data_sha256": _val_sha256(val),
        "device": distributed.describe(device),
        "preprocessing": {**asdict(preparation), "as_stored": True},
        "broken": scores.broken,
    }
    return [Comparison(_TOP1, published.top1, scores.top1, len(scores.labels), missing)], facts


def _self_supervised(
    options: VerifyOptions, published: "PublishedWeights", device: "torch.device"
) -> tuple[list[Comparison], dict[str, Any]]:
    """k-NN and the published linear classifier, by the settings of DINO's README."""
    from dino.runtime import distributed

    settings = FeatureOptions(
        arch=published.architecture,
        patch_size=published.patch_size or 16,
        pretrained_weights=published.name,
        batch_size_per_gpu=options.batch_size_per_gpu,
        num_workers=options.num_workers,
        data_path=options.data_path,
        as_stored=True,
        device=options.device,
        precision=options.precision,
        features_dir=options.features_dir,
    )
    with distributed.together():
        subject = create_subject(settings, device)
    linear, facts = _linear(options, published, subject)
    comparisons = [linear]
    if not options.skip_knn:
        comparisons += _knn(settings, published, subject)
    return comparisons, {**subject.facts, **facts}


def _linear(
    options: VerifyOptions, published: "PublishedWeights", subject: Subject
) -> tuple[Comparison, dict[str, Any]]:
    from dino.evaluation.linear_classifier import ProbedTokens, load_classifier, score
    from dino.runtime import distributed

    tokens_of = ProbedTokens(published.linear_blocks, published.linear_patch_mean)
    with distributed.together():
        val, numbers = _val(options.data_path)
        classifier = load_classifier(str(published.linear_url), tokens_of.width(subject.extractor))
    classifier.to(subject.extractor.device)
    scores = score(subject.extractor, tokens_of, classifier, val, numbers, progress="val pictures")
    assert published.linear is not None
    missing = _missing(len(val.classes), len(val))
    facts = {"data_sha256": _val_sha256(val), "broken": scores.broken}
    return Comparison(_LINEAR, published.linear, scores.top1, len(scores.labels), missing), facts


def _knn(settings: FeatureOptions, published: "PublishedWeights", subject: Subject) -> list[Comparison]:
    """In the main process only."""
    sets = extract_both(settings, subject)
    if sets is None:
        return []
    result = knn_accuracy(
        sets.train["cls"],
        sets.train_labels,
        sets.val["cls"],
        sets.val_labels,
        ks=(_NEIGHBOURS,),
        device=subject.extractor.device,
        progress="k-NN",
    )[_NEIGHBOURS]
    assert published.knn is not None
    missing = _missing(len(sets.classes), len(sets.val.names), len(sets.train.names))
    return [Comparison(_KNN, published.knn, result.top1, len(sets.val.names), missing)]


def _val(data_path: str) -> "tuple[Pictures, np.ndarray]":
    """The val pictures as the originals read them, and the output of each class."""
    from dino.evaluation.imagenet import NUM_CLASSES, imagenet_numbers

    val, _ = open_val(data_path)
    val.as_stored = True
    numbers = imagenet_numbers(val.classes)
    if numbers is None:
        say("the class folders do not bear ImageNet's names: they are numbered in alphabetical order")
        numbers = np.arange(len(val.classes)) % NUM_CLASSES
    return val, numbers


def _val_sha256(val: "Pictures") -> dict[str, str]:
    from dino.runtime.fingerprint import fingerprint

    return {"val": fingerprint(val).content}


def _missing(classes: int, val: int, train: int | None = None) -> str | None:
    from dino.evaluation.imagenet import what_is_missing

    return what_is_missing(classes, val, train)


def _report(options: VerifyOptions, comparisons: list[Comparison], facts: dict[str, Any]) -> list[str]:
    """Print and keep the comparisons; returns those that fail, where they prove something."""
    print(f"{options.name:<28} {'published':>9} {'measured':>9} {'difference':>10}")
    for each in comparisons:
        verdict = "pass" if each.passes(options.tolerance) else "fail"
        print(
            f"{each.measure:<28} {each.published:9.2f} {each.measured:9.2f} {each.difference:+10.2f}  {verdict}"
            f" (tolerance {options.tolerance:g})"
        )
    for broken in facts["broken"]:
        print(f"left out: {broken}")
    short = next((each.missing for each in comparisons if each.missing), None)
    if short:
        print(f"this proves nothing: the data is not ImageNet-1k, with {short}")
    entry = {
        "name": options.name,
        "data_path": options.data_path,
        "proves_nothing": short,
        "tolerance": options.tolerance,
        "results": [
            {**asdict(each), "difference": each.difference, "pass": each.passes(options.tolerance)}
            for each in comparisons
        ],
        **facts,
    }
    print(f"written to {write_results(Path(options.output_dir), f'verify {options.name}', entry)}")
    failed = [f"{options.name}, {each.measure}" for each in comparisons if not each.passes(options.tolerance)]
    return [] if short else failed


def main(prog: str = "dino-verify") -> None:
    command(VerifyOptions, run, prog=prog, description="Measure published numbers again.")


if __name__ == "__main__":
    main()
