"""Transforms of torch see through the attention, in whatever form it computes."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from mmcastling.attention import Attention, fast
from mmcastling.verbs import set_mask

STATES = {"branch": ("1/N", 1.0), "faded": ("1/N", 0.5), "off": (1.0, 1.0)}


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Tokens in chunks, as large pictures have them."""
    monkeypatch.setattr(fast, "_CHUNK", 1)
    monkeypatch.setattr(fast, "_LEAST_ROWS", 4)


def tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 11, 8, generator=generator)


DIRECTION = tokens(4)[:1, :9]


def attention(state, deploy=False):
    torch.manual_seed(0)
    block = Attention(8, 2, deploy=deploy).eval()
    if not deploy:
        set_mask(block, *STATES[state])
    with torch.no_grad():
        block.qkv.weight.mul_(4.0)
    return block


def reverse(block, x):
    return torch.autograd.functional.jacobian(block, x)


def dual_numbers(block, x):
    """The Jacobian times one direction, as far as the others go over all."""
    with torch.no_grad(), forward_ad.dual_level():
        out = block(forward_ad.make_dual(x, DIRECTION))
        return forward_ad.unpack_dual(out).tangent


def jacfwd(block, x):
    with torch.no_grad():
        return torch.func.jacfwd(block)(x)


def jacrev(block, x):
    with torch.no_grad():
        return torch.func.jacrev(block)(x)


@pytest.mark.parametrize("differentiate", [dual_numbers, jacfwd, jacrev])
@pytest.mark.parametrize("state", [*STATES, "deployed"])
def test_every_mode_has_the_derivative_of_the_reverse_mode(
    state, differentiate, few_at_a_time
):
    block = attention(state, deploy=state == "deployed")
    x = tokens(0)[:1, :9]
    expected = reverse(block, x)
    assert expected.abs().max() > 0.1
    if differentiate is dual_numbers:
        expected = (expected * DIRECTION).sum((3, 4, 5))
    assert_close(differentiate(block, x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("state", [*STATES, "deployed"])
def test_vmap_is_a_loop(state, few_at_a_time):
    block = attention(state, deploy=state == "deployed")
    batches = torch.stack([tokens(1), tokens(2), tokens(3)])
    with torch.no_grad():
        found = torch.func.vmap(block)(batches)
        assert_close(found, torch.stack([block(x) for x in batches]))


@pytest.mark.parametrize("norm_output", [False, True])
@pytest.mark.parametrize("form", ["learned", "landmarks"])
def test_vmap_over_any_weight_is_a_loop(form, norm_output):
    options = dict(type="linear_angular", form=form, norm_output=norm_output)
    block = Attention(12, 2, **options)
    weights, x = dict(block.named_parameters()), torch.randn(1, 6, 12)
    for name, weight in weights.items():
        draws = torch.randn(3, *weight.shape)

        def run(value, name=name):
            given = {**weights, name: value}
            return torch.func.functional_call(block, given, (x, (2, 3)))

        expected = torch.stack([run(value) for value in draws])
        assert_close(torch.func.vmap(run)(draws), expected, atol=1e-5, rtol=1e-4)


def test_densities_do_not_hold_what_a_transform_made():
    block = attention("branch").train()
    block(tokens(0))
    before = block.mixer.branch.density
    torch.func.vmap(block)(torch.stack([tokens(1), tokens(2)]))
    assert block.mixer.branch.density is before


def test_a_penalty_that_could_not_act_is_refused():
    block = attention("branch")
    set_mask(block, "1/N", penalty=0.1)
    with pytest.raises(
        RuntimeError, match=r"penalty of the masks \(0.1\) acts in back"
    ):
        torch.func.vmap(block)(torch.stack([tokens(1), tokens(2)]))


def test_tensors_of_other_classes_are_seen_whole(few_at_a_time):
    class Wrapped(torch.Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    block, x = attention("off").requires_grad_(False), tokens(0)
    found = block(x.as_subclass(Wrapped))
    assert type(found) is Wrapped and Wrapped.seen > 0
    assert_close(torch.Tensor(found), block(x))
