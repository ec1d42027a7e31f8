"""The keys of a router: their pairwise similarity, and a t-SNE map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slm_fast.dtkr import DtkrRouter
from slm_fast.random_features import RandomFeatureRouter
from slm_fast.report.figures import Figure, Grid, Note, Points
from slm_fast.router import GaussianRouter, Part, Router
from slm_fast.tasks import LearnedTask

FEWEST, MOST_POINTS, MOST_KEYS = 4, 1000, 60
FEW = "Too few keys for a map: t-SNE needs at least four."


@dataclass(frozen=True)
class Keys:
    """tasks, names: the task of each key, and the key's name within it. gram: [M, M] float64, inner products in the
    router's metric."""

    tasks: Sequence[str]
    names: Sequence[str]
    gram: Tensor

    @property
    def similarity(self) -> Tensor:
        """Cosine similarities [M, M], with ones on the diagonal."""
        norm = self.gram.diagonal().clamp(min=1e-30).sqrt()
        return (self.gram / (norm[:, None] * norm)).clamp(-1, 1).fill_diagonal_(1.0)

    @property
    def by_task(self) -> tuple[list[str], Tensor]:
        """The tasks, and the mean cosine similarity [T, T] between their keys."""
        names = list(dict.fromkeys(self.tasks))
        own = torch.tensor([[float(task == name) for task in self.tasks] for name in names], dtype=torch.float64)
        own = own / own.sum(1, keepdim=True)
        return names, own @ self.similarity @ own.T


def router_of(tasks: Sequence[LearnedTask], config: Mapping[str, Any]) -> Router:
    """A router over a store's tasks, for its keys only: needs no backbone. config: the store's."""
    parts: dict[str, Part] = {task.name: task.router for task in tasks}
    first = next(iter(parts.values()), {})
    router: Router
    if "keys" in first:
        router = DtkrRouter(groups=config.get("groups", 6))
    else:
        router = RandomFeatureRouter() if "factor" in first else GaussianRouter()
    router.load(parts, torch.device("cpu"))
    return router


@torch.no_grad()
def keys_of(router: Router, tasks: Sequence[LearnedTask]) -> Keys:
    """All keys of a router over these tasks.

    Learned keys are compared as `dtkr` compares them with queries, by the mean cosine over groups. Label means are
    compared relative to their centre in the shared covariance (m_i' S^-1 m_j), as `gaussian` sees them.
    """
    labels = {task.name: task.labels or () for task in tasks}
    owner: list[str] = []
    names: list[str] = []
    for task, part in zip(router.names, router.parts, strict=True):
        own = _names(part, labels[task])
        owner += [task] * len(own)
        names += own
    if not owner:
        return Keys((), (), torch.zeros(0, 0, dtype=torch.float64))
    if isinstance(router, DtkrRouter):
        keys = torch.cat([part["keys"] for part in router.parts]).double()
        grouped = keys.view(len(keys), router.groups, -1)
        unit = torch.nn.functional.normalize(grouped, dim=-1).flatten(1) / router.groups**0.5
        return Keys(owner, names, unit @ unit.T)
    assert isinstance(router, GaussianRouter)
    means = torch.cat([router.means(part) for part in router.parts]).cpu()
    gram = (means - router.centre.double().cpu()) @ router.keys.double().cpu().T
    return Keys(owner, names, (gram + gram.T) / 2)


def _names(part: Part, labels: Sequence[str]) -> list[str]:
    """The name of each key of a task: a label, a slot, or a label within a slot."""
    if "keys" in part:
        return [f"slot {i}" for i in range(1, len(part["keys"]) + 1)]
    slot = [int(i) + 1 for i in GaussianRouter.mean_slot(part)]
    numbers = [int(i) for i in part["mean_label"]] if "mean_label" in part else [-1] * len(slot)
    named: list[str] = []
    for place, (i, number) in enumerate(zip(slot, numbers, strict=True)):
        if 0 <= number < len(labels):
            named.append(f"{labels[number]}, slot {i}" if max(slot) > 1 else labels[number])
        else:  # files that do not record the label of a mean
            named.append(f"slot {i}, mean {slot[: place + 1].count(i)}" if slot.count(i) > 1 else f"slot {i}")
    return named


def figures(keys: Keys, stem: str = "") -> list[Figure | Note]:
    """The similarity of keys (of tasks, if there are many keys) and their map. stem: prefix of the file names."""
    if not len(keys.tasks):
        return [Note("No tasks learned, so there are no keys.")]
    if len(keys.tasks) <= MOST_KEYS:
        rows = [f"{task}: {name}" for task, name in zip(keys.tasks, keys.names, strict=True)]
        values, groups, note = keys.similarity, list(keys.tasks), ""
    else:
        rows, values = keys.by_task
        groups, note = [], f"Mean over pairs of the {len(keys.tasks):,} keys."
    cells: list[list[float | None]] = [[round(value, 6) for value in row] for row in values.tolist()]
    what = "Task" if note else "Key"
    title = f"{what} similarity"
    note = f"{note} Cosine similarity in the router's metric: 1 identical, 0 unrelated, negative opposed.".strip()
    alike = Grid(f"{stem}similarity", title, rows, rows, cells, kind="similarity", groups=groups, note=note)
    return [_map(keys, stem), alike]


def _map(keys: Keys, stem: str) -> Figure | Note:
    title = "t-SNE map of the keys"
    if len(keys.tasks) < FEWEST:
        return Note(FEW, title)
    chosen = list(range(len(keys.tasks)))
    note = "Nearby keys are similar; long distances and the axes have no meaning."
    if len(chosen) > MOST_POINTS:
        chosen = torch.linspace(0, len(chosen) - 1, MOST_POINTS).round().long().tolist()
        note += f" Shows {MOST_POINTS:,} of {len(keys.tasks):,} keys, evenly sampled."
    at = embed(keys.gram[chosen][:, chosen])
    points = [(keys.tasks[i], keys.names[i], round(x, 3), round(y, 3)) for i, (x, y) in zip(chosen, at, strict=True)]
    return Points(f"{stem}tsne", title, points, note=note)


def embed(gram: Tensor) -> list[tuple[float, float]]:
    """t-SNE (van der Maaten & Hinton 2008) of points with inner products `gram` [M, M], M >= 4; deterministic."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    values, vectors = torch.linalg.eigh(gram)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    where = (vectors * values.clamp(min=0).sqrt()).flip(1).numpy()
    perplexity = min(30.0, (len(gram) - 1) / 3)
    method = "exact" if len(gram) <= 300 else "barnes_hut"
    tsne = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=0, method=method)
    size = gram.diagonal()
    apart = size[:, None] + size - 2 * gram
    if apart.max() <= 1e-9 * size.max():  # all keys are one point
        return [(0.0, 0.0)] * len(gram)
    with threadpool_limits(1):  # for a fixed summation order
        found = tsne.fit_transform(where)
    return [(float(x), float(y)) for x, y in found]
