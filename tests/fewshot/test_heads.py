"""Heads on features, each against its definition or against the library that has it too."""

import importlib
from collections.abc import Callable

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
from lr_ray.fewshot.metric import MetricConfig, fit_metric

HEADS = ["nn", "nn-cosine", "bpa", "linear-probe", "simple-shot", "bd-cspn", "laplacian-shot", "pt-map", "tim"]


def head_of(label: str, trained: dict[str, Tensor] | None = None) -> Head:
    chosen = find_method(label)
    assert isinstance(chosen.method, FeatureMethod)
    return chosen.method.head(chosen.settings, trained or {})


def episodes(noise: float, *, n_shot: int = 2, dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of 6 episodes: (6, 4·K, D) support and its (4·K,) ways, (6, 20, D) queries and their (20,) ways."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 4, 1, dim, generator=generator)
    support = centres + noise * torch.randn(6, 4, n_shot, dim, generator=generator)
    queries = centres + noise * torch.randn(6, 4, 5, dim, generator=generator)
    ways = torch.arange(4)
    return support.flatten(1, 2), ways.repeat_interleave(n_shot), queries.flatten(1, 2), ways.repeat_interleave(5)


@pytest.mark.parametrize("label", HEADS)
def test_separable_classes_are_told_apart_in_inference_mode(label: str) -> None:
    support, labels, queries, ways = episodes(0.05)
    with torch.inference_mode():
        scores = head_of(label)(support, labels, queries)
    assert scores.shape == (6, 20, 4)
    assert torch.equal(scores.argmax(dim=-1), ways.expand(6, -1))


@pytest.mark.parametrize("label", [name for name in HEADS if name not in ("bpa", "bd-cspn", "laplacian-shot", "pt-map", "tim")])
def test_inductive_heads_look_at_each_query_alone(label: str) -> None:
    support, labels, queries, _ = episodes(1.0)
    together = head_of(label)(support, labels, queries)
    alone = torch.cat([head_of(label)(support, labels, queries[:, i : i + 1]) for i in range(20)], dim=1)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


def test_transductive_heads_do_not() -> None:
    support, labels, queries, _ = episodes(1.0)
    together, apart = head_of("bpa")(support, labels, queries), head_of("bpa")(support, labels, queries[:, :5])
    assert not torch.allclose(together[:, :5], apart, atol=1e-3)


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


@pytest.mark.parametrize("dropped", [None, 4], ids=["as many shots of each way", "one fewer of the second"])
@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
def test_the_linear_probe_is_scikit_learns_logistic_regression(c: float, dropped: int | None) -> None:
    support, labels, queries, _ = episodes(1.0, n_shot=3)
    kept = [position for position in range(len(labels)) if position != dropped]
    support, labels = support[:, kept], labels[kept]
    weights, bias = logistic_regression(F.normalize(support, dim=-1), labels, c)
    scores = head_of(f"linear-probe:c={c}")(support, labels, queries)
    for index in range(len(support)):
        expected = LogisticRegression(C=c, tol=1e-8, max_iter=5000)
        inputs = F.normalize(support[index].double(), dim=1).numpy()
        expected.fit(inputs, labels.numpy())
        np.testing.assert_allclose(weights[index], expected.coef_, atol=2e-4)
        np.testing.assert_allclose(
            bias[index] - bias[index].mean(), expected.intercept_ - expected.intercept_.mean(), atol=2e-4
        )
        found = expected.predict_log_proba(F.normalize(queries[index].double(), dim=1).numpy())
        np.testing.assert_allclose(scores[index].log_softmax(dim=1), found, atol=1e-3)


def test_the_linear_probe_of_a_large_support_set_is_near_its_optimum() -> None:
    """Of 500 images the minimum is flat: the weights are not told to four digits, the answers are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30).repeat_interleave(17)[:500]
    centres = torch.randn(30, 64, generator=generator)
    support, queries = (
        F.normalize(centres[of] + 2 * torch.randn(len(of), 64, generator=generator), dim=1) for of in (labels, labels[::5])
    )
    expected = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(support.double().numpy(), labels.numpy())
    weights, bias = logistic_regression(support[None], labels, 1.0)
    np.testing.assert_allclose(weights[0], expected.coef_, atol=5e-3)
    np.testing.assert_allclose(bias[0] - bias[0].mean(), expected.intercept_ - expected.intercept_.mean(), atol=2e-2)
    scores = head_of("linear-probe")(support[None], labels, queries[None])[0]
    assert scores.argmax(dim=1).tolist() == expected.predict(queries.double().numpy()).tolist()


def test_balanced_affinities_are_a_balanced_plan() -> None:
    """Before it is scaled, what each gives and takes is one unit; itself it gives nothing."""
    support, _, queries, _ = episodes(0.5)
    features = torch.cat([support, queries], dim=1)
    found = balanced_affinities(features, regularisation=0.5, num_iterations=200)
    count = features.shape[1]
    assert torch.equal(found.diagonal(dim1=1, dim2=2), torch.ones(6, count))
    plan = found - torch.eye(count)
    rows, columns = plan.sum(dim=2), plan.sum(dim=1)
    torch.testing.assert_close(rows, rows[:, :1].expand(-1, count), rtol=1e-3, atol=0)
    torch.testing.assert_close(columns, rows, rtol=1e-3, atol=0)
    assert torch.equal(plan.amax(dim=(1, 2)), torch.ones(6))


def test_bpa_gains_by_looking_at_the_queries_together() -> None:
    support, labels, queries, ways = episodes(1.5, n_shot=1, dim=32)
    plain, transformed = (
        (head_of(name)(support, labels, queries).argmax(dim=-1) == ways).float().mean() for name in ("nn", "bpa")
    )
    assert transformed > plain + 0.03


# --------------------------------------------------------------------------------------- ways and shots that differ


def uneven(noise: float, shots: tuple[int, ...] = (1, 6, 2, 3)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `episodes`, but of 2 episodes and of so many shots of each way."""
    support, labels, queries, ways = episodes(noise, n_shot=max(shots))
    kept = torch.cat([way * max(shots) + torch.arange(count) for way, count in enumerate(shots)])
    return support[:2, kept], labels[kept], queries[:2], ways


@pytest.mark.parametrize("label", [name.replace("linear-probe", "linear-probe:c=100") for name in HEADS])
def test_uneven_ways_are_told_apart(label: str) -> None:
    support, labels, queries, ways = uneven(0.05)
    with torch.inference_mode():
        scores = head_of(label)(support, labels, queries)
    assert torch.equal(scores.argmax(dim=-1), ways.expand(2, -1))


@pytest.mark.parametrize("label", HEADS)
def test_episodes_of_a_call_do_not_see_each_other(label: str) -> None:
    support, labels, queries, _ = uneven(1.0)
    together = head_of(label)(support, labels, queries)
    alone = torch.cat([head_of(label)(support[i : i + 1], labels, queries[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("label", ["nn", "nn-cosine"])
def test_centres_of_uneven_ways_are_their_means(label: str) -> None:
    support, labels, queries, _ = uneven(1.0)
    scores = head_of(label)(support, labels, queries)
    for index in range(len(support)):
        centres = np.stack([support[index, labels == way].double().numpy().mean(axis=0) for way in range(4)])
        vectors = queries[index].double().numpy()
        if label == "nn":
            expected = -np.linalg.norm(vectors[:, None] - centres, axis=-1)
        else:
            norms = np.linalg.norm(vectors, axis=1)[:, None] * np.linalg.norm(centres, axis=1)
            expected = vectors @ centres.T / norms
        np.testing.assert_allclose(scores[index], expected, atol=1e-4)


def test_bpa_of_uneven_ways_is_the_nearest_centre_of_what_it_makes() -> None:
    support, labels, queries, _ = uneven(1.0)
    scores = head_of("bpa")(support, labels, queries)
    for index in range(len(support)):
        together = torch.cat([support[index], queries[index]])[None]
        (made,) = balanced_affinities(together, regularisation=0.1, num_iterations=10)
        centres = torch.stack([made[: len(labels)][labels == way].mean(dim=0) for way in range(4)])
        expected = [[-float(torch.dist(query, centre)) for centre in centres] for query in made[len(labels) :]]
        torch.testing.assert_close(scores[index], torch.tensor(expected), atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- CAML

SMALL = "caml:width=32,num_layers=1,num_steps=600,learning_rate=0.003"


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
    return chosen.method.fit(chosen.settings, features, labels, 0, MetricConfig(power=0.75, shrinkage=0.2))


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


def test_caml_reads_uneven_ways_in_any_order_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(SMALL, fitted("caml:width=32,num_layers=1,num_steps=30", *caml_data()))
    support, labels, queries, _ = uneven(1.0)
    with torch.inference_mode():
        found = head(support, labels, queries)
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        other = head(support[:, shuffled], labels[shuffled], queries)
        monkeypatch.setattr("lr_ray.fewshot.methods.caml._TOKENS_AT_ONCE", 30)
        in_parts = head(support, labels, queries)
    assert found.shape == (2, 20, 4)
    torch.testing.assert_close(other, found, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(in_parts, found, atol=1e-4, rtol=1e-4)


def test_caml_knows_every_way_that_it_takes() -> None:
    features, labels = caml_data(24)
    trained = fitted(f"{SMALL},n_way=8", features[:192], labels[:192])
    shape = EpisodeShape(n_way=8, n_shot=3, n_query=5)
    drawn = draw_test_episodes(labels[192:].numpy() - 16, shape, num_episodes=40, seed=0)
    with torch.inference_mode():
        found = predict(features[192:], drawn, shape, head_of(f"{SMALL},n_way=8", trained))
    by_way = (found == np.arange(8)[:, None]).mean(axis=(0, 2))
    assert by_way[3:].min() > 0.2, "an eighth would be chance"


def test_caml_is_the_same_twice() -> None:
    label = "caml:width=32,num_layers=1,num_steps=3"
    features, labels = caml_data()
    trained, again = fitted(label, features, labels), fitted(label, features, labels)
    assert trained.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in trained.items())


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("caml:num_steps=1,n_way=13", "12 classes of data.tune have 10 images, and its episodes have 13 ways"),
        ("caml:num_steps=1", "episodes of 6 ways, but it is trained for 5; raise its n_way"),
    ],
)
def test_caml_and_too_many_ways(label: str, message: str) -> None:
    features, labels = caml_data()
    with pytest.raises(EpisodeError, match=message):
        head_of(label, fitted(label, features, labels))(torch.randn(1, 6, 16), torch.arange(6), torch.randn(1, 2, 16))


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


def test_simple_shot_is_the_nearest_centre_of_centred_directions() -> None:
    generator = torch.Generator().manual_seed(3)
    real = 4 + torch.randn(50, 16, generator=generator)
    support, labels, queries, _ = uneven(1.0)
    support, queries = support + 4, queries + 4
    scores = head_of("simple-shot", fitted("simple-shot", real, torch.zeros(50)))(support, labels, queries)
    mean = real.double().mean(dim=0)
    for index in range(len(support)):
        directions = F.normalize(support[index].double() - mean, dim=-1)
        centres = torch.stack([directions[labels == way].mean(dim=0) for way in range(4)])
        expected = F.cosine_similarity((queries[index].double() - mean)[:, None], centres, dim=-1)
        torch.testing.assert_close(scores[index].double(), expected, atol=1e-5, rtol=1e-4)


AUTHORS = {
    "bd-cspn": lambda: easyfsl.methods.BDCSPN(feature_normalization=2.0),
    "laplacian-shot": lambda: easyfsl.methods.LaplacianShot(feature_normalization=2.0),
    "tim": lambda: easyfsl.methods.TIM(
        feature_normalization=2.0, fine_tuning_steps=100, fine_tuning_lr=1e-3, cross_entropy_weight=0.1, temperature=15.0
    ),
}


@pytest.mark.parametrize("draw", [episodes, uneven])
@pytest.mark.parametrize("name", AUTHORS)
def test_heads_of_easyfsl_are_its_own_on_directions(name: str, draw: Callable[[float], tuple[Tensor, ...]]) -> None:
    support, labels, queries, _ = draw(0.8)
    found = head_of(name)(support, labels, queries)
    for index in range(len(support)):
        classifier = AUTHORS[name]()
        classifier.process_support_set(support[index].clone(), labels)
        torch.testing.assert_close(found[index], classifier(queries[index].clone()).detach())


def test_pt_map_takes_roots_of_either_sign_and_not_easyfsls() -> None:
    """Features of which none is positive, of which easyfsl's transform leaves nothing."""
    support, labels, queries, ways = episodes(0.05)
    found = head_of("pt-map")(-support.abs(), labels, -queries.abs())
    assert torch.equal(found.argmax(dim=-1), ways.expand(6, -1))
    torch.testing.assert_close(found.sum(dim=1), torch.full((6, 4), 5.0), atol=1e-3, rtol=1e-3)  # as many queries to each way


@pytest.mark.parametrize("name", ["tim", "laplacian-shot", "pt-map", "bd-cspn"])
def test_transductive_heads_of_easyfsl_take_features_at_any_scale(name: str) -> None:
    """Raw features of a ViT are 40 long, beside which their neighbours, or a step of Adam, would not count."""
    support, labels, queries, _ = episodes(0.8)
    found, scaled = head_of(name)(support, labels, queries), head_of(name)(40 * support, labels, 40 * queries)
    torch.testing.assert_close(found, scaled, atol=1e-3, rtol=1e-3)


def test_trained_parameters_are_counted() -> None:
    probe = known_methods()["linear-probe"]
    assert isinstance(probe, FeatureMethod)
    assert probe.num_trained(probe.settings(), 5, 384) == 5 * 385


@pytest.mark.parametrize(
    ("label", "config"),
    [
        ("nn-metric", MetricConfig(power=0.75, shrinkage=0.2)),
        ("nn-metric:power=0", MetricConfig(power=0, shrinkage=0.2)),
        ("nn-metric:power=1,shrinkage=0.5", MetricConfig(power=1, shrinkage=0.5)),
    ],
)
def test_a_metric_is_the_configs_but_for_what_the_label_says(label: str, config: MetricConfig):
    features, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8).repeat(5)
    torch.testing.assert_close(fitted(label, features, labels), fit_metric(features, labels, config).tensors())
