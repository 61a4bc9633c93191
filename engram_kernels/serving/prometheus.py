"""What ``metrics()`` of tables, caches and prefetchers counts, for Prometheus, by its own library. docs/metrics.md."""

from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from engram_kernels.cache.ngram import NgramCache
from engram_kernels.geometry.kinds import AnyOf, Instance, Keyed, Text, takes
from engram_kernels.ops.row_kernels.arguments import TableOverRanks
from engram_kernels.tables.engram import EngramTable

from .prefetch import Prefetcher

if TYPE_CHECKING:
    from prometheus_client.registry import Collector
else:
    Collector = object  # a registry asks for no class, but its types do

Measured = EngramTable | TableOverRanks | NgramCache | Prefetcher[Any]
#: Of each class its prefix, what only rises and what does not, by the keys of ``metrics()``: texts for HELP.
METRICS: dict[type, tuple[str, dict[str, str], dict[str, str]]] = {
    EngramTable: (
        "engram_table",
        dict(
            rows_asked="Rows that lookups asked for, past a cache",
            link_bytes="Bytes of rows asked for over PCIe or NVLink, or copied for placement staged",
            staged_calls="Gathers of placement staged",
            staged_rows="Rows of gathers of placement staged",
            staged_bytes="Bytes copied by gathers of placement staged",
            staged_waits="Waits of gathers for the copy of a pinned buffer",
            file_rows="Rows asked of a file that is read with bounded memory",
            file_distinct="Distinct rows of each gather from such a file",
            file_hits="Distinct rows that were found in memory",
            file_pages="Pages of 4096 bytes read from such a file",
            file_prefetched="Rows read from such a file ahead of their lookup",
        ),
        dict(rows="Rows of the table", nbytes="Bytes of rows and scales"),
    ),
    TableOverRanks: (
        "engram_ranks",
        dict(
            lookups="Lookups of exact size in a table over ranks",
            distinct="Distinct rows of other ranks that lookups asked for",
            hits="Distinct rows that were found in the cache",
            received="Rows received from other ranks",
            given="Rows given to other ranks",
        ),
        dict(entries="Rows of other ranks that there is room for", nbytes="Bytes of the cache of such rows"),
    ),
    NgramCache: (
        "engram_cache",
        dict(
            asked="N-grams asked for",
            hits="N-grams found",
            read="Distinct missed n-grams of a call, read from the tables",
            inserted="N-grams kept",
            evicted="N-grams that made room",
            read_bytes="Bytes read from the tables",
            saved_bytes="Bytes not read from the tables",
            bypassed_calls="Calls past the cache",
            bypassed_tokens="Tokens of calls past the cache",
        ),
        dict(used="N-grams held", entries="N-grams that there is room for", nbytes="Bytes of the cache"),
    ),
    Prefetcher: (
        "engram_prefetcher",
        dict(
            starts="Starts",
            tokens="Tokens of starts",
            cached_tokens="Tokens of starts that went through the cache",
            waits="Waits of streams for rows or projections of a layer",
            releases="Releases of starts",
        ),
        dict(in_flight="Starts in flight", nbytes="Bytes of buffers"),
    ),
}
_MEASURED = Instance(*METRICS)
SOURCES = Keyed(Text(), AnyOf(_MEASURED, Keyed(Instance(Hashable), _MEASURED)))
SOURCES.expected = "a dict of names and tables, caches, prefetchers, or dicts of these by layer"


class MetricsCollector(Collector):
    """A collector for ``prometheus_client``, as in ``REGISTRY.register(MetricsCollector({"cache": cache}))``.

    sources: by name an :class:`EngramTable`, :class:`ShardedTable`, :class:`NgramCache` or :class:`Prefetcher`, or a
    dict of such by layer.
    Samples have labels ``name`` and ``layer``, which is empty where none was given. They are counted when they are
    asked for: caches wait for the GPU then (:meth:`NgramCache.metrics`). It keeps the sources alive.

    ImportError without the library, which the extra ``metrics`` installs.
    """

    @takes(sources=SOURCES)
    def __init__(self, sources: Mapping[str, Measured | Mapping[Any, Measured]]):
        try:
            from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
        except ImportError as error:
            raise ImportError(
                "MetricsCollector: expected the library prometheus_client, and it is missing: "
                "pip install 'engram_kernels[metrics]'"
            ) from error
        self._families = CounterMetricFamily, GaugeMetricFamily
        self._sources = [
            (name, "" if layer is None else str(layer), each)
            for name, source in sources.items()
            for layer, each in (source.items() if isinstance(source, Mapping) else [(None, source)])
        ]

    def collect(self) -> Iterator:
        """Families of all samples, as a registry asks for them."""
        return self._collected(counted=True)

    def describe(self) -> Iterator:
        """The same without samples, which a registry compares with those of others."""
        return self._collected(counted=False)

    def _collected(self, counted: bool) -> Iterator:
        for kind, (prefix, *texts) in METRICS.items():
            sources = [source for source in self._sources if isinstance(source[2], kind)]
            found = [(labels, each.metrics()) for *labels, each in sources] if counted else []
            for family_of, descriptions in zip(self._families, texts, strict=True):
                for key, text in descriptions.items() if sources else ():
                    family = family_of(f"{prefix}_{key}".replace("nbytes", "bytes"), text, labels=["name", "layer"])
                    for labels, values in found:
                        family.add_metric(labels, values[key])
                    yield family
