"""When a cache pays: calls that are too short go past it."""

#: Bytes over PCIe from which a call is worth a cache's launches.
_PAYS_FROM = 6 << 20


def fewest_tokens(token_bytes: int) -> int:
    """The fewest tokens of a call, of ``token_bytes`` in all layers, that a cache makes shorter rather than longer.

    Arithmetic, not measured: three launches more than read order "direct" has take about 15 us, the sort of some 10,000
    keys 40. PCIe at 52 GB/s brings 3 MB in that time. Of prose a cache has every other row, as the simulator says
    (docs/cache_size.md), so that it spares a call of 6 MB these 3. For V4.1 on two layers that is 497 tokens.
    """
    return max(1, -(-_PAYS_FROM // token_bytes))
