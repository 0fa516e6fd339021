import json
import math

import numpy as np
import pytest

from models.training.spikes import LAG, Limits, SpikeConfig, SpikeDetector


def falling(steps: int, seed: int) -> list[float]:
    """Losses as a healthy run gives them: a fall that flattens out, with noise."""
    rng = np.random.default_rng(seed)
    return [float(2.5 + 6 * math.exp(-i / 60) + rng.normal(0, 0.06)) for i in range(steps)]


def watch(detector, first, losses, norms=None):
    """Verdicts on steps that are issued ``LAG`` ahead of what is read, as the loop does it."""
    limits, verdicts = [], []
    norms = norms or [1.0] * len(losses)
    for i in range(len(losses) + LAG):
        limits.append(detector.next_limits())
        if i >= LAG:
            at = i - LAG
            verdicts.append(detector.observe(first + at, losses[at], norms[at], limits[at]))
    detector.limits.extendleft(reversed(limits[len(losses) :]))
    return verdicts


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_no_alarm(seed):
    assert not any(verdict.outlier for verdict in watch(SpikeDetector(SpikeConfig()), 0, falling(600, seed)))


def test_a_spike_that_stays_is_seen_after_patience_and_its_start_is_known():
    detector = SpikeDetector(SpikeConfig(patience=3))
    watch(detector, 0, falling(200, 0))
    verdicts = watch(detector, 200, [6.0] * 3)
    assert [v.outlier for v in verdicts] == [True, True, True]
    assert [v.spike for v in verdicts] == [False, False, True]
    assert detector.first_outlier == 200


def test_one_outlier_is_no_spike_and_does_not_enter_the_window():
    detector = SpikeDetector(SpikeConfig(patience=3))
    watch(detector, 0, falling(200, 1))
    window = list(detector.losses)
    (verdict,) = watch(detector, 200, [7.0])
    assert verdict[:2] == (True, False)
    assert list(detector.losses) == window
    (verdict,) = watch(detector, 201, [window[-1]])
    assert verdict.outlier is False
    assert detector.first_outlier is None


def test_a_sustained_spike_never_becomes_normal():
    detector = SpikeDetector(SpikeConfig(window=20, min_history=20, patience=1000))
    watch(detector, 0, falling(100, 2))
    assert all(verdict.outlier for verdict in watch(detector, 100, [5.5] * 200))


def test_a_single_high_gradient_norm_is_left_out_and_a_new_level_is_accepted():
    detector = SpikeDetector(SpikeConfig(patience=3))
    losses = falling(400, 4)
    watch(detector, 0, losses[:100])
    verdicts = watch(detector, 100, losses[100:110], [1.0, 11.0] + [1.0] * 8)
    assert [v.outlier for v in verdicts] == [False, True] + [False] * 8
    assert "gradient norm 11 above 10" in verdicts[1].reason
    verdicts = watch(detector, 110, losses[110:200], [50.0] * 90)
    assert not any(v.spike for v in verdicts)
    assert sum(v.outlier for v in verdicts) == 3 + LAG
    assert not any(v.outlier for v in watch(detector, 200, losses[200:300], [50.0] * 100))


def test_switched_off_it_still_sees_what_is_not_finite():
    detector = SpikeDetector(SpikeConfig(enabled=False))
    watch(detector, 0, falling(100, 2))
    verdicts = watch(detector, 100, [9.0, 9.0, 9.0, 9.0, math.nan])
    assert [v.spike for v in verdicts] == [False] * 4 + [True]


def test_limits_do_not_depend_on_when_the_host_waited():
    one, two = SpikeDetector(SpikeConfig()), SpikeDetector(SpikeConfig())
    losses = falling(100, 5)
    watch(one, 0, losses)
    for i in range(0, 100, 10):
        watch(two, i, losses[i : i + 10])
    assert one.state_dict() == two.state_dict()


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_a_spike_at_once(loss, norm):
    verdict = SpikeDetector(SpikeConfig()).observe(0, loss, norm, Limits())
    assert verdict.outlier
    assert verdict.spike
    assert "not finite" in verdict.reason


def test_the_state_of_a_detector_carries_over():
    one, two = SpikeDetector(SpikeConfig()), SpikeDetector(SpikeConfig())
    watch(one, 0, falling(100, 3))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    later = [3.6, 9.0, 9.0, 9.0]
    assert watch(one, 100, later) == watch(two, 100, later)


def test_the_limit_is_the_median_and_mad_worked_by_hand():
    # Losses 2 3 4 and then 3: recent 3 4 3, median 3. Deviations -1 0 1 2 and 3 - 3: center 0, MAD 1. Limit
    # 3 + 0 + 2 * 1.4826 = 5.9652.
    detector = SpikeDetector(SpikeConfig(window=5, recent=3, min_history=5, threshold=2.0, min_increase=0.0))
    detector.losses.extend([2.0, 3.0, 4.0])
    detector.deviations.extend([-1.0, 0.0, 1.0, 2.0])
    detector.observe(0, 3.0, 1.0, Limits())
    assert detector.limits[-1].loss == pytest.approx(5.9652)


def test_settings_that_cannot_work_are_named():
    with pytest.raises(ValueError, match="spikes.patience is 0; it has to be at least 1"):
        SpikeConfig(patience=0).validate()
    with pytest.raises(ValueError, match="spikes.min_history is 300; it has to be at most spikes.window, 128"):
        SpikeConfig(min_history=300).validate()
