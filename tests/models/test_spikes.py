import math

import numpy as np
import pytest

from models.training.spikes import SpikeConfig, SpikeDetector


def falling(steps: int, seed: int) -> list[float]:
    """Losses as a healthy run gives them: a fall that flattens out, with noise."""
    rng = np.random.default_rng(seed)
    return [float(2.5 + 6 * math.exp(-i / 60) + rng.normal(0, 0.06)) for i in range(steps)]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_no_alarm(seed):
    detector = SpikeDetector(SpikeConfig())
    assert not any(detector.observe(i, loss, 1.0).outlier for i, loss in enumerate(falling(600, seed)))


def test_a_spike_that_stays_is_seen_after_patience_and_its_start_is_known():
    detector = SpikeDetector(SpikeConfig(patience=3))
    for i, loss in enumerate(falling(200, 0)):
        detector.observe(i, loss, 1.0)
    verdicts = [detector.observe(200 + i, 6.0, 1.0) for i in range(3)]
    assert [v.outlier for v in verdicts] == [True, True, True]
    assert [v.spike for v in verdicts] == [False, False, True]
    assert detector.first_outlier == 200


def test_one_outlier_is_no_spike_and_does_not_enter_the_window():
    detector = SpikeDetector(SpikeConfig(patience=3))
    for i, loss in enumerate(falling(200, 1)):
        detector.observe(i, loss, 1.0)
    window = list(detector.losses)
    assert detector.observe(200, 7.0, 1.0)[:2] == (True, False)
    assert list(detector.losses) == window
    assert detector.observe(201, window[-1], 1.0).outlier is False
    assert detector.first_outlier is None


def test_a_sustained_spike_never_becomes_normal():
    detector = SpikeDetector(SpikeConfig(window=20, min_history=20, patience=1000))
    for i, loss in enumerate(falling(100, 2)):
        detector.observe(i, loss, 1.0)
    assert all(detector.observe(100 + i, 5.5, 1.0).outlier for i in range(200))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_a_spike_at_once(loss, norm):
    verdict = SpikeDetector(SpikeConfig()).observe(0, loss, norm)
    assert verdict.outlier
    assert verdict.spike
    assert "not finite" in verdict.reason


def test_the_state_of_a_detector_carries_over():
    one, two = SpikeDetector(SpikeConfig()), SpikeDetector(SpikeConfig())
    for i, loss in enumerate(falling(100, 3)):
        one.observe(i, loss, 1.0)
    two.load_state_dict(one.state_dict())
    for i, loss in enumerate([3.6, 9.0, 9.0, 9.0]):
        assert one.observe(100 + i, loss, 1.0) == two.observe(100 + i, loss, 1.0)


def test_the_limit_is_the_median_and_mad_worked_by_hand():
    # Recent losses 2 3 4: median 3. Deviations -1 0 1 2 3: center 1, MAD 1. Limit 3 + 1 + 2 * 1.4826 = 6.9652.
    config = SpikeConfig(window=5, recent=3, min_history=5, threshold=2.0, min_increase=0.0)
    for loss, outlier in ((6.96, False), (6.97, True)):
        detector = SpikeDetector(config)
        detector.losses.extend([2.0, 3.0, 4.0])
        detector.deviations.extend([-1.0, 0.0, 1.0, 2.0, 3.0])
        assert detector.observe(0, loss, 1.0).outlier is outlier


def test_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match="spikes.patience is 0; it has to be at least 1"):
        SpikeConfig(patience=0).validate()
    with pytest.raises(ValueError, match="spikes.min_history is 300; it has to be at most spikes.window, 128"):
        SpikeConfig(min_history=300).validate()
