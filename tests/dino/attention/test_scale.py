"""What the same weight looks like in one frame and in another."""

import numpy as np
import pytest

from dino.attention.scale import ClipScale, FixedScale, PictureScale, RunningScale


def layer(level: float, rows: int = 4, cols: int = 5) -> np.ndarray:
    return (level * np.linspace(0, 1, rows * cols, dtype=np.float32)).reshape(rows, cols)


def test_a_picture_has_its_own_scale():
    scaled = PictureScale()({"mean": layer(1), "head0": layer(7)})
    np.testing.assert_allclose(scaled["mean"], layer(1), atol=1e-6)
    np.testing.assert_allclose(scaled["head0"], layer(1), atol=1e-6)


def test_a_fixed_scale_counts_in_even_shares_whatever_the_size():
    for rows, cols in ((4, 5), (8, 10)):
        even = np.full((rows, cols), 1 / (rows * cols), np.float32)
        scaled = FixedScale((0, 4))({"a": even, "b": 4 * even, "c": 9 * even})
        assert [float(scaled[name].mean()) for name in "abc"] == pytest.approx([0.25, 1, 1])


def test_in_a_clip_the_same_weight_has_the_same_value_in_every_frame():
    frames = [{"mean": layer(level)} for level in (1, 2, 4)]
    scale = ClipScale((0, 100))
    for frame in frames:
        scale.see(frame)
    for frame, level in zip(frames, (1, 2, 4), strict=True):
        np.testing.assert_allclose(scale(frame)["mean"], layer(level) / 4, atol=1e-6)


def test_a_clips_limits_are_the_percentiles_of_all_its_weights():
    weights = np.random.default_rng(0).random((50, 6, 7), dtype=np.float32)
    scale = ClipScale((2, 95))
    for frame in weights:
        scale.see({"mean": frame})
    low, high = np.percentile(weights, (2, 95))
    expected = np.clip((weights[3] - low) / (high - low), 0, 1)
    np.testing.assert_allclose(scale({"mean": weights[3]})["mean"], expected, atol=1e-5)


def test_a_long_clip_takes_no_more_memory_and_is_sampled_evenly():
    scale = ClipScale((0, 100))
    for index in range(5000):
        scale.see({"mean": np.full((1, 1), index, np.float32)})
    kept = [float(frame[0, 0]) for frame in scale._seen["mean"]]
    assert 256 <= len(kept) <= 512 and len(set(np.diff(kept))) == 1
    assert kept[0] == 0 and kept[-1] > 4900
    assert scale({"mean": np.full((1, 1), 2500, np.float32)})["mean"][0, 0] == pytest.approx(0.5, abs=0.02)


def test_a_clip_of_many_patches_keeps_fewer_frames_and_the_same_limits():
    random = np.random.default_rng(0)
    scale = ClipScale((1, 99))
    for _ in range(200):
        scale.see({"mean": random.random((300, 400), np.float32), "small": random.random((3, 4), np.float32)})
    assert sum(frame.nbytes for frame in scale._seen["mean"]) < 40e6
    found = scale({"mean": np.full((300, 400), 0.4, np.float32)})["mean"]
    assert found[0, 0] == pytest.approx((0.4 - 0.01) / 0.98, abs=1e-3)


def test_a_running_scale_follows_slowly_and_forgets():
    scale = RunningScale((0, 100))
    first = scale({"mean": layer(1)}, 0.0)["mean"]
    np.testing.assert_allclose(first, layer(1), atol=1e-6)
    flash = scale({"mean": layer(100)}, 0.04)["mean"]
    assert flash.mean() > 0.8, "one frame hardly moves the scale"
    for step in range(1, 500):
        late = scale({"mean": layer(100)}, 0.04 * step)["mean"]
    np.testing.assert_allclose(late, layer(1), atol=0.01)


def test_a_clip_without_contrast_is_dark():
    scale = ClipScale((0, 99.5))
    scale.see({"mean": np.zeros((2, 2), np.float32)})
    assert not scale({"mean": np.zeros((2, 2), np.float32)})["mean"].any()
