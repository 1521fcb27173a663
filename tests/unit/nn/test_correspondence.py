"""Retrieval of corresponding patches against plain loops in fp64, perfect features and features that know nothing."""

import math

import numpy as np
import pytest
import torch

from nnssl_ext.data.spatial import make_affine, rotation_matrix, to_case, to_crop
from nnssl_ext.nn.correspondence import QUERIES, labels_of_other, retrieval, shared_grid, shared_places, shared_voxels
from nnssl_ext.nn.warp import warp

GRID, TOKEN = (4, 5, 6), (4, 2, 3)
SIZE = tuple(g * t for g, t in zip(GRID, TOKEN))


def affine(center, degrees=(0, 0, 0), zoom=1.0, mirrored=(False, False, False), size=SIZE):
    return make_affine(center, size, (1.0, 1.0, 1.0), rotation_matrix(np.array(degrees)), np.full(3, zoom), np.array(mirrored))


def tensor(*affines):
    return torch.from_numpy(np.stack(affines))


def centres(of, grid=GRID, token=TOKEN):
    """Token centres in voxels of the case, (N, 3)."""
    cells = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), -1).reshape(-1, 3)
    return to_case(of, (cells + 0.5) * token - 0.5)


def plain(a, b, affine_a, affine_b, chosen):
    """Hits, chance and count by loops."""
    hits, chance, count = 0, 0.0, 0
    cells = [(z, y, x) for z in range(GRID[0]) for y in range(GRID[1]) for x in range(GRID[2])]
    for sample in range(len(a)):
        for query in chosen:
            voxel = [(c + 0.5) * t - 0.5 for c, t in zip(cells[query], TOKEN)]
            inside = to_crop(affine_b[sample], to_case(affine_a[sample], np.array(voxel)))
            if any(v < (t - 1) / 2 - 1e-6 or v > s - (t + 1) / 2 + 1e-6 for v, t, s in zip(inside, TOKEN, SIZE)):
                continue
            similarity, near = [], []
            for cell, features in zip(cells, b[sample].tolist()):
                own = a[sample, query].tolist()
                dot = sum(u * v for u, v in zip(own, features))
                similarity.append(dot / math.sqrt(sum(u * u for u in own) * sum(v * v for v in features)))
                centre = [(c + 0.5) * t - 0.5 for c, t in zip(cell, TOKEN)]
                near.append(math.sqrt(sum(((v - c) / t) ** 2 for v, c, t in zip(inside, centre, TOKEN))) <= 1 + 1e-6)
            hits, chance, count = hits + near[similarity.index(max(similarity))], chance + sum(near) / len(near), count + 1
    return hits, chance, count


def test_the_figures_equal_plain_loops():
    rng = np.random.default_rng(0)
    first = [affine((20, 20, 20)), affine((30.3, 18, 22), (10, -20, 30), 1.3), affine((20, 20, 20), mirrored=(True, False, True))]
    second = [affine((22, 19.5, 21)), affine((29, 20, 20.2), (0, 25, -8), 0.9, (False, True, False)), affine((21, 21, 18), (90, 0, 0))]
    a, b = rng.normal(size=(3, 120, 6)), rng.normal(size=(3, 120, 6))
    for sample in range(3):  # features that partly know their place
        a[sample, :, :3] += 0.2 * centres(first[sample])
        b[sample, :, :3] += 0.2 * centres(second[sample])
    found = retrieval(torch.from_numpy(a), torch.from_numpy(b), tensor(*first), tensor(*second), GRID, TOKEN)
    hits, chance, count = plain(a, b, first, second, range(120))
    assert int(found["count"]) == count > 100 and 0.05 < hits / count < 0.95
    assert float(found["hits"]) == pytest.approx(hits / count, rel=1e-6) and float(found["chance"]) == pytest.approx(chance / count, rel=1e-6)


def test_a_strided_choice_of_queries_is_counted_as_it_is():
    rng = np.random.default_rng(0)
    first, second = affine((20, 20, 20)), affine((20.5, 20, 20.5), zoom=1.2)
    a, b = rng.normal(size=(1, 120, 6)), rng.normal(size=(1, 120, 6))
    found = retrieval(torch.from_numpy(a), torch.from_numpy(b), tensor(first), tensor(second), GRID, TOKEN, queries=20)
    chosen = [(z * 5 + y) * 6 + x for z in (0, 2) for y in (0, 2, 4) for x in (0, 2, 4)]  # of 18; every token would be 120
    hits, chance, count = plain(a, b, [first], [second], chosen)
    assert int(found["count"]) == count > 5
    assert float(found["hits"]) == pytest.approx(hits / count, abs=1e-6) and float(found["chance"]) == pytest.approx(chance / count, rel=1e-6)


