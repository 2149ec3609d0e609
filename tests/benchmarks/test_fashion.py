"""The study of Fashion-MNIST, small: what decides a run, and that it can be resumed."""

import pytest
import torch

from mmcastling.verbs import castling_modules


@pytest.fixture(scope="module")
def fashion(load_benchmark):
    return load_benchmark("fashion")


@pytest.fixture(scope="module")
def pictures(fashion, data):
    return fashion.Data(data, trained=384, validated=128, tested=128)


def test_a_batch_is_decided_by_its_step_and_another_step_has_another(pictures):
    once, again, other = (pictures.batch(0, 1, step, 384) for step in (1, 1, 2))
    assert torch.equal(once[0], again[0])
    assert not torch.equal(once[0], other[0])
    assert once[0].shape == (128, 1, 28, 28)


def test_rows_begin_with_the_weights_of_softmax(fashion):
    plain = fashion.ROWS["softmax"].build(3).state_dict()
    for name in ("swin", "recommended-mlp"):
        found = fashion.ROWS[name].build(3).state_dict()
        found = {n.replace(".msa.w_msa.", "."): value for n, value in found.items()}
        for key in ("layers.1.attn.qkv.weight", "pos_embed", "layers.0.ln1.weight"):
            key = f"backbone.{key}"
            assert torch.equal(found[key], plain[key]), (name, key)


def test_a_killed_run_goes_on_to_the_same_weights(fashion, pictures, tmp_path):
    options = dict(seed=0, rate=2e-3, count=256)
    whole, killed = (fashion.ROWS["recommended"].build(0) for _ in range(2))
    result = fashion.train(whole, pictures, tmp_path / "a.pth", epochs=2, **options)
    batch = pictures.batch

    def dying(seed, epoch, step, count):
        if epoch == 1:
            raise KeyboardInterrupt
        return batch(seed, epoch, step, count)

    pictures.batch = dying
    with pytest.raises(KeyboardInterrupt):
        fashion.train(killed, pictures, tmp_path / "b.pth", epochs=2, **options)
    del pictures.batch
    resumed = fashion.ROWS["recommended"].build(0)
    found = fashion.train(resumed, pictures, tmp_path / "b.pth", epochs=2, **options)
    assert found["curve"] == result["curve"]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert not any(module.mask_is_on for _, module in castling_modules(resumed))


def test_a_rate_is_chosen_by_validation(fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "STORED", tmp_path)
    with pytest.raises(fashion.ConfigError, match=r"fashion\.py rates --rows swin"):
        fashion.chosen_rate("swin")
    for rate, best in zip(fashion.RATES, (80.0, 82.0, 81.0), strict=True):
        path = tmp_path / f"rate-swin-{rate:g}.json"
        path.write_text(f'{{"curve": [99.0, {best}]}}')
    assert fashion.chosen_rate("swin") == fashion.RATES[1]
