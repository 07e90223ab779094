"""Heads on features, each against its definition or against the library that has it too."""

import importlib
from typing import Any

import easyfsl.methods
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lr_ray.errors import ConfigError, EpisodeError
from lr_ray.fewshot.episodes import EpisodeShape, draw_test_episodes
from lr_ray.fewshot.evaluate import predict
from lr_ray.fewshot.methods import FeatureMethod, Head, expand, find_method, known_methods
from lr_ray.fewshot.methods.bpa import balanced_affinities
from lr_ray.fewshot.methods.linear_probe import logistic_regression

HEADS = ["nn", "nn-cosine", "bpa", "linear-probe", "simple-shot", "bd-cspn", "laplacian-shot", "pt-map", "tim"]


def head_of(label: str, trained: dict[str, Tensor] | None = None) -> Head:
    chosen = find_method(label)
    assert isinstance(chosen.method, FeatureMethod)
    return chosen.method.head(chosen.settings, trained or {})


def episodes(noise: float, *, n_shot: int = 2, dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of 6 episodes: (6, 4, K, D) support, (6, 20, D) queries and their (20,) ways."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 4, 1, dim, generator=generator)
    support = centres + noise * torch.randn(6, 4, n_shot, dim, generator=generator)
    queries = centres + noise * torch.randn(6, 4, 5, dim, generator=generator)
    return support, queries.flatten(1, 2), torch.arange(4).repeat_interleave(5)


@pytest.mark.parametrize("label", HEADS)
def test_separable_classes_are_told_apart_in_inference_mode(label: str) -> None:
    support, queries, ways = episodes(0.05)
    with torch.inference_mode():
        scores = head_of(label)(support, queries)
    assert scores.shape == (6, 20, 4)
    assert torch.equal(scores.argmax(dim=-1), ways.expand(6, -1))


@pytest.mark.parametrize("label", [name for name in HEADS if name not in ("bpa", "bd-cspn", "laplacian-shot", "pt-map", "tim")])
def test_inductive_heads_look_at_each_query_alone(label: str) -> None:
    support, queries, _ = episodes(1.0)
    together = head_of(label)(support, queries)
    alone = torch.cat([head_of(label)(support, queries[:, i : i + 1]) for i in range(20)], dim=1)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


def test_transductive_heads_do_not() -> None:
    support, queries, _ = episodes(1.0)
    assert not torch.allclose(head_of("bpa")(support, queries)[:, :5], head_of("bpa")(support, queries[:, :5]), atol=1e-3)


def test_nn_is_the_prototypical_evaluation_of_easyfsl_to_the_digit() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = np.repeat(np.arange(8), 20)
    features = torch.randn(8, 1, 32, generator=generator).expand(8, 20, 32).flatten(0, 1)
    features = features + 2.5 * torch.randn(160, 32, generator=generator)
    shape = EpisodeShape(n_way=5, n_shot=2, n_query=7)
    drawn = draw_test_episodes(labels, shape, num_episodes=50, seed=1)
    ours = predict(features, drawn, shape)

    classifier = easyfsl.methods.PrototypicalNetworks()
    for episode, found in zip(drawn, ours, strict=True):
        classifier.process_support_set(features[episode[:, :2].ravel()], torch.arange(5).repeat_interleave(2))
        expected = classifier(features[episode[:, 2:].ravel()]).argmax(dim=1)
        assert found.ravel().tolist() == expected.tolist()
    assert 0.3 < (ours == np.arange(5)[:, None]).mean() < 0.95


@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
def test_the_linear_probe_is_scikit_learns_logistic_regression(c: float) -> None:
    support, queries, _ = episodes(1.0, n_shot=3)
    weights, bias = logistic_regression(F.normalize(support.flatten(1, 2), dim=-1), torch.arange(4).repeat_interleave(3), c)
    scores = head_of(f"linear-probe:c={c}")(support, queries)
    for index in range(len(support)):
        expected = LogisticRegression(C=c, tol=1e-8, max_iter=5000)
        inputs = F.normalize(support[index].flatten(0, 1).double(), dim=1).numpy()
        expected.fit(inputs, np.arange(4).repeat(3))
        np.testing.assert_allclose(weights[index], expected.coef_, atol=2e-4)
        np.testing.assert_allclose(
            bias[index] - bias[index].mean(), expected.intercept_ - expected.intercept_.mean(), atol=2e-4
        )
        found = expected.predict_log_proba(F.normalize(queries[index].double(), dim=1).numpy())
        np.testing.assert_allclose(scores[index].log_softmax(dim=1), found, atol=1e-3)


def test_balanced_affinities_are_a_balanced_plan() -> None:
    """Before it is scaled, what each gives and takes is one unit; itself it gives nothing."""
    support, queries, _ = episodes(0.5)
    features = torch.cat([support.flatten(1, 2), queries], dim=1)
    found = balanced_affinities(features, regularisation=0.5, num_iterations=200)
    count = features.shape[1]
    assert torch.equal(found.diagonal(dim1=1, dim2=2), torch.ones(6, count))
    plan = found - torch.eye(count)
    rows, columns = plan.sum(dim=2), plan.sum(dim=1)
    torch.testing.assert_close(rows, rows[:, :1].expand(-1, count), rtol=1e-3, atol=0)
    torch.testing.assert_close(columns, rows, rtol=1e-3, atol=0)
    assert torch.equal(plan.amax(dim=(1, 2)), torch.ones(6))


def test_bpa_gains_by_looking_at_the_queries_together() -> None:
    support, queries, ways = episodes(1.5, n_shot=1, dim=32)
    plain, transformed = ((head_of(name)(support, queries).argmax(dim=-1) == ways).float().mean() for name in ("nn", "bpa"))
    assert transformed > plain + 0.03


# --------------------------------------------------------------------------------------------------------------- CAML

SMALL = "caml:width=32,num_layers=1,num_steps=400,learning_rate=0.003"


def caml_data(num_classes: int = 12, per_class: int = 12) -> tuple[Tensor, Tensor]:
    """Classes that differ in the first 4 of 16 features, drowned by the others, which differ between all images."""
    generator = torch.Generator().manual_seed(0)
    features = 2.0 * torch.randn(num_classes * per_class, 16, generator=generator)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    features[:, :4] = 2.0 * torch.randn(num_classes, 4, generator=generator)[labels]
    return features, labels


def fitted(label: str, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    chosen = find_method(label)
    assert isinstance(chosen.method, FeatureMethod)
    assert chosen.method.fit is not None
    return chosen.method.fit(chosen.settings, features, labels, 0)


def test_caml_learns_from_other_classes_what_tells_classes_apart() -> None:
    features, labels = caml_data(24)
    trained = fitted(SMALL, features[:192], labels[:192])
    rest, of_rest = features[192:], labels[192:].numpy() - 16
    shape = EpisodeShape(n_way=5, n_shot=3, n_query=5)
    drawn = draw_test_episodes(of_rest, shape, num_episodes=60, seed=0)
    with torch.inference_mode():
        learnt = predict(rest, drawn, shape, head_of(SMALL, trained))
    plain = predict(rest, drawn, shape, head_of("nn-cosine"))
    accuracy, plain_accuracy = ((found == np.arange(5)[:, None]).mean() for found in (learnt, plain))
    assert accuracy > plain_accuracy + 0.05


def test_caml_is_the_same_twice_and_knows_no_order_of_ways() -> None:
    label = "caml:width=32,num_layers=1,num_steps=3"
    features, labels = caml_data()
    trained, again = fitted(label, features, labels), fitted(label, features, labels)
    assert trained.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in trained.items())


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("caml:num_steps=1,n_way=13", "12 classes of data.tune have 10 images, and its episodes have 13 ways"),
        ("caml:num_steps=1,max_way=5,n_way=5", "episodes of 6 ways, but its max_way is 5; raise it"),
    ],
)
def test_caml_and_too_many_ways(label: str, message: str) -> None:
    features, labels = caml_data()
    with pytest.raises(EpisodeError, match=message):
        head_of(label, fitted(label, features, labels))(torch.randn(1, 6, 1, 16), torch.randn(1, 2, 16))