VIEWS = {
    "the same": affine((40, 40, 40)),
    "shifted by a fraction of a token": affine((41.7, 39.2, 40.5)),
    "mirrored": affine((40, 40, 40), mirrored=(True, True, True)),
    "rotated": affine((41, 40, 39), (20, -35, 50)),
    "rotated, mirrored and zoomed": affine((38, 41, 40), (-30, 10, 15), 1.2, (False, False, True)),
}


@pytest.mark.parametrize("other", VIEWS.values(), ids=VIEWS)
def test_features_that_name_the_place_are_always_found(other):
    """The code is a point of a sphere; near its pole cosines order points as their distances do."""

    def code(of):
        place = 0.01 * (centres(of, (6, 6, 6), (4, 4, 4)) - 40)
        square = (place**2).sum(1, keepdims=True)
        return torch.from_numpy(np.concatenate((2 * place, square - 1), 1) / (square + 1))[None]

    size = (24, 24, 24)
    first, second = affine((40, 40, 40), size=size), other + np.column_stack((np.zeros((3, 3)), other[:, :3] @ ((np.array(SIZE) - size) / 2)))
    found = retrieval(code(first), code(second), tensor(first), tensor(second), (6, 6, 6), (4, 4, 4))
    assert float(found["hits"]) == 1 and 40 < int(found["count"]) <= 216 and 0 < float(found["chance"]) < 0.05


def test_features_that_know_nothing_are_found_by_chance():
    generator = torch.Generator().manual_seed(0)
    first, second = affine((40, 40, 40)), affine((42, 41, 40), (10, 0, 20))
    a, b = (torch.randn(64, 120, 16, generator=generator) for _ in range(2))
    found = retrieval(a, b, tensor(*[first] * 64), tensor(*[second] * 64), GRID, TOKEN)
    hits, chance, count = (float(found[key]) for key in ("hits", "chance", "count"))
    assert count > 3000 and abs(hits - chance) < 4 * math.sqrt(chance * (1 - chance) / count)


def test_equal_views_count_every_token_and_their_neighbours_as_chance():
    here, features = affine((40, 40, 40)), torch.randn(1, 120, 16)
    found = retrieval(features, features, tensor(here), tensor(here), GRID, TOKEN)
    pairs = 2 * (3 * 5 * 6 + 4 * 4 * 6 + 4 * 5 * 5)  # ordered face neighbours
    assert float(found["hits"]) == 1 and int(found["count"]) == 120 and float(found["chance"]) == pytest.approx((120 + pairs) / 120**2)


def test_views_that_do_not_overlap_have_no_query_and_no_nan():
    features = torch.randn(1, 120, 16)
    found = retrieval(features, features, tensor(affine((40, 40, 40))), tensor(affine((140, 40, 40))), GRID, TOKEN)
    assert {key: float(value) for key, value in found.items()} == {"hits": 0, "chance": 0, "count": 0}


@pytest.mark.parametrize("grid", [(12, 12, 12), (20, 20, 20), (8, 12, 16), (1, 40, 40)])
def test_few_tokens_are_asked_for(grid):
    here, cells = affine((0, 0, 0), size=grid), math.prod(grid)
    features = torch.randn(1, cells, 4)
    assert 0.3 * QUERIES < int(retrieval(features, features, tensor(here), tensor(here), grid, (1, 1, 1))["count"]) <= QUERIES


def test_half_precision_under_autocast_is_compared_in_full_precision():
    first, second = affine((40, 40, 40)), affine((41, 40.5, 39), (5, 5, 5))
    a, b = torch.randn(2, 120, 16).bfloat16(), torch.randn(2, 120, 16).bfloat16()
    arguments = (tensor(first, first), tensor(second, second), GRID, TOKEN)
    with torch.autocast("cpu", torch.bfloat16):
        found = retrieval(a, b, *arguments)
    assert found == retrieval(a.float(), b.float(), *arguments)


# Reading two maps at the same places

