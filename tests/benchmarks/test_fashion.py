"""The study of Fashion-MNIST, small: what decides a run, and that it can be resumed."""

import json

import pytest
import torch

from mmcastling.verbs import castling_modules


@pytest.fixture(scope="module")
def fashion(load_benchmark):
    return load_benchmark("fashion")


@pytest.fixture(scope="module")
def pictures(fashion, data):
    return fashion.Data(data, trained=384, validated=128, tested=128)


def test_a_batch_is_decided_by_its_step_and_another_step_has_another(fashion, pictures):
    once, again, other = (pictures.batch(0, 1, step, 384) for step in (1, 1, 2))
    assert torch.equal(once[0], again[0])
    assert not torch.equal(once[0], other[0])
    assert once[0].shape == (fashion.BATCH, 1, 28, 28)


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


def test_missing_data_says_how_to_get_it_and_too_few_images_are_an_error(
    fashion, data, tmp_path
):
    with pytest.raises(fashion.ConfigError, match="install Debian's dataset-fashion"):
        fashion.find_data(tmp_path)
    with pytest.raises(fashion.ConfigError, match="holds 128 images, not 10000"):
        fashion.Data(data, trained=384, validated=128)


def test_changed_settings_and_damaged_results_are_refused(
    fashion, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(fashion, "STORED", tmp_path)
    options = dict(seed=0, epochs=1, rate=2e-3)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(dict(settings=options)))
    assert fashion._is_stored("run", options)
    with pytest.raises(fashion.ConfigError, match=r"rate=0\.002, now it is 0\.004"):
        fashion._is_stored("run", dict(options, rate=4e-3))
    path.write_text("{")
    with pytest.raises(fashion.ConfigError, match="is damaged"):
        fashion._is_stored("run", options)
    model = fashion.ROWS["softmax"].build(0)
    fashion.train(model, pictures, tmp_path / "a.pth", count=64, **options)
    with pytest.raises(fashion.ConfigError, match="epochs=1, now it is 2"):
        fashion.train(
            model, pictures, tmp_path / "a.pth", count=64, **dict(options, epochs=2)
        )
