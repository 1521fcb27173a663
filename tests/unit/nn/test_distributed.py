"""Two gloo processes against one: gathering, and what is computed over all of them. All of it in one started pair."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nnssl_ext.nn import assign, distributed
from nnssl_ext.nn.contrastive import nt_xent, rank_mean
from nnssl_ext.nn.cosine import negative_cosine
from nnssl_ext.nn.losses import koleo
from nnssl_ext.nn.projector import normalized_mlp

ROOT = Path(__file__).parents[3]
CLASSES = 6
SHARES = [(4, 4), (3, 5), (7, 1), (0, 8), (8, 0), (0, 0)]  # rows of each process
WORK = """
import sys, torch
torch.set_num_threads(1)
from nnssl_ext.nn import distributed
from tests.unit.nn import test_distributed
with distributed.group("cpu"):
    torch.save(test_distributed.work(), f"{sys.argv[1]}/{distributed.rank()}.pt")
distributed.leave(0)  # as the command line does: gloo aborts some teardowns of the interpreter
"""

LEAVING = """
import atexit, os, sys, torch
from nnssl_ext.nn import distributed
class Teardown:
    def __del__(self):
        os.abort()
kept = Teardown()
with distributed.group("cpu"):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
atexit.register(lambda: open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").close())
print("all is done", file=open(f"{sys.argv[1]}/out{os.environ['RANK']}", "w"))
distributed.leave(3 if os.environ["RANK"] == "1" else 0)
"""


def rows(count: int, number: int) -> Tensor:
    return torch.randn(count, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def share(x: Tensor, counts: tuple[int, int]) -> Tensor:
    """This process's rows; all of them when it is the only one."""
    return x if distributed.ranks() == 1 else x.split(list(counts))[distributed.rank()]


def work() -> dict[str, dict[tuple[int, int], list[Tensor]]]:
    """What a process finds for each way to share the rows, alone or as one of two."""
    tasks = {"sinkhorn": balanced, "centre": centred, "koleo": spread, "joined": together}
    return {name: {counts: task(counts) for counts in SHARES} for name, task in tasks.items()} | {
        "contrast": {(4, 4): contrasted()},
        "siamese": {(4, 4): predicted()},
    }


def balanced(counts: tuple[int, int]) -> list[Tensor]:
    logits = share(rows(sum(counts), 0).tanh(), counts)
    row, column = assign.sinkhorn(logits, 0.07)
    return [assign.probabilities(logits, 0.07, row, column), column]


def centred(counts: tuple[int, int]) -> list[Tensor]:
    """The state after each of two steps of two batches, and within them."""
    centre, found = assign.Centre(CLASSES).double(), []
    for step in range(2):
        for batch in range(2):
            centre.add(share(rows(sum(counts), 2 * step + batch), counts))
            found += [centre.sum.clone(), centre.count.clone()]
        centre.update()
        found.append(centre.value.clone())
    return found


def spread(counts: tuple[int, int]) -> list[Tensor]:
    """The loss, and the gradient by weights that all processes share, averaged over them as DDP does."""
    weight = rows(CLASSES, 9).requires_grad_()
    loss = koleo(share(rows(sum(counts), 1), counts) @ weight)
    (gradient,) = torch.autograd.grad(loss, weight)
    return [loss.detach(), distributed.stacked(gradient).mean(0)]


def contrasted() -> list[Tensor]:
    """The product of the contrast of two versions of eight samples, two of which have one subject, and of a mean over them, with its averaged gradient."""
    weight = rows(CLASSES, 9).requires_grad_()
    a, b = (share(rows(8, number), (4, 4)) @ weight for number in (4, 5))
    subjects = share(torch.tensor([0, 1, 2, 3, 4, 1, 6, 7]), (4, 4)).tolist()
    loss = nt_xent(a, b, 0.3, subjects) * rank_mean((a - b).abs().mean())
    (gradient,) = torch.autograd.grad(loss, weight)
    return [loss.detach(), distributed.stacked(gradient).mean(0)]


def predicted() -> list[Tensor]:
    """Cosines of predictions behind batch normalisation, their averaged gradients, and the running moments."""
    torch.manual_seed(0)
    perceptron = torch.nn.Sequential(normalized_mlp((CLASSES, 5, CLASSES), last=True), normalized_mlp((CLASSES, 4, CLASSES), last=False)).double()
    loss = negative_cosine(perceptron(share(rows(8, 6), (4, 4))), share(rows(8, 7), (4, 4)))
    gradients = torch.autograd.grad(loss, list(perceptron.parameters()))
    return [*(distributed.stacked(x).mean(0) for x in (loss, *gradients)), *perceptron.buffers()]


def together(counts: tuple[int, int]) -> list[Tensor]:
    """All rows, and the gradient by this process's ones of a loss in which the i-th row of all counts i + 1 times."""
    own = share(rows(sum(counts), 3), counts).clone().requires_grad_()
    everybody = distributed.joined(own)
    (everybody.sum(1) @ torch.arange(1, len(everybody) + 1, dtype=torch.float64)).backward()
    return [everybody.detach(), own.grad]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        assert distributed.launch([sys.executable, "-c", WORK, str(folder)], 2) == 0
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", SHARES)
def test_two_processes_balance_the_prototypes_over_the_vectors_of_both(found, counts):
    p, column = balanced(counts)
    same(torch.cat([half["sinkhorn"][counts][0] for half in found]), p)
    for half in found:
        same(half["sinkhorn"][counts][1], column)
        assert bool(column.isfinite().all())


@pytest.mark.parametrize("counts", SHARES)
def test_the_centre_and_what_it_collects_are_equal_in_both_processes_at_any_time(found, counts):
    for half in found:
        for one, other in zip(half["centre"][counts], centred(counts), strict=True):
            same(one, other)


@pytest.mark.parametrize("counts", SHARES)
def test_koleo_and_its_averaged_gradient_are_those_of_one_process(found, counts):
    loss, gradient = spread(counts)
    assert bool((gradient != 0).any()) == (sum(counts) > 1)
    for half in found:
        same(half["koleo"][counts][0], loss)
        same(half["koleo"][counts][1], gradient)


def test_contrast_and_its_averaged_gradient_are_those_of_one_process(found):
    loss, gradient = contrasted()
    assert loss > 0 and bool(gradient.any())
    for half in found:
        same(half["contrast"][(4, 4)][0], loss)
        same(half["contrast"][(4, 4)][1], gradient)


@pytest.mark.parametrize("counts", SHARES)
def test_joined_rows_are_in_the_order_of_the_processes_and_have_the_gradient_of_their_own(found, counts):
    everybody, gradient = together(counts)
    assert torch.equal(everybody, rows(sum(counts), 3))
    for half in found:
        assert torch.equal(half["joined"][counts][0], everybody)
    assert torch.equal(torch.cat([half["joined"][counts][1] for half in found]), gradient)


def test_a_single_process_gathers_itself():
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.joined(x) is x
    assert torch.equal(distributed.stacked(x), x.detach()[None]) and not distributed.stacked(x).requires_grad


def test_batch_normalisation_of_two_processes_and_its_averaged_gradients_are_those_of_one(found):
    expected = predicted()
    assert expected[0] != 0 and all(bool(x.any()) for x in expected)
    for half in found:
        for one, other in zip(half["siamese"][(4, 4)], expected, strict=True):
            same(one, other)


def test_a_process_leaves_its_group_without_the_interpreters_teardown_but_with_all_that_was_registered_for_its_end(tmp_path):
    assert distributed.launch([sys.executable, "-c", LEAVING, str(tmp_path)], 2) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "out0", "out1"}