PAIRS = {
    "shifted by whole voxels": (affine((20, 20, 20)), affine((24, 17, 25))),
    "mirrored alike": (affine((20, 20, 20), mirrored=(True, False, True)), affine((22, 23, 18), mirrored=(True, False, True))),
    "mirrored apart and zoomed": (
        affine((20, 20, 20), zoom=1.2, mirrored=(False, True, False)),
        affine((21.3, 19, 20.5), zoom=0.9, mirrored=(True, False, False)),
    ),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_maps_of_places_are_equal_when_both_are_read_at_the_shared_ones(pair):
    maps = [torch.from_numpy(centres(of)).T.reshape(1, 3, *GRID) for of in pair]
    a, b = (warp(*both) for both in zip(maps, shared_grid(tensor(pair[0]), tensor(pair[1]), GRID, TOKEN)))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    spans = [(m.amin((0, 2, 3, 4)), m.amax((0, 2, 3, 4))) for m in maps]
    torch.testing.assert_close(a.amin((0, 2, 3, 4)), torch.maximum(spans[0][0], spans[1][0]))  # the places reach from one end of what is shared to the other
    torch.testing.assert_close(a.amax((0, 2, 3, 4)), torch.minimum(spans[0][1], spans[1][1]))
    for axis in range(3):  # evenly
        steps = a[0, axis].diff(dim=axis)
        torch.testing.assert_close(steps, steps.flatten()[0].expand_as(steps))


def test_two_views_of_one_crop_are_read_at_their_cells_and_every_sample_by_its_own_affines():
    one, other = PAIRS["mirrored alike"]
    both = shared_grid(tensor(one, one), tensor(one, other), GRID, TOKEN)
    assert both.shape == (2, 2, 3, *GRID) and both[:, 0].abs().max() < 1e-12 < both[:, 1].abs().max()
    torch.testing.assert_close(both[:, 1:], shared_grid(tensor(one), tensor(other), GRID, TOKEN))


def test_views_that_share_less_than_a_cell_are_read_within_a_cell_of_the_same_places():
    pair = affine((20, 20, 20)), affine((34, 20, 20))  # two voxels of a cell of four are shared along the first axis
    maps = [torch.from_numpy(centres(of)).T.reshape(1, 3, *GRID) for of in pair]
    a, b = (warp(*both) for both in zip(maps, shared_grid(tensor(pair[0]), tensor(pair[1]), GRID, TOKEN)))
    assert (a - b)[:, 1:].abs().max() < 1e-9 and 0 < (a - b)[:, 0].abs().max() <= TOKEN[0]


def test_a_map_of_one_cell_along_an_axis_is_read_there():
    both = shared_grid(tensor(affine((20, 20, 20))), tensor(affine((21, 20, 20))), (1, 2, 2), (16, 10, 9))
    assert both.isfinite().all() and both[1, :, 1:].abs().max() < 1e-9


@pytest.mark.parametrize("pair", [*PAIRS.values(), (affine((20, 20, 20)), affine((22, 21, 19), (20, -10, 30)))], ids=[*PAIRS, "turned"])
def test_shared_voxels_are_those_whose_centre_lies_in_the_other_view(pair):
    mask = shared_voxels(tensor(pair[0]), tensor(pair[1]), SIZE)[0]
    places = to_crop(pair[1], to_case(pair[0], np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), -1)))
    assert np.array_equal(mask.numpy(), np.all([(-0.5 - 1e-6 <= places[..., k]) & (places[..., k] <= SIZE[k] - 0.5 + 1e-6) for k in range(3)], axis=0))
    assert 0 < int(mask.sum()) < mask.numel()


def test_the_share_of_the_voxels_of_crops_that_are_only_shifted_is_that_of_their_boxes():
    mask = shared_voxels(*(tensor(of) for of in PAIRS["shifted by whole voxels"]), SIZE)
    assert int(mask.sum()) == (SIZE[0] - 4) * (SIZE[1] - 3) * (SIZE[2] - 5)


# Labels of the other view


@pytest.mark.parametrize("pair", [*PAIRS.values(), (affine((20, 20, 20)), affine((22, 21, 19), (20, -10, 30))), (affine((20, 20, 20)), affine((90, 20, 20)))])
def test_a_voxel_gets_the_label_of_the_nearest_voxel_of_the_other_view_and_0_outside_of_it(pair):
    labels = np.random.default_rng(0).integers(1, 100, (2, *SIZE))
    found = labels_of_other(torch.from_numpy(labels).float(), tensor(pair[0], pair[1]), tensor(pair[1], pair[1])).numpy()
    assert np.array_equal(found[1], labels[1])  # of the same crop
    for place in np.ndindex(*SIZE):
        there = np.rint(to_crop(pair[1], to_case(pair[0], np.array(place)))).astype(int)
        inside = all(0 <= p < n for p, n in zip(there, SIZE))
        assert found[(0, *place)] == (labels[(0, *there)] if inside else 0)