def test_easyfsl_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from lr_ray.fewshot.methods import easyfsl as heads

    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    known_methods.cache_clear()
    try:
        importlib.reload(heads)
        with pytest.raises(ConfigError, match=r"bd-cspn is a head of easyfsl; pip install 'lr-ray\[heads\]', or leave it out"):
            find_method("bd-cspn")
        assert "bd-cspn" not in expand(["all"])
    finally:
        monkeypatch.undo()
        importlib.reload(heads)
        known_methods.cache_clear()


@pytest.mark.parametrize("name", ["bd-cspn", "tim", "pt-map"])
def test_heads_of_easyfsl_are_its_own(name: str) -> None:
    classes: dict[str, Any] = {"bd-cspn": easyfsl.methods.BDCSPN, "tim": easyfsl.methods.TIM}
    support, queries, _ = episodes(0.8)
    found = head_of(name)(support, queries)
    build = classes.get(name, lambda: easyfsl.methods.PTMAP(feature_normalization=2.0))
    for index in range(len(support)):
        classifier = build()
        classifier.process_support_set(support[index].flatten(0, 1).clone(), torch.arange(4).repeat_interleave(2))
        torch.testing.assert_close(found[index], classifier(queries[index].clone()).detach())


def test_trained_parameters_are_counted() -> None:
    probe = known_methods()["linear-probe"]
    assert isinstance(probe, FeatureMethod)
    assert probe.num_trained(probe.settings(), 5, 384) == 5 * 385
