"""Weak and strong scaling in words and as a picture."""

import pytest

from ijepa_scale.config import load_config
from ijepa_scale.plan import sampling
from ijepa_scale.plan.clusters import cluster_of
from ijepa_scale.plan.sweep import STRONG, WEAK, efficiency, numbers_of, points_of, sweep
from ijepa_scale.plan.times import Assumed
from tests.processes import ROOT

SMALL = ["model.depth=2", "predictor.depth=2", "optimization.global_batch_size=32"]


@pytest.fixture(autouse=True)
def few_layouts(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLED_STEPS", 4)


def test_strong_scaling_keeps_the_batch_and_weak_scaling_the_images_of_a_gpu(tmp_path):
    config = load_config(ROOT / "configs/vitb16.yaml", SMALL)
    clusters = [cluster_of("a100-80g", gpus, node=8, network="ethernet-10") for gpus in (8, 16, 64)]
    strong, weak = (points_of(config, kind, clusters, Assumed(), 0.0) for kind in (STRONG, WEAK))
    assert [one.planned.images if one.planned else 0 for one in strong] == [32, 32, 0]
    assert [one.planned.images for one in weak] == [32, 64, 256]
    assert "cannot be cut evenly" in strong[2].why
    assert efficiency(strong[0], strong) == efficiency(weak[0], weak) == 1
    assert 1 > efficiency(weak[1], weak) > efficiency(strong[1], strong)
    path = tmp_path / "scaling.png"
    text = sweep(config, clusters, Assumed(), usable=0.0, path=str(path), name="vitb16")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert max(map(len, text.replace(str(path), "").splitlines())) <= 100
    for words in ("64", "256", "none", "Assumed:", "--overlap", str(path)):
        assert words in text


def test_what_cannot_be_swept_is_refused(tmp_path):
    assert numbers_of("64, 8,64") == [8, 64]
    with pytest.raises(ValueError, match="--sweep takes numbers of GPUs"):
        numbers_of("8,many")
    config = load_config(ROOT / "configs/vitb16.yaml", SMALL)
    clusters = [cluster_of("a100-80g", 8, node=8, network="")]
    with pytest.raises(ValueError, match="must end in"):
        sweep(config, clusters, Assumed(), usable=0.0, path="scaling.pdf", name="vitb16")
    with pytest.raises(ValueError, match="on 8 GPUs nothing fits"):
        sweep(config, clusters, Assumed(), usable=1e7, path=str(tmp_path / "scaling.png"), name="vitb16")


def test_weak_scaling_ends_where_its_batch_takes_all_images(tmp_path):
    config = load_config(ROOT / "configs/vitb16.yaml", [*SMALL, "data.num_images=100"])
    clusters = [cluster_of("a100-80g", gpus, node=8, network="ethernet-10") for gpus in (8, 16, 32)]
    weak = points_of(config, WEAK, clusters, Assumed(), 0.0)
    assert [one.planned.images if one.planned else 0 for one in weak] == [32, 64, 0]
    text = sweep(config, clusters, Assumed(), usable=0.0, path=str(tmp_path / "scaling.png"), name="vitb16")
    assert "weak, 32 GPUs: a global batch of 128 is more than data.num_images=100\n" in text
    few = load_config(ROOT / "configs/vitb16.yaml", [*SMALL, "data.num_images=31"])  # for the recipe itself
    with pytest.raises(ValueError, match=r"31 images, fewer than optimization\.global_batch_size 32"):
        points_of(few, STRONG, clusters, Assumed(), 0.0)