def test_labels_of_the_case_seen_through_either_view_are_the_same():
    numbers = np.random.default_rng(0).integers(1, 100, (60, 60, 60))
    pair = PAIRS["mirrored alike"]
    seen = [numbers[tuple(to_case(of, np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), -1)).round().astype(int).T)].T for of in pair]
    found = labels_of_other(torch.from_numpy(seen[1])[None], tensor(pair[0]), tensor(pair[1]))[0].numpy()
    shared = shared_voxels(tensor(pair[0]), tensor(pair[1]), SIZE)[0].numpy()
    assert np.array_equal(found, np.where(shared, seen[0], 0))


# The same places in two views that may be turned

TURNED = {
    **PAIRS,
    "turned": (affine((20, 20, 20)), affine((22, 21, 19), (20, -10, 30))),
    "turned, zoomed and mirrored": (
        affine((20, 20, 20), (5, 8, -9), 1.2, (True, False, True)),
        affine((21, 18, 23), (-10, 3, 7), 0.85, (True, False, True)),
    ),
}


@pytest.mark.parametrize("cell", [(1, 1, 1), TOKEN], ids=str)
@pytest.mark.parametrize("name", TURNED)
def test_shared_places_are_the_same_of_the_case_and_lie_among_the_cell_centres_of_both_views(name, cell):
    pair = TURNED[name]
    places, valid = shared_places(tensor(pair[0], pair[0]), tensor(pair[1], pair[1]), SIZE, cell, 1000)
    count = math.prod(min(10, s // c) for s, c in zip(SIZE, cell)) if cell != TOKEN else 120
    assert places.shape == (2, 2, count, 3) and torch.equal(valid[0], valid[1])
    first, second = places[:, 0].numpy()
    np.testing.assert_allclose(to_case(pair[0], first), to_case(pair[1], second), atol=1e-9)
    inside = np.all([(p >= (np.array(cell) - 1) / 2 - 1e-6) & (p <= np.array(SIZE) - 1 - (np.array(cell) - 1) / 2 + 1e-6) for p in (first, second)], (0, 2))
    assert np.array_equal(valid[0].numpy(), inside) and inside.mean() > 0.2
    assert inside.all() or name not in PAIRS  # of views that are not turned, the box holds nothing else


@pytest.mark.parametrize("most", [1, 7, 27, 64, 1000, 10_000])
def test_shared_places_are_as_many_as_asked_for_at_most_and_no_more_than_cells(most):
    here = tensor(affine((20, 20, 20)))
    places, valid = shared_places(here, here, SIZE, TOKEN, most)
    assert places.shape[2] <= min(most, 120) and places.shape[2] == {1: 1, 7: 1, 27: 27, 64: 64}.get(most, 120) and valid.all()
    torch.testing.assert_close(places[0], places[1], rtol=0, atol=1e-9)
    assert torch.unique(places[0, 0], dim=0).shape == places[0, 0].shape
    low, high = places[0, 0].amin(0), places[0, 0].amax(0)  # half a part from the outermost cell centres
    torch.testing.assert_close(low + high, torch.tensor(SIZE).double() - 1)


@pytest.mark.parametrize("name", ["half a cell", "a corner", "a corner, turned", "everything"])
def test_views_that_share_next_to_nothing_have_a_place_that_counts(name):
    others = {"half a cell": affine((34, 20, 20)), "a corner": affine((35.5, 29.4, 36.9)), "a corner, turned": affine((33, 27, 34), (30, -40, 25))}
    here, other = affine((20, 20, 20)), others.get(name, affine((20, 20, 20)))
    places, valid = shared_places(tensor(here, here), tensor(other, here), SIZE, TOKEN, 1000)
    assert valid[0].any() and valid[1].all() and places.isfinite().all()
    if "turned" not in name:
        for view in places[:, 0][:, valid[0]].numpy():  # within a cell of the outermost centres, where nothing is shared between these
            assert (view >= -(np.array(TOKEN) + 1) / 2).all() and (view <= np.array(SIZE) - 1 + (np.array(TOKEN) + 1) / 2).all()
