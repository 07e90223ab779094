"""`caml`: a sequence model that reads a query among the labelled support features and names its label in one pass."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lr_ray.errors import EpisodeError
from lr_ray.fewshot.methods import FeatureMethod, Head
from lr_ray.fewshot.methods.features import BACKBONE, FeaturesName
from lr_ray.fewshot.metric import MetricConfig
from lr_ray.section import Section

_TOKENS_AT_ONCE = 20_000
"""Of the sequences, one a query, that the encoder reads together: with 500 support images 300 MB."""
_QUERIES = 5
_SHOTS = (1, 5)


class CAMLSettings(Section):
    """Of `caml`. The paper trains a ViT-L sized encoder on images of several sources at 1e-5, on features as they are; this one
    fits what is given here."""

    features: FeaturesName = BACKBONE
    """What they are of; each of unit length."""
    width: int = Field(default=256, gt=0, multiple_of=4)
    """Of the encoder, with 4 heads."""
    num_layers: int = Field(default=4, gt=0)
    """Of the encoder."""
    n_way: int = Field(default=5, gt=1)
    """Of the training episodes, whose shots are drawn from 1 to 5; as many label encodings are fixed, and learnt, so that
    no episode may have more ways."""
    num_steps: int = Field(default=1000, gt=0)
    """Training episodes, one a step."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Of Adam, after a tenth of the steps; decays along a cosine."""


class SequenceModel(nn.Module):
    """Features beside label encodings, a non-causal encoder, and the label that the query's token ends nearest to.

    The encodings are an equal length, maximally equiangular set (ELMES), the same for every episode.
    """

    def __init__(self, dim: int, settings: CAMLSettings) -> None:
        super().__init__()
        ways = settings.n_way
        elmes = (torch.eye(ways) - 1 / ways) * (ways / (ways - 1)) ** 0.5
        self.register_buffer("elmes", elmes, persistent=False)
        self.elmes: Tensor
        self.unknown = nn.Parameter(torch.zeros(ways))
        self.project = nn.Linear(dim + ways, settings.width)
        layer = nn.TransformerEncoderLayer(
            settings.width, 4, 4 * settings.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, settings.num_layers, enable_nested_tensor=False)
        self.read = nn.Linear(settings.width, ways)

    def forward(self, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """(S, D) and (M, D), of unit length, and the (S,) ways of the former → (M, N)."""
        context = torch.cat([support, self.elmes[labels]], dim=1).expand(len(queries), -1, -1)
        asked = torch.cat([queries, self.unknown.expand(len(queries), -1)], dim=1)[:, None]
        tokens = self.encoder(self.project(torch.cat([asked, context], dim=1)))
        scores: Tensor = self.read(tokens[:, 0]) @ self.elmes[: int(labels.max()) + 1].T
        return scores


def _fit(settings: CAMLSettings, features: Tensor, labels: Tensor, seed: int, _metric: MetricConfig) -> dict[str, Tensor]:
    """Cross-entropy on episodes of the given classes."""
    rng = np.random.default_rng(seed)
    members = [torch.nonzero(labels == c)[:, 0] for c in labels.unique()]
    members = [found for found in members if len(found) >= _SHOTS[1] + _QUERIES]
    if len(members) < settings.n_way:
        raise EpisodeError(
            f"caml: {len(members)} classes of data.tune have {_SHOTS[1] + _QUERIES} images, and its episodes have "
            f"{settings.n_way} ways; lower its n_way or give more"
        )
    directions = F.normalize(features, dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SequenceModel(features.shape[1], settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    warm_up = max(1, settings.num_steps // 10)
    wanted = torch.arange(settings.n_way).repeat_interleave(_QUERIES)
    for step in range(settings.num_steps):
        rate = min((step + 1) / warm_up, 0.5 * (1 + np.cos(np.pi * step / settings.num_steps)))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
        n_shot = int(rng.integers(_SHOTS[0], _SHOTS[1] + 1))
        chosen = [members[c] for c in rng.choice(len(members), settings.n_way, replace=False)]
        picks = torch.stack([found[torch.from_numpy(rng.permutation(len(found))[: n_shot + _QUERIES])] for found in chosen])
        ways = torch.arange(settings.n_way).repeat_interleave(n_shot)
        scores = model(directions[picks[:, :n_shot].flatten()], ways, directions[picks[:, n_shot:].flatten()])
        loss = F.cross_entropy(scores, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def _head(settings: CAMLSettings, trained: Mapping[str, Tensor]) -> Head:
    model = SequenceModel(trained["project.weight"].shape[1] - settings.n_way, settings)
    model.load_state_dict(dict(trained))
    model.eval()

    def score(support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        n_way, at_once = int(labels.max()) + 1, max(1, _TOKENS_AT_ONCE // (len(labels) + 1))
        if n_way > settings.n_way:
            raise EpisodeError(f"caml: episodes of {n_way} ways, but it is trained for {settings.n_way}; raise its n_way")
        scores = []
        for of_support, of_queries in zip(F.normalize(support, dim=-1), F.normalize(queries, dim=-1), strict=True):
            scores.append(torch.cat([model(of_support, labels, part) for part in of_queries.split(at_once)]))
        return torch.stack(scores)

    return score


METHOD = FeatureMethod(
    name="caml",
    source="Fifty et al., Context-Aware Meta-Learning, ICLR 2024, arXiv 2310.10971; smaller, trained on data.tune",
    settings=CAMLSettings,
    features=lambda settings: str(settings.features),
    head=_head,
    fit=_fit,
    max_way=lambda settings: int(settings.n_way),
)
