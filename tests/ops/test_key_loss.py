"""key_loss against its definition as Python loops, with a separate splitmix64, and against the reference backend."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from slm_fast import ops
from slm_fast.errors import InputError


def splitmix64(seed, count):
    """The first `count` outputs of the standard generator (Steele, Lea & Flood 2014)."""
    wrap, outputs = 2**64 - 1, []
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & wrap
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        outputs.append(z ^ (z >> 31))
    return outputs


def loops(query, keys, k, *, groups, mask_prob, seed):
    """The float64 loss, differentiable with respect to keys, and the set of (slot, group) that it selected."""
    B, P = len(query), len(keys)
    h = splitmix64(seed, B * groups * P)
    query, keys = query.double().unflatten(1, (groups, -1)), keys.double().unflatten(1, (groups, -1))
    cosines, moved = [], set()
    for b in range(B):
        for g in range(groups):
            near = {}
            for p in range(P):
                if not (h[(b * groups + g) * P + p] >> 40) * 2.0**-24 < mask_prob:
                    near[p] = query[b, g] @ keys[p, g] / (query[b, g].norm() * keys[p, g].norm())
            for p in sorted(near, key=lambda p: (-near[p].item(), p))[:k]:
                cosines.append(near[p])
                moved.add((p, g))
    return (-torch.stack(cosines).mean() if cosines else keys.sum() * 0), moved


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_and_grad(device, query, keys, k, **options):
    keys = keys.to(device).clone().requires_grad_()
    loss = ops.key_loss(query.to(device), keys, k, **options)
    loss.backward()
    return loss.detach().cpu(), keys.grad.cpu()


def assert_near(got, expected, tolerance):
    assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def test_the_loops_draw_the_published_splitmix64_numbers():
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask_prob", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(
    ("B", "P", "D", "groups", "k"), [(1, 1, 2, 1, 1), (5, 7, 12, 3, 2), (3, 5, 8, 2, 9), (9, 33, 66, 2, 4)]
)
def test_loss_and_gradient_equal_the_specification(device, dtype, mask_prob, B, P, D, groups, k):
    query, keys = normal(B, D).to(dtype), normal(P, D, seed=1).to(dtype)
    options = {"groups": groups, "mask_prob": mask_prob, "seed": 7}
    loss, grad = loss_and_grad(device, query, keys, k, **options)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    leaf = keys.double().clone().requires_grad_()
    expected, moved = loops(query, leaf, k, **options)
    expected.backward()
    assert_near(loss, expected.detach(), min(TOLERANCE[dtype], 1e-5))
    assert_near(grad, leaf.grad, TOLERANCE[dtype])
    still = torch.ones(P, groups, dtype=torch.bool)
    for p, g in moved:
        still[p, g] = False
    assert (grad.unflatten(1, (groups, -1))[still] == 0).all()
    with ops.use_backend("reference"):
        reference_loss, reference_grad = loss_and_grad(device, query, keys, k, **options)
    assert_near(loss, reference_loss, 1e-5)
    assert_near(grad, reference_grad, TOLERANCE[dtype])


@pytest.mark.parametrize("seed", [0, 1, -1, -12345, 2**40 + 3, 2**63 - 1, -(2**63)])
def test_each_64_bit_seed_draws_the_specified_mask(device, seed):
    query, keys = normal(16, 8), normal(16, 8, seed=1)
    expected, _ = loops(query, keys, 16, groups=2, mask_prob=0.5, seed=seed)
    assert_near(loss_and_grad(device, query, keys, 16, groups=2, mask_prob=0.5, seed=seed)[0], expected, 1e-5)


def test_a_slot_is_hidden_below_mask_prob_and_not_at_it(device):
    drawn = (splitmix64(7, 1)[0] >> 40) * 2.0**-24
    for mask_prob, expected in ((drawn, -1.0), (drawn + 2.0**-24, 0.0)):
        loss, _ = loss_and_grad(device, torch.ones(1, 4), torch.ones(1, 4), 1, groups=1, mask_prob=mask_prob, seed=7)
        assert abs(loss - expected) < 1e-6


def test_only_the_selected_slice_of_a_key_moves(device):
    query = torch.tensor([[1.0, 0.1, 1.0, 0.1]])
    keys = torch.tensor([[1.0, 0.0, -1.0, 0.0], [-1.0, 0.0, 1.0, 0.0], [-1.0, 0.0, -1.0, 0.0]])
    _, grad = loss_and_grad(device, query, keys, 1, groups=2, mask_prob=0.0, seed=0)
    assert (grad != 0).any(1).tolist() == [True, True, False]
    assert (grad[0, 2:] == 0).all()
    assert (grad[1, :2] == 0).all()


@pytest.mark.parametrize("rows", [(3, 4, 1.0), (0, 4, 0.3), (3, 0, 0.3)], ids=["all hidden", "no query", "no slot"])
def test_when_nothing_is_selected_loss_and_gradient_are_zero(device, rows):
    B, P, mask_prob = rows
    loss, grad = loss_and_grad(device, normal(B, 8), normal(P, 8), 2, groups=2, mask_prob=mask_prob, seed=3)
    assert loss == 0
    assert grad.shape == (P, 8)
    assert (grad == 0).all()


def test_of_equal_cosines_the_lower_slot_is_selected(device):
    query, keys = torch.ones(1, 4), torch.tensor([[-1.0, 1, 1, 1], [1, -1, 1, 1], [1, 1, -1, 1]])
    _, grad = loss_and_grad(device, query, keys, 2, groups=1, mask_prob=0.0, seed=0)
    assert (grad != 0).any(1).tolist() == [True, True, False]


def test_a_step_down_the_gradient_draws_keys_towards_the_queries(device):
    query, keys = normal(6, 8), normal(4, 8, seed=1)
    options = {"groups": 2, "mask_prob": 0.2, "seed": 5}
    loss, grad = loss_and_grad(device, query, keys, 2, **options)
    assert loss_and_grad(device, query, keys.detach() - 0.1 * grad, 2, **options)[0] < loss


def test_gradcheck_in_float64(device, interpreted):
    query, keys = normal(3, 6).double().to(device), normal(5, 6, seed=1).double().to(device).requires_grad_()
    loss = functools.partial(ops.key_loss, query, k=2, groups=3, mask_prob=0.3, seed=1)
    assert torch.autograd.gradcheck(lambda p: loss(keys=p), keys, fast_mode=interpreted)


def test_differentiating_its_gradient_is_an_error_not_zero(device):
    query, keys = normal(3, 6).to(device), normal(5, 6, seed=1).to(device).requires_grad_()
    loss = functools.partial(ops.key_loss, query, k=2, groups=3, mask_prob=0.3, seed=1)
    [gradient] = torch.autograd.grad(loss(keys=keys), keys, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(loss(keys=keys), keys)[0])
    message = r"^key_loss: it has no second derivative; do not differentiate its gradients$"
    with pytest.raises(RuntimeError, match=message):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.functional.hvp(lambda p: loss(keys=p), keys.detach(), keys.detach())


def test_forward_mode_is_an_error_not_zero(device):
    query, keys = normal(3, 6).to(device), normal(5, 6, seed=1).to(device)
    loss = functools.partial(ops.key_loss, query, k=2, groups=3, mask_prob=0.3, seed=1)
    for p in (keys, keys.clone().requires_grad_()):
        with pytest.raises(InputError, match=r"^key_loss: it has no forward-mode derivative; use reverse mode "):
            torch.func.jvp(lambda p: loss(keys=p), (p,), (p,))


def test_the_query_gets_no_gradient(device):
    query, keys = (normal(3, 6, seed=s).to(device).requires_grad_() for s in (0, 1))
    ops.key_loss(query, keys, 2, groups=1, mask_prob=0.0, seed=1).backward()
    assert query.grad is None
    assert keys.grad.any()


def test_non_contiguous_query_and_keys_equal_the_specification(device):
    query, keys = normal(8, 3).T, normal(5, 16, seed=1)[:, ::2]
    options = {"groups": 2, "mask_prob": 0.2, "seed": 5}
    leaf = keys.double().clone().requires_grad_()
    expected, _ = loops(query, leaf, 2, **options)
    expected.backward()
    loss, grad = loss_and_grad(device, query, keys, 2, **options)
    assert_near(loss, expected.detach(), 1e-5)
    assert_near(grad, leaf.grad, 1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_mask(device):
    query, keys = normal(16, 32), normal(24, 32, seed=1)
    first, again, other = (
        loss_and_grad(device, query, keys, 3, groups=2, mask_prob=0.5, seed=seed) for seed in (9, 9, 10)
    )
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[0] != other[0]


def test_autocast_does_not_change_the_loss_or_the_gradient(device):
    query, keys = normal(16, 32), normal(24, 32, seed=1)
    expected = loss_and_grad(device, query, keys, 3, groups=2, mask_prob=0.3, seed=1)
    with torch.autocast(device, torch.bfloat16):
        got = loss_and_grad(device, query, keys, 3, groups=2, mask_prob=0.3, seed=1)
    assert_near(got[0], expected[0], 1e-6)
    assert_near(got[1], expected[1], 1e-6)


ONES = torch.ones


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("query", {"query": ONES(8)}),
        ("keys", {"keys": ONES(3, 7)}),
        ("keys", {"keys": ONES(3, 8, dtype=torch.bfloat16)}),
        ("k", {"k": 0}),
        ("groups", {"groups": 3}),
        *(("mask_prob", {"mask_prob": p}) for p in (-0.1, 1.1, math.nan)),
    ],
)
def test_each_wrong_argument_is_an_error_that_names_it(name, wrong):
    call = {"query": ONES(2, 8), "keys": ONES(3, 8), "k": 2, "groups": 2, "mask_prob": 0.1, "seed": 0} | wrong
    with pytest.raises(InputError, match=rf"^{name}: expected "):
        ops.key_loss(**call)


def test_it_compiles_into_one_graph_forward_and_backward(device):
    def step(query, keys):
        return ops.key_loss(query, keys, 2, groups=2, mask_prob=0.3, seed=1)

    query, keys = normal(3, 8).to(device), normal(5, 8).to(device)
    leaf = keys.clone().requires_grad_()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(query, leaf)
    loss.backward()
    eager_loss, eager_grad = loss_and_grad(device, query, keys, 2, groups=2, mask_prob=0.3, seed=1)
    assert torch.equal(loss.detach().cpu(), eager_loss)
    assert torch.equal(leaf.grad.cpu(), eager_grad)
