import numpy as np
import pytest
import torch

from ijepa_scale.masking.packing import limit_context, pack_masks


def random_lists(seed, images, blocks, size, num_patches):
    rng = np.random.default_rng(seed)
    context = [rng.choice(num_patches, rng.integers(1, num_patches), replace=False) for _ in range(images)]
    targets = [[rng.choice(num_patches, size, replace=False) for _ in range(blocks)] for _ in range(images)]
    return context, targets


def naive(context, targets, num_patches):
    """One token at a time, in Python lists."""
    row_of = {}
    for image, patches in enumerate(context):
        for place, _ in enumerate(patches):
            row_of[image, place] = len(row_of)
    sequences = {"context": [], "target_blocks": [], "prediction": []}
    source, target_rows, rows = [], [], 0
    for image, patches in enumerate(context):
        sequences["context"].append([image * num_patches + int(p) for p in patches])
    for image, blocks in enumerate(targets):
        for block in blocks:
            sequences["target_blocks"].append([image * num_patches + int(p) for p in block])
            sequence = []
            for place, patch in enumerate(context[image]):
                sequence.append(image * num_patches + int(patch))
                source.append(row_of[image, place])
                rows += 1
            for patch in block:
                sequence.append(image * num_patches + int(patch))
                source.append(-1)
                target_rows.append(rows)
                rows += 1
            sequences["prediction"].append(sequence)
    return sequences, source, target_rows


@pytest.mark.parametrize(
    "images, blocks, size, num_patches", [(1, 1, 1, 2), (1, 4, 3, 9), (5, 1, 7, 16), (4, 3, 5, 35), (3, 4, 16, 17)]
)
def test_agrees_with_lists(images, blocks, size, num_patches):
    context, targets = random_lists(images, images, blocks, size, num_patches)
    masks = pack_masks(context, targets, num_patches)
    sequences, source, target_rows = naive(context, targets, num_patches)
    for name, expected in sequences.items():
        packed = getattr(masks, name)
        assert packed.indices_T.dtype == packed.cu_seqlens.dtype == torch.int32
        assert packed.indices_T.tolist() == [index for sequence in expected for index in sequence]
        assert packed.cu_seqlens.tolist() == np.cumsum([0] + [len(sequence) for sequence in expected]).tolist()
        assert packed.max_seqlen == max(map(len, expected)) and isinstance(packed.max_seqlen, int)
        assert packed.num_tokens == sum(map(len, expected))
    assert masks.prediction_source_T.dtype == torch.int32 and masks.target_rows_T.dtype == torch.int64
    assert masks.prediction_source_T.tolist() == source
    assert masks.target_rows_T.tolist() == target_rows
    assert masks.prediction_copies_TM.dtype == torch.int32
    assert masks.prediction_copies_TM.tolist() == [
        [row for row, token in enumerate(source) if token == wanted] for wanted in range(masks.context.num_tokens)
    ]
    assert masks.num_patches == num_patches
    patches = sorted({index for sequence in sequences["target_blocks"] for index in sequence})
    assert masks.target_patches_U.dtype == masks.target_index_T.dtype == torch.int64
    assert masks.target_patches_U.tolist() == patches
    assert masks.target_patches_U[masks.target_index_T].tolist() == masks.target_blocks.indices_T.tolist()
    # Two views of the same tokens agree.
    assert torch.equal(masks.prediction.indices_T[masks.target_rows_T], masks.target_blocks.indices_T)
    seen = masks.prediction_source_T >= 0
    assert torch.equal(
        masks.prediction.indices_T[seen], masks.context.indices_T[masks.prediction_source_T[seen].long()]
    )


def test_arrays_and_lists_are_the_same_and_a_device_moves_everything():
    context, targets = random_lists(0, 3, 2, 4, 12)
    masks = pack_masks(context, [np.stack(image) for image in targets], 12)
    plain = pack_masks([c.tolist() for c in context], [[b.tolist() for b in image] for image in targets], 12)
    for packed, other in ((masks.context, plain.context), (masks.prediction, plain.prediction)):
        assert torch.equal(packed.indices_T, other.indices_T)
    moved = masks.to("meta")
    tensors = [moved.prediction_source_T, moved.prediction_copies_TM, moved.target_rows_T]
    for packed in (moved.context, moved.target_blocks, moved.prediction):
        tensors += [packed.indices_T, packed.cu_seqlens]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.num_patches == 12 and moved.context.max_seqlen == masks.context.max_seqlen


@pytest.mark.parametrize(
    "context, targets, message",
    [
        ([], [], "same images, got 0, 0"),
        ([[0]], [[[1]], [[1]]], "same images, got 1, 2"),
        ([[0], []], [[[1]], [[1]]], "context holds an empty list"),
        ([[0]], [[[]]], "target_blocks holds an empty list"),
        ([[0, 4]], [[[1]]], r"context holds patch 0..4; the image has 0..3"),
        ([[0]], [[[-1]]], r"target_blocks holds patch -1..-1; the image has 0..3"),
        ([[0]], [[[1], [2, 3]]], "all of one size"),
        ([[0], [0]], [[[1], [2]], [[3]]], "as many target blocks"),
        ([[0]], [[]], "as many target blocks"),
    ],
)
def test_errors(context, targets, message):
    with pytest.raises(ValueError, match=message):
        pack_masks(context, targets, 4)


