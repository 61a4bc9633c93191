"""How a Prefetcher divides its work: launches of layers, programs of a lookup, projections on the side stream."""

_LAUNCH_BYTES = {"device": 32 << 20, "coherent": 4 << 20, "host": 512 << 10}
_COHERENT_PROGRAMS = 120  # of 4 KiB each: the 490 KB that NVLink-C2C needs in flight
#: Most tokens that are projected ahead.
AHEAD_TOKENS = 128


def layers_apart(layer_bytes: int, memory: str) -> bool:
    """Whether each layer gets a launch of its own, so that the first never waits for the last.

    A launch costs the host about 10 us, in which 545 KB come over PCIe Gen5, 4.5 MB over NVLink-C2C and 40 MB from
    device memory: with fewer bytes a layer than that, further launches would take longer than the rows they let go
    ahead. For V4.1 on the host that is 83 tokens. Arithmetic, not measured. memory: as of a table's view.
    """
    return layer_bytes >= _LAUNCH_BYTES[memory]


def projects_ahead(num_tokens: int) -> bool:
    """Whether the side stream projects rows too, rather than the stream that reads them.

    T tokens cost 2 T operations for each weight, and GPUs do 150 to 300 in the time in which they read one (bfloat16:
    A100 153, MI300X 247, B200 281, H100 295; as many in fp8, which halves both). Below that a projection's time is
    that of its weights' way from memory, which a decoder of few tokens leaves free between its kernels and in their
    tails. Above, it takes multiprocessors from matmuls that need them, and its result of (H + 1) * D elements (51 KB a
    token and layer for V4.1, where rows are 12) needs room. 128 tokens are below all of these. By the model that
    ``python -m bench step_model`` prints, V4.1's two layers gain 35 us of a step up to there, 8 at 256 tokens, and lose
    from 1,024 on. Arithmetic, not measured.
    """
    return num_tokens <= AHEAD_TOKENS


def default_programs(most: int, memory: str) -> int:
    """Programs that leave multiprocessors to the model, half of ``most``, and keep the link busy all the same."""
    return max(1, most // 2, min(most, _COHERENT_PROGRAMS) if memory == "coherent" else 0)
