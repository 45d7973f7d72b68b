"""DSQ's codes: the quantiser, latents as codes, and the transformer that foresees them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.dsq.frame_transformer import CausalTransformer, IndexTransformer, RegressTransformer
from models.dsq.latent_codes import LatentCodes
from models.dsq.model import Dsq
from models.dsq.quantizer import Quantizer, perplexity, usage
from tests.tiny_dsq import a_batch, built


def some_codes(model: Dsq, frames: int = 3) -> tuple[IndexTransformer, Tensor, Tensor]:
    model.eval()
    c, batch = model.config, a_batch()
    assert isinstance(model.forecaster, IndexTransformer)
    codes = torch.randint(0, c.codes, (3, frames, c.codes_per_frame), generator=torch.Generator().manual_seed(0))
    return model.forecaster, codes, model._clock(batch.context.time[:, -1], frames)


def test_the_output_is_the_nearest_code() -> None:
    torch.manual_seed(0)
    quantizer, z = Quantizer(12, 6, 0.25, None, 0.0).double(), 0.1 * torch.randn(5, 4, 6, dtype=torch.float64)
    coded = quantizer(z)
    distance = (z.unsqueeze(-2) - quantizer.code).square().sum(-1)
    assert torch.equal(coded.index, distance.argmin(-1))
    assert torch.equal(coded.vector, quantizer.code[coded.index])
    expected = 1.25 * (z - coded.vector).square().mean(-1)
    torch.testing.assert_close(coded.distance, expected)


def test_gradients_go_straight_through_and_as_in_the_loss() -> None:
    torch.manual_seed(0)
    quantizer, z = Quantizer(12, 6, 0.25, None, 0.0).double(), torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(z)
    coded = quantizer(z)
    (coded.vector * weight).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, weight)  # type: ignore[arg-type]
    assert quantizer.code.grad is None
    z.grad = None
    coded.distance.sum().backward()
    miss = (z - quantizer.code[coded.index]).detach() * 2 / 6
    torch.testing.assert_close(z.grad, 0.25 * miss)
    expected = torch.zeros_like(quantizer.code).index_add(0, coded.index.flatten(), -miss.flatten(0, 1))
    torch.testing.assert_close(quantizer.code.grad, expected)


def test_codes_are_moving_averages_of_what_chose_them() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(4, 3, 0.25, 0.9, 0.0).double()
    sums, uses = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        z = torch.randn(10, 2, 3, dtype=torch.float64)
        index = quantizer(z, learn=True).index
        for code in range(4):
            mine = z[index == code]
            sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(0)
            uses[code] = 0.9 * uses[code] + 0.1 * len(mine)
        chosen = uses > 0
        torch.testing.assert_close(quantizer.code[chosen], (sums / uses.unsqueeze(-1))[chosen])
    before = quantizer.code.clone()
    quantizer(z)
    quantizer(z, known=torch.zeros(10, dtype=torch.bool), learn=True)
    quantizer.eval()(z, learn=True)
    assert torch.equal(quantizer.code, before)


def test_rows_that_are_not_known_do_not_move_the_codes() -> None:
    z = torch.randn(10, 2, 3, generator=torch.Generator().manual_seed(0))
    known = torch.arange(10) < 6
    after = []
    for part, mask in ((z, known), (z[:6], None)):
        torch.manual_seed(1)
        quantizer = Quantizer(4, 3, 0.25, 0.9, 0.1)
        quantizer(part, mask, learn=True)
        after.append(quantizer.code)
    torch.testing.assert_close(after[0], after[1])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_unused_codes_start_again_at_vectors_of_the_batch(decay: float | None) -> None:
    def restarted(seed: int) -> Tensor:
        torch.manual_seed(0)
        quantizer = Quantizer(32, 3, 0.25, decay, 0.1)
        z = 5 + torch.randn(40, 2, 3)
        torch.manual_seed(seed)
        quantizer(z, learn=True)
        away = (quantizer.code.detach().unsqueeze(1) - z.flatten(0, 1)).abs().amax(-1).amin(-1)
        assert int((away == 0).sum()) >= 29  # all but those few that were nearest at the start
        assert usage(quantizer.eval()(z).index, 32) > 0.7
        return quantizer.code.detach()

    assert torch.equal(restarted(1), restarted(1))
    assert not torch.equal(restarted(1), restarted(2))


def test_perplexity_and_usage_in_closed_form() -> None:
    assert float(perplexity(torch.arange(8), 8)) == pytest.approx(8)
    assert float(perplexity(torch.zeros(5, dtype=torch.int64), 8)) == pytest.approx(1)
    assert float(perplexity(torch.tensor([0, 0, 0, 1]), 8)) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert float(usage(torch.tensor([0, 0, 3]), 8)) == 0.25


def test_the_codebook_stays_in_use() -> None:
    """1,000 steps on latents that lie around 40 points: perplexity above 0.3 V, and no code is unused for 500 steps."""
    torch.manual_seed(0)
    quantizer = Quantizer(32, 4, 0.25, 0.99, 0.1)
    coder = LatentCodes(4, 4, 1, 4, 2, 4, quantizer, centred=True)
    points = 3 * torch.randn(40, 4, 4)
    optimizer = torch.optim.SGD(coder.parameters(), lr=0.05)
    last = torch.zeros(32, dtype=torch.int64)
    longest, used = 0, []
    for step in range(1000):
        z = points[torch.randint(0, 40, (64,))] + 0.1 * torch.randn(64, 4, 4)
        coder.observe(z)
        coded = quantizer(coder.features(z), learn=True)
        loss = (coder.unit(coder.latents(coded.vector)) - coder.unit(z)).square().mean() + coded.distance.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last[coded.index.flatten()] = step
        longest = max(longest, int((step - last).max()))
        used.append(coded.index)
    assert longest < 500
    assert perplexity(torch.stack(used[-50:]), 32) > 0.3 * 32


# ---- latents as codes


def test_latents_and_features_have_their_shapes_and_the_mean_is_not_coded() -> None:
    torch.manual_seed(0)
    coder = LatentCodes(64, 5, 4, 8, 4, 6, Quantizer(12, 6, 0.25, None, 0.0), centred=True)
    z = 7 + 2 * torch.randn(500, 64, 5)
    coder.observe(z)
    assert float(coder.unit(z).mean()) == pytest.approx(0, abs=1e-4)
    assert float(coder.unit(z).std()) == pytest.approx(1, abs=1e-2)
    features = coder.features(z[:3])
    assert features.shape == (3, 4, 6)
    assert coder.latents(features).shape == (3, 64, 5)
    shifted = LatentCodes(64, 5, 4, 8, 4, 6, Quantizer(12, 6, 0.25, None, 0.0), centred=True)
    shifted.load_state_dict(coder.state_dict())
    shifted.mean += torch.randn(64, 5)
    torch.testing.assert_close(shifted.features(z[:3] + shifted.mean - coder.mean), features, atol=1e-5, rtol=0)


# ---- transformer of indices


@pytest.mark.parametrize("head", ["index", "frame"])
def test_logits_depend_on_earlier_codes_alone(head: str) -> None:
    """Every code of an earlier frame counts, so codes of a frame see each other; those of the frame itself only code by code."""
    forecaster, codes, clock = some_codes(built(head=head))
    before = forecaster(codes, clock)
    assert before.shape == (3, 2, 4, 12)
    for frame, place in ((0, 0), (0, 3), (1, 0), (1, 2), (2, 1)):
        other = codes.clone()
        other[:, frame, place] = (other[:, frame, place] + 1) % 12
        moved = (forecaster(other, clock) - before).abs().amax((0, 3)).flatten() > 1e-9  # [K*G]
        first = (frame - 1) * 4 + place + 1 if head == "index" else frame * 4  # that may depend on it
        assert not moved[: max(0, first)].any()
        assert moved[max(0, first) :].all()


@pytest.mark.parametrize(("head", "asked"), [("index", 20), ("frame", 5)])
def test_decoding_with_kept_keys_equals_the_whole_pass(head: str, asked: int) -> None:
    forecaster, codes, clock = some_codes(built(head=head), frames=6)
    steps = []

    def choose(logits: Tensor) -> Tensor:
        steps.append(logits.shape)
        return logits.argmax(-1)

    out, likely = forecaster.continued(codes[:, 0], clock, choose)
    assert steps == [(3, 20 // asked, 12)] * asked
    assert torch.equal(out[:, 0], codes[:, 0])
    logits = forecaster(out, clock)
    torch.testing.assert_close(likely, logits.softmax(-1), atol=1e-10, rtol=0)
    assert torch.equal(out[:, 1:], logits.argmax(-1))
    alone, none = forecaster.continued(codes[:, 0], clock[:, :1], choose)
    assert torch.equal(alone, codes[:, :1])
    assert none.shape == (3, 0, 4, 12)


@pytest.mark.parametrize("group", [1, 4])
def test_what_comes_out_of_the_transformer_does_not_depend_on_where_it_is_cut(group: int) -> None:
    torch.manual_seed(0)
    trunk, x = CausalTransformer(16, 2, 2, 0.0, group).double(), torch.randn(3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        cache = trunk.cache(16, x)
        parts = torch.cat([trunk(part, cache) for part in x.split([4, 8, 4], 1)], 1)
        torch.testing.assert_close(parts, trunk(x), atol=1e-10, rtol=0)


def test_frames_of_latents_continue_as_in_the_whole_pass() -> None:
    model = built(head="regress").eval()
    forecaster = model.forecaster
    assert isinstance(forecaster, RegressTransformer)
    clock, first = model._clock(a_batch().context.time[:, -1], 4), torch.randn(3, 16, 8, dtype=torch.float64)
    out = forecaster.continued(first, clock)
    token = forecaster.project(first.flatten(1)).unsqueeze(1)
    for _ in range(3):  # without a cache, from the start each time
        token = torch.cat([token, forecaster.trunk(token + forecaster.clock(clock[:, : token.shape[1]]))[:, -1:]], 1)
    torch.testing.assert_close(out[:, 1:].flatten(2), forecaster.unproject(token[:, 1:]), atol=1e-10, rtol=0)
    torch.testing.assert_close(forecaster(out, clock)[0][:, 0], out[:, 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_at_the_start_all_codes_are_alike_and_one_sequence_can_be_learnt(whole: bool) -> None:
    torch.manual_seed(0)
    forecaster = IndexTransformer(256, 4, 7, 32, 2, 2, 0.0, whole)
    codes, clock = torch.randint(0, 256, (1, 5, 4)), torch.randn(1, 5, 7)

    def entropy() -> Tensor:
        return torch.nn.functional.cross_entropy(forecaster(codes, clock).flatten(0, 2), codes[:, 1:].flatten())

    assert entropy().item() == pytest.approx(math.log(256), abs=0.1)
    optimizer = torch.optim.Adam(forecaster.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        entropy().backward()
        optimizer.step()
    assert entropy() < 0.05
