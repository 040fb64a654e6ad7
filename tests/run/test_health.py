"""What the numbers of a health check mean, and what is said of them; the check itself: test_report.py."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ijepa_scale.config import load_config
from ijepa_scale.objectives.ijepa import COLLAPSE_ADVICE
from ijepa_scale.run.health import drift, eval_indices, feature_std, rankme
from ijepa_scale.run.records import JsonlWriter, read_records
from ijepa_scale.run.verdict import health_verdict


def random_features(n, width, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(n, width, generator=generator)
    return torch.randn(n, rank, generator=generator) @ torch.randn(rank, width, generator=generator)


def test_feature_std_is_zero_for_constants_one_for_noise_and_free_of_scale():
    noise = random_features(2000, 16)
    assert feature_std(noise) == pytest.approx(1.0, abs=0.02)
    assert feature_std(torch.arange(8.0).expand(50, 8)) == 0.0
    assert feature_std(torch.zeros(50, 8)) == 0.0
    assert feature_std(1000 * noise) == pytest.approx(feature_std(noise))
    values = noise[:40].tolist()  # by hand
    means = [sum(row[d] for row in values) / 40 for d in range(16)]
    stds = [math.sqrt(sum((row[d] - means[d]) ** 2 for row in values) / 40) for d in range(16)]
    rms = math.sqrt(sum(x * x for row in values for x in row) / 640)
    assert feature_std(noise[:40]) == pytest.approx(sum(stds) / 16 / rms)
    assert feature_std(noise + 3.0) == pytest.approx(1 / math.sqrt(10), rel=0.03)  # what is shared counts against it
    noise[0, 0] = math.nan
    assert math.isnan(feature_std(noise))


def test_rankme_counts_equal_directions():
    for rank in (1, 3, 16):
        equal = torch.zeros(64, 20)
        equal[torch.arange(rank), torch.arange(rank)] = 5.0  # singular values 5, rank times
        assert rankme(equal) == pytest.approx(rank, rel=1e-3)


def test_rankme_agrees_with_the_entropy_of_the_gram_matrix():
    features = random_features(40, 12)
    features[:, 0] *= 10
    singular = np.sqrt(np.linalg.eigvalsh((features.double().T @ features.double()).numpy()).clip(0))
    shares = singular / singular.sum()
    assert rankme(features) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_rankme_of_odd_input():
    assert rankme(torch.ones(50, 8)) == pytest.approx(1.0, abs=1e-3)
    assert rankme(torch.zeros(50, 8)) == 1.0
    assert rankme(random_features(5, 100)) <= 5.01
    assert rankme(random_features(1, 8)) == pytest.approx(1.0, abs=1e-3)
    assert math.isnan(rankme(torch.full((4, 4), math.inf)))
    assert rankme(random_features(64, 32).bfloat16()) > 20


def test_drift_is_zero_for_the_same_one_for_unrelated_and_ignores_what_images_share():
    target = random_features(500, 32)
    assert drift(target, target) == pytest.approx(0.0, abs=1e-6)
    assert drift(target, 3 * target + 7) == pytest.approx(0.0, abs=1e-6)
    assert drift(target, random_features(500, 32, seed=1)) == pytest.approx(1.0, abs=0.05)
    assert drift(target, -target) == pytest.approx(2.0, abs=1e-6)
    assert drift(target + 100, random_features(500, 32, seed=1) + 100) > 0.9  # not hidden by the shared part
    assert drift(torch.ones(5, 4), torch.ones(5, 4)) == 1.0  # nothing sets the images apart


def health(number, features, **values):
    return {
        "kind": "health",
        "step": number,
        "feature_std": feature_std(features),
        "rankme": rankme(features),
        **values,
    }


def test_constant_features_are_called_collapsed():
    constant = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).expand(256, 32)
    history = [health(0, random_features(256, 32)), health(500, constant)]
    assert health_verdict(history).startswith("collapsed: features constant")
    assert health_verdict(history[1:]).startswith("collapsed")
    nearly = constant + 1e-3 * random_features(256, 32)
    assert health_verdict([history[0], health(500, nearly)]).startswith("collapsed")


def test_healthy_histories_are_called_healthy():
    for seed in range(10):  # noise from record to record trips nothing
        generator = np.random.default_rng(seed)
        history = []
        for number in range(20):
            features = random_features(256, 32, seed=100 * seed + number) + 1.0
            knn = 30 + 0.3 * number + generator.normal()
            history.append(health(500 * number, features, knn=knn, loss=0.2 + 0.01 * generator.normal()))
            if number:
                assert health_verdict(history).startswith("healthy"), health_verdict(history)


def test_falling_rank_is_called_likely_collapse_and_a_rising_loss_normal():
    ranks = (23, 12, 6, 3)
    history = [
        health(number, random_features(256, 32, rank), loss=0.1 + 0.1 * number) for number, rank in enumerate(ranks)
    ]
    assert "loss.variance" not in health_verdict(history)  # which no other objective has
    verdict = health_verdict(history, COLLAPSE_ADVICE)
    assert verdict.startswith("likely collapse: rank is falling") and "loss rising is normal here" in verdict
    assert "loss rising from 0.1000 to 0.4000" in health_verdict(history, objective="mae")  # whose targets do not move
    assert f"{history[0]['rankme']:.1f} -> {history[-1]['rankme']:.1f}" in verdict
    advised = load_config(Path(__file__).parents[2] / "configs" / "tiny.yaml").loss
    assert f"loss.variance={advised.variance:g} loss.covariance={advised.covariance:g}" in verdict
    recovering = health_verdict([*history, health(4, random_features(256, 32, 5))])
    assert recovering.startswith("watch: rank fell to")
    assert health_verdict([*history, health(5, random_features(256, 32, 25))]).startswith("healthy")


def test_features_growing_alike_and_a_falling_knn():
    base, shared = random_features(256, 32), random_features(1, 32, seed=9)
    history = [health(0, base + shared), health(1, 0.05 * base + shared)]
    history[1]["rankme"] = history[0]["rankme"]  # the spread alone
    assert health_verdict(history).startswith("likely collapse: features grow alike")
    history = [health(0, base, knn=30.0), health(1, base, knn=22.9)]
    assert health_verdict(history).startswith("watch: k-NN is below its first value")
    for record in history:  # of 128 images 30% has a standard error of 4.05 points
        record["knn_images"] = 128
    assert health_verdict(history).startswith("healthy")
    history[1]["knn"] = 21.8
    assert health_verdict(history).startswith("watch: k-NN is below its first value")


HEALTH_RUNS = Path(__file__).parent / "health_runs"  # health records of real runs: docs/lab/small_compute.md


@pytest.mark.parametrize("path", sorted(HEALTH_RUNS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_verdict_tells_failing_runs_from_good_ones_long_before_their_end(path):
    records = read_records(path)
    expected = "likely collapse" if path.stem.startswith("collapsed") else "healthy"
    verdicts = {record["step"]: health_verdict(records[: number + 1]) for number, record in enumerate(records)}
    early = records[-1]["step"] // 3  # a run with a slow EMA took a tenth of its steps before its rank fell
    late = [verdict.split(":")[0] for step, verdict in verdicts.items() if step >= early]
    assert len(late) >= 3 and late == [expected] * len(late)


def test_verdicts_on_short_and_broken_histories(tmp_path):
    assert health_verdict([]) == "no health record yet"
    first = health(0, random_features(256, 32))
    assert health_verdict([first]).startswith("first record")
    broken = health(1, torch.full((8, 4), math.nan))
    assert health_verdict([first, broken]).startswith("collapsed: features are not finite")
    with JsonlWriter(tmp_path / "metrics.jsonl", None) as writer:  # from the file, where NaN is null
        for record in (first, broken, health(2, random_features(256, 32))):
            writer.write(record)
    read = read_records(tmp_path / "metrics.jsonl")
    assert health_verdict(read[:2]).startswith("collapsed: features are not finite")
    assert health_verdict(read).startswith("healthy")
    assert health_verdict([first, health(1, random_features(256, 32), knn=None, loss=None)]).startswith("healthy")


@pytest.mark.parametrize(
    "images, count, ranks, chosen", [(5000, 512, 8, 512), (5000, 512, 384, 384), (5000, 512, 1024, 512), (3, 512, 4, 3)]
)
def test_there_is_something_to_measure_on_however_many_ranks(images, count, ranks, chosen):
    run = SimpleNamespace(ranks=SimpleNamespace(world_size=ranks))
    assert len(set(eval_indices(run, range(images), count))) == chosen