def test_integers_of_any_type_are_indices_and_nothing_else_is():
    context, targets = random_lists(0, 3, 2, 4, 200)  # with the image's offset past what int8 and uint8 hold
    expected = pack_masks(context, targets, 200)
    integers = [getattr(np, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
    tensors = [torch.uint8, torch.int16, torch.int32, torch.int64]
    changes = [lambda part, to=to: part.astype(to) for to in integers if to is not np.int8]
    changes += [lambda part, to=to: torch.from_numpy(part).to(to) for to in tensors]
    changes += [lambda part: part.tolist(), lambda part: [np.int32(index) for index in part]]
    for change in changes:
        masks = pack_masks([change(c) for c in context], [[change(b) for b in image] for image in targets], 200)
        assert torch.equal(masks.prediction.indices_T, expected.prediction.indices_T)
        assert masks.prediction.indices_T.dtype == torch.int32
    small = [(c % 128).astype(np.int8) for c in context]
    assert torch.equal(
        pack_masks(small, targets, 200).context.indices_T % 200, torch.tensor(np.concatenate(small).tolist())
    )
    seen = np.arange(200) < 3
    for wrong in (
        *(seen, seen.tolist(), torch.from_numpy(seen), [True], np.array([1.0, 2.0]), [0.5], [1.0], [float("nan")]),
        *(
            torch.ones(2),
            torch.ones(2, dtype=torch.bfloat16),
            np.float32([1]),
            [1 + 0j],
            ["1"],
            [None],
            np.array([1], object),
        ),
    ):
        for parts in (([wrong, *context[1:]], targets), (context, [[wrong, wrong], *targets[1:]])):
            with pytest.raises(
                ValueError, match=r"^(context|target_blocks) holds \S+; wants integers, the numbers of pa"
            ):
                pack_masks(*parts, 200)


def ragged_context():
    rng = np.random.default_rng(1)
    return [np.sort(rng.choice(40, n, replace=False)) for n in (12, 7, 30, 19)]


def rngs(seed=0, count=4):
    return [np.random.default_rng([seed, image]) for image in range(count)]


def test_all_keeps_every_token():
    context = ragged_context()
    assert [c.tolist() for c in limit_context(context, "all", rngs())] == [c.tolist() for c in context]


def test_batch_min_keeps_the_first_of_each_in_raster_order():
    context = ragged_context()
    assert [c.tolist() for c in limit_context(context, "batch_min", rngs())] == [c[:7].tolist() for c in context]


def test_a_budget_is_a_uniform_subset_in_raster_order():
    context = ragged_context()
    counts = np.zeros((4, 40))
    for seed in range(600):
        for image, kept in enumerate(limit_context(context, "10", rngs(seed))):
            assert kept.size == min(10, context[image].size) and (np.diff(kept) > 0).all()
            counts[image, kept] += 1
    for image, patches in enumerate(context):
        share = min(1.0, 10 / patches.size)
        noise = np.sqrt(share * (1 - share) / 600)
        assert counts[image].sum() == counts[image, patches].sum()
        assert (np.abs(counts[image, patches] / 600 - share) <= 5 * noise).all()


def test_a_budget_of_an_image_does_not_depend_on_its_neighbours():
    context = ragged_context()
    together = limit_context(context, "5", rngs())
    alone = [limit_context([part], "5", [rng])[0] for part, rng in zip(context, rngs(), strict=True)]
    assert [a.tolist() for a in together] == [b.tolist() for b in alone]
    with pytest.raises(ValueError):
        limit_context(context, "5", rngs(count=3))


def test_several_masks_of_an_image_are_masks_of_that_image():
    """As one image's each, but that their patches are all the image's own."""
    context, targets = random_lists(3, 6, 1, 4, 9)
    masks, alone = pack_masks(context, targets, 9, masks_an_image=3), pack_masks(context, targets, 9)
    assert (masks.num_images, alone.num_images) == (2, 6)
    for name in ("context", "target_blocks", "prediction"):
        ours, theirs = getattr(masks, name), getattr(alone, name)
        assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens) and ours.num_pairs == theirs.num_pairs
        assert torch.equal(ours.indices_T, theirs.indices_T // 9 // 3 * 9 + theirs.indices_T % 9)
    for name in ("prediction_source_T", "prediction_copies_TM", "target_rows_T"):
        assert torch.equal(getattr(masks, name), getattr(alone, name))
    held = sorted({mask // 3 * 9 + int(patch) for mask, blocks in enumerate(targets) for patch in blocks[0]})
    assert masks.target_patches_U.tolist() == held
    assert torch.equal(masks.target_patches_U[masks.target_index_T], masks.target_blocks.indices_T.long())
    with pytest.raises(ValueError, match="6 masks are not 4 of each image"):
        pack_masks(context, targets, 9, masks_an_image=4)
