"""Counts of paths with bounded memory: exact up to a limit, then heavy hitters with a stated error.

Legend: T tokens, R routers, N distinct paths.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from crossways.errors import UserError


class PathCounts:
    """How often each path was taken.

    Misra and Gries' summary (1982), in the mergeable form of Agarwal et al. (2012, "Mergeable summaries"): when more
    than twice `limit` paths are held, the (limit + 1)-th greatest count is subtracted from all and those that fall to
    zero are forgotten. A count is then never too great, and too small by at most `error`, which is at most
    total / (limit + 1). Any path taken more often than that is still held.
    """

    def __init__(self, length: int, limit: int = 100_000) -> None:
        """
        Args:
            length: R, routers on a path, at least 1.
            limit: paths to keep when memory is short; twice as many are held at most. 1,000 to 1,000,000.
        """
        if limit < 1 or length < 1:
            raise UserError(f"path counts need a length and a limit of at least 1, got {length} and {limit}")
        self.length, self.limit = length, limit
        self.total = 0
        """Tokens counted."""
        self.error = 0
        """How much too small a count may be; 0 while counts are exact."""
        self._count: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Paths held; all distinct ones while `error` is 0."""
        return len(self._count)

    def add(self, path_TR: NDArray[np.integer]) -> None:
        """Count each row, expert indices (T, R) from -1 (nobody) to 32,767."""
        if path_TR.ndim != 2 or path_TR.shape[1] != self.length:
            raise ValueError(f"expected paths of {self.length} routers, got shape {path_TR.shape}")
        path_NR, count_N = np.unique(path_TR.astype(np.int16), axis=0, return_counts=True)
        self._add(path_NR, count_N)
        self.total += len(path_TR)
        self._shrink()

    def merge(self, other: PathCounts) -> None:
        """Add another's counts; errors add up."""
        if other.length != self.length:
            raise ValueError(f"paths of {self.length} and {other.length} routers cannot be merged")
        self._add(*other._arrays())
        self.total += other.total
        self.error += other.error
        self._shrink()

    def most_common(self, n: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The n commonest paths (N, R) and their counts (N,), greatest first; all that are held by default. Ties are
        in the order of the indices."""
        path_NR, count_N = self._arrays()
        order_N = np.lexsort((*path_NR.T[::-1], -count_N))[:n]
        return path_NR[order_N].astype(np.int64), count_N[order_N]

    def state(self) -> dict[str, NDArray[np.int64]]:
        """Everything, as arrays to save."""
        path_NR, count_N = self.most_common()
        return {"path": path_NR, "count": count_N, "sums": np.array([self.limit, self.total, self.error])}

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray[np.int64]]) -> PathCounts:
        """What `state` gave."""
        limit, total, error = (int(value) for value in state["sums"])
        counts = cls(state["path"].shape[1], limit)
        counts._add(state["path"].astype(np.int16), state["count"])
        counts.total, counts.error = total, error
        return counts

    def _add(self, path_NR: NDArray[np.int16], count_N: NDArray[np.int64]) -> None:
        for path_R, count in zip(path_NR, count_N.tolist(), strict=True):
            key = path_R.tobytes()
            self._count[key] = self._count.get(key, 0) + count

    def _shrink(self) -> None:
        if len(self._count) <= 2 * self.limit:
            return
        count_N = np.fromiter(self._count.values(), dtype=np.int64, count=len(self._count))
        cut = int(np.partition(count_N, -(self.limit + 1))[-(self.limit + 1)])
        self._count = {path: count - cut for path, count in self._count.items() if count > cut}
        self.error += cut

    def _arrays(self) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        path_NR = np.frombuffer(b"".join(self._count), dtype=np.int16).reshape(-1, self.length)
        return path_NR, np.fromiter(self._count.values(), dtype=np.int64, count=len(self._count))
