"""The attentive probe beside torch's own attention; trainings on one rank and on two; who chooses among probes."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_scale.data.transforms import center_crop
from ijepa_scale.engine.distributed import Ranks
from ijepa_scale.evals import attentive as attentive_module
from ijepa_scale.evals.attentive import (
    AttentiveSettings,
    Probe,
    Probes,
    _kept_tokens,
    attentive,
    probe_groups,
    split,
)
from ijepa_scale.models.blocks import ViTSize
from tests.evals import worker_training
from tests.evals.labelled import labelled, write_colours
from tests.evals.worker_training import evaluation_of, outcome_of
from tests.processes import assert_all, run_ranks

QUICK = AttentiveSettings(
    epochs=12, batch_size=12, micro_batch_size=6, lrs=(1e-2, 1e-5), weight_decays=(1e-3,), checkpoint_epochs=12
)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    write_colours(root, "train", 48)
    write_colours(root, "validation", 23)
    return root


@pytest.fixture(scope="module")
def alone(colours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    cases = {
        "quick": (QUICK, {}),
        "shuffled": (QUICK, {"shuffle": True}),
        "features": (replace(QUICK, features=True), {}),
        "single": (replace(QUICK, depth=2, heads=4, lrs=(1e-2,)), {}),
    }
    assert_all(run_ranks(worker_training.run, 1, folder / "log", attentive, str(colours), str(folder), cases))
    return folder


def test_a_probe_is_torchs_attention_from_one_query():
    torch.manual_seed(0)
    probe = Probe(ViTSize(width=12, depth=1, heads=3, mlp_width=20), classes=5).double()
    for parameter in probe.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(4, 7, 12, dtype=torch.float64)
    attention = torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([probe.q.weight, probe.kv.weight]))
        attention.in_proj_bias.copy_(torch.cat([probe.q.bias, probe.kv.bias]))
        attention.out_proj.weight.copy_(probe.proj.weight)
        attention.out_proj.bias.copy_(probe.proj.bias)
        normed = F.layer_norm(tokens, (12,), probe.norm1.weight, probe.norm1.bias, 1e-6)
        query = probe.query.expand(4, 1, 12)
        pooled = (query + attention(query, normed, normed)[0])[:, 0]
        hidden = F.gelu(F.linear(probe.norm2(pooled), probe.mlp.fc1.weight, probe.mlp.fc1.bias))
        pooled = pooled + F.linear(hidden, probe.mlp.fc2.weight, probe.mlp.fc2.bias)
        expected = F.linear(pooled, probe.head.weight, probe.head.bias).float()
        torch.testing.assert_close(probe(tokens), expected)


def test_probes_do_not_write_over_each_others_tokens():
    torch.manual_seed(0)
    probes = Probes(ViTSize(width=12, depth=3, heads=3, mlp_width=20), classes=5, count=2)
    probes.probes[1].load_state_dict(probes.probes[0].state_dict())
    tokens = torch.randn(4, 7, 12)
    before = tokens.clone()
    with torch.no_grad():
        logits = probes(tokens)
    assert torch.equal(tokens, before) and torch.equal(logits[:, 0], logits[:, 1])
    torch.testing.assert_close(logits, probes(tokens).detach())


def test_each_probe_has_its_own_learning_rate_and_weight_decay():
    model = Probes(ViTSize(width=12, depth=2, heads=3, mlp_width=20), classes=5, count=4)
    grid = AttentiveSettings(lrs=(0.1, 0.2), weight_decays=(0.0, 0.5)).grid
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = probe_groups(model, grid)
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            lr, decay = grid[int(name.split(".")[1])]
            plain = name.endswith(("bias", "query")) or "norm" in name
            assert (group["peak_lr"], group["weight_decay"]) == (lr, 0.0 if plain else decay)


def test_held_out_images_are_of_all_classes_and_none_is_fitted_on(colours):
    images = labelled(colours)
    fit_on, held_out = split(images, 6)
    assert sorted([*fit_on.indices, *held_out.indices]) == list(range(48)) and len(held_out) == 5
    assert set(held_out.labels) == {0, 1, 2, 3}
    assert len(split(images, 1)[0]) == 48 and len(split(images, 1)[1]) == 0
    with pytest.raises(ValueError, match="too few to hold out"):
        split(images.take(np.arange(12)), 2)


def test_all_of_separable_classes_chance_of_shuffled_labels_and_the_held_out_choose(alone):
    for name in ("quick", "features"):
        measures = outcome_of(alone, name)["measures"]
        assert [measure["chosen"] for measure in measures] == [True, False]
        assert measures[0]["value"] == 100.0 and measures[0]["settings"]["held_out"] == 100.0
        assert measures[1]["value"] < 100.0, "too small a learning rate"
    assert all(measure["value"] < 60.0 for measure in outcome_of(alone, "shuffled")["measures"])
    (single,) = outcome_of(alone, "single")["measures"]
    assert single["chosen"] and single["value"] == 100.0 and "held_out" not in single["settings"]
    facts = outcome_of(alone, "single")["facts"]
    assert (facts["train_images"], facts["held_out"]) == (48, 0)


def test_probes_are_the_same_on_two_ranks(colours, alone, tmp_path):
    cases = {name: (replace(QUICK, features=name == "features"), {}) for name in ("quick", "features")}
    cases["shuffled"] = (QUICK, {"shuffle": True})
    assert_all(run_ranks(worker_training.run, 2, tmp_path / "log", attentive, str(colours), str(tmp_path), cases))
    for name in cases:
        one, two = outcome_of(alone, name), outcome_of(tmp_path, name)
        assert one["measures"] == two["measures"] and one["predicted"] == two["predicted"]
        assert one["left"] == two["left"] == []


def test_kept_tokens_are_those_of_the_images_in_the_batch_and_must_fit(colours, tmp_path, monkeypatch):
    shutil.copytree(colours, tmp_path / "data")
    images = labelled(tmp_path / "data")
    with open(images.images.sample_id(7), "wb") as file:
        file.write(b"no image")
    evaluation = evaluation_of(Ranks(0, 1, 0, torch.device("cpu")), str(tmp_path / "data"), tmp_path, batch_size=5)
    asked = images.take(np.array([3, 7, 40, 1]))
    read, kept = _kept_tokens(evaluation, asked, lambda x: evaluation.encoder(x).detach(), stretch=False)
    assert read.indices.tolist() == [3, 40, 1]
    crops = np.stack([center_crop(images.images.read(i), 16) for i in (3, 40, 1)])
    torch.testing.assert_close(kept, evaluation.encoder(torch.from_numpy(crops)).detach())
    batches = QUICK.batches(evaluation, read, read=False)
    batch = batches.batch(0)
    assert len(batch.images) == 0 and sorted(batch.places.tolist()) == [0, 1, 2]
    assert batch.labels.tolist() == read.labels[batch.places].tolist()
    monkeypatch.setattr(attentive_module, "free_memory", lambda: 100)
    with pytest.raises(ValueError, match="leave out features=true"):
        _kept_tokens(evaluation, asked, lambda x: x, stretch=False)


@pytest.mark.slow
def test_zero_2_trains_alike(colours, alone, tmp_path):
    cases = {"shuffled": (replace(QUICK, zero_stage=2), {"shuffle": True})}
    assert_all(run_ranks(worker_training.run, 2, tmp_path / "log", attentive, str(colours), str(tmp_path), cases))
    assert outcome_of(tmp_path, "shuffled")["predicted"] == outcome_of(alone, "shuffled")["predicted"]


def test_wrong_settings_are_said():
    for wrong, message in (
        ({"lrs": ()}, "lrs must name"),
        ({"weight_decays": (-1.0,)}, "weight_decays one or more from 0"),
        ({"depth": 0}, "depth must be 1"),
        ({"heads": -1}, "heads 0 or more"),
        ({"zero_stage": 4}, "zero_stage 1, 2 or 3"),
        ({"zero_stage": 3}, "zero_stage must be 1 or 2"),
    ):
        with pytest.raises(ValueError, match=message):
            AttentiveSettings(**wrong)
