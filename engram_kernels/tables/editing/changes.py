"""Which rows of a table changed since when: the version of each row's last change, 4 bytes a row.

As many as RowAdagrad keeps of a row, and 0.8 % of a bfloat16 row of 256. A bit or a byte a row would do for one reader
that clears it, and loses what changed where a push is interrupted or a file never arrives; versions serve any number of
copies, each from where it is, and nothing is cleared. Lists of ids by step would take 8 B for each id of a batch, of
V4.1 4 B a row after a thousand steps of 8,192 tokens, and a sort to read them.
"""

import secrets

import torch


class ChangeRecord:
    """Versions count from the table's own when the record began; every change that came is noted, or found missing."""

    def __init__(self, rows: int, version: int, device: torch.device):
        #: What tells this record from others, of later runs for instance, whose versions are other counts.
        self.origin = secrets.token_hex(8)
        self._began = self._seen = self._unknown = version
        #: One more than there are rows, for ids that are none.
        self._versions = torch.zeros(rows + 1, dtype=torch.int32, device=device)

    def note(self, ids: torch.Tensor | None, before: int, after: int) -> None:
        """Rows ``ids [...]`` changed, None is any, and the version rose from ``before`` to ``after``."""
        if ids is None or before != self._seen:
            self._unknown = after
        self._seen = after
        if ids is not None:
            rows = len(self._versions) - 1
            ids = ids.reshape(-1).to(self._versions.device, torch.int64)
            ids = torch.where((ids >= 0) & (ids < rows), ids, rows)
            self._versions.index_fill_(0, ids, after - self._began)

    def since(self, version: int, now: int) -> torch.Tensor | None:
        """Rows that changed after ``version``, ascending; None where it may be any. now: the table's version."""
        if now != self._seen:
            self._seen = self._unknown = now
        if version < self._unknown:
            return None
        return (self._versions[:-1] > version - self._began).nonzero()[:, 0]
