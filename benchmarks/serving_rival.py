"""The rival in the same replica, behind the same ingress: texts, encoder, aligner and batching are the same; the search
is FAISS IVF. Texts that begin with a mark go there."""

from __future__ import annotations

from pathlib import Path

import faiss

from ace_core.query import Hit, SearchRequest
from ace_core.retriever import Retriever
from benchmarks.serving_store import vectors
from serve.replica import Searcher

MARK = "ivf: "
_IVF_NAME = "rival.faiss"
_PROBES = 8


class EitherRetriever(Retriever):
    """Answers marked texts by IVF over 8-bit vectors, others as ever."""

    def search_batch(self, requests: list[SearchRequest]) -> list[list[Hit]]:  # type: ignore[override]
        if not (requests[0].text or "").startswith(MARK):
            return super().search_batch(requests)
        if not hasattr(self, "_ivf"):
            self._ivf = faiss.read_index(str(self.snapshot.store / _IVF_NAME))
            faiss.ParameterSpace().set_index_parameter(self._ivf, "nprobe", _PROBES)
            faiss.omp_set_num_threads(1)
        vector = self.queries.of_texts([(r.text or "").removeprefix(MARK) for r in requests]).vector.numpy()
        k = max(r.k or self.settings.k for r in requests)
        scores, rows = self._ivf.search(vector, k)
        segment = self.snapshot.segments[0]
        answers = []
        for request, row_scores, row_ids in zip(requests, scores, rows):
            wanted = request.k or self.settings.k
            found = [(float(s), int(r)) for s, r in zip(row_scores, row_ids) if r >= 0][:wanted]
            items = segment.items_at([row for _, row in found])
            answers.append(
                [
                    Hit(
                        item_id=item.item_id, score=score, modality=item.modality, uri=item.uri, mime=item.mime,
                        captions=item.captions, attributes=item.attributes, identifier=item.identifier,
                        log_prob=0.0, similarity=score, level_probs=(1.0,) * len(item.identifier),
                    )
                    for item, (score, _) in zip(items, found)
                ]
            )  # fmt: skip
        return answers


class EitherSearcher(Searcher):
    """A replica whose engine searches with :class:`EitherRetriever`."""

    def __init__(self, *args) -> None:
        from serve import engine

        engine.Retriever = EitherRetriever  # type: ignore[misc]
        super().__init__(*args)


def build_ivf(store: Path, items: int) -> None:
    """Write the rival's index beside the store's parts, unless it is there."""
    if (store / _IVF_NAME).exists():
        return
    dim = Retriever.open(store, verify=False).queries.of_texts(["a"]).vector.shape[1]
    lists = 4096 if items >= 500_000 else min(256, items // 40)
    index = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    blocks = vectors(items, dim)
    first = next(blocks)
    index.train(first)
    index.add(first)
    for block in blocks:
        index.add(block)
    faiss.write_index(index, str(store / _IVF_NAME))
