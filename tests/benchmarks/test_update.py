"""The benchmark of clipping, optimizer and teacher; that both ways come to the same weights."""

import json

import pytest
import torch

from benchmarks import update
from benchmarks.baseline import textbook_names
from benchmarks.update import UpdateOptions, measure
from dino.runtime.options import UserError

SMALL = UpdateOptions(arch="xcit_nano_12_p16", prototypes=32, side=32, turns=2, clip_grad=0.02)


def test_it_reports_every_part_and_their_sum(tmp_path, capsys):
    file = tmp_path / "update.json"
    measure(UpdateOptions(**{**vars(SMALL), "output": str(file)}))
    *parts, together = json.loads(file.read_text())["comparisons"]
    assert [part["path"] for part in parts] == ["update: clipping", "update: optimizer", "update: teacher"]
    for way in ("theirs", "ours"):
        summed = [sum(turn) for turn in zip(*(part[way] for part in parts), strict=True)]
        assert together[way] == pytest.approx(summed) and len(summed) == 2
    assert together["target"] == 8
    assert "update together, xcit_nano_12_p16, out_dim 32" in capsys.readouterr().out


def test_both_ways_make_the_same_update_of_the_same_gradients():
    torch.manual_seed(0)
    (ours, our_parts), (theirs, their_parts) = update._all_at_once(SMALL), update._one_by_one(SMALL)
    theirs.load_state_dict(textbook_names(ours.state_dict()))
    update._compute_gradients(ours, SMALL)
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters() if p.requires_grad}
    named = textbook_names(gradients)
    for name, parameter in theirs.named_parameters():
        parameter.grad = named[name].clone() if parameter.requires_grad else None
    lengths = torch.stack([gradient.norm() for gradient in gradients.values()])
    assert (lengths > SMALL.clip_grad).any() and (lengths < SMALL.clip_grad).any()
    for parts in (our_parts, their_parts):
        for part in parts.values():
            part()
    after = textbook_names(dict(ours.named_parameters()))
    clipped = textbook_names({name: p.grad for name, p in ours.named_parameters() if p.requires_grad})
    assert any(not torch.equal(gradient, named[name]) for name, gradient in clipped.items())
    for name, parameter in theirs.named_parameters():
        if "cls_attn_blocks" in name and ".attn." in name:
            continue  # timm has queries, keys and values in three parameters, each clipped alone
        torch.testing.assert_close(after[name], parameter, rtol=1e-6, atol=1e-6, msg=name)
        if parameter.requires_grad:
            torch.testing.assert_close(clipped[name], parameter.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="--prototypes and --side must be 1 or more and --clip_grad above 0"):
        measure(UpdateOptions(clip_grad=0.0))
