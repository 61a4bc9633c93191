"""When a cache pays: calls that are too short go past it."""

#: Bytes over the link from which a call is worth a cache's launches.
_PAYS_FROM = 6 << 20


def fewest_tokens(token_bytes: int) -> int:
    """The fewest tokens of a call, of ``token_bytes`` in all layers, that a cache makes shorter rather than longer.

    Arithmetic, not measured: three launches more than the direct order has take about 15 us, the sort of some 10,000
    keys 40. A link of 52 GB/s brings 3 MB in that time, and where every other row is spared, as the simulator says of
    prose (docs/cache_size.md), a call of 6 MB is spared as many. For V4.1 on two layers that is 497 tokens.
    """
    return max(1, -(-_PAYS_FROM // token_bytes))
