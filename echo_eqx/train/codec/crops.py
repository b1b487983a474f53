"""Crops of recordings to train a codec on: the same for the same seed on any number of hosts."""

import bisect
import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from echo_eqx.errors import EchoError
from echo_eqx.prepare.clips import Clip

_AHEAD = 8
"""Batches that are decoded before they are asked for."""


class Audio(NamedTuple):
    audio: np.ndarray
    """(rows, samples) float32."""


@dataclass(frozen=True)
class Crops:
    """One batch, and the names of what it was cut from. The step is all there is of a cursor."""

    batch: Audio
    keys: list[str]
    cursor: dict[str, list[int]]
    counts: dict[str, int]
    """What was skipped up to here, by its name in `metrics.jsonl`."""


class CropStream:
    """An endless stream of batches from `step` on; a batch depends on seed, step and row alone.

    A crop begins anywhere in the recordings, a longer one being met more often, and what is shorter
    than a crop is followed by silence.

    **Raises**: `EchoError`, at `next`, if more than `max_broken` of the crops cannot be decoded.
    Another crop stands in for one that cannot.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        *,
        sample_rate: int,
        samples: int,
        rows: Sequence[int],
        seed: int,
        step: int = 0,
        max_broken: float = 0.01,
    ):
        self._clips = clips
        self._ends = list(itertools.accumulate(clip.seconds for clip in clips))
        self._sample_rate, self._samples = sample_rate, samples
        self._rows, self._seed, self._max_broken = rows, seed, max_broken
        self.broken: dict[str, int] = {}
        self._crops = 0
        self._step = step
        self._pool = ThreadPoolExecutor(4)
        self._ahead: deque[list[Future]] = deque()
        for _ in range(_AHEAD):
            self._submit()

    @property
    def first(self) -> dict[str, str]:
        """A sentence on the first recording that could not be read."""
        problem = next(iter(self.broken), None)
        return {} if problem is None else {"broken_records": f"a crop is skipped: {problem}"}

    def __next__(self) -> Crops:
        crops = [future.result() for future in self._ahead.popleft()]
        self._submit()
        self._count(crops)
        audio = np.stack([audio for audio, _, _ in crops])
        counts = {"broken_records": sum(self.broken.values())}
        return Crops(Audio(audio), [key for _, key, _ in crops], {}, counts)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        step = self._step
        self._ahead.append([self._pool.submit(self._crop, step, row) for row in self._rows])
        self._step += 1

    def _crop(self, step: int, row: int) -> tuple[np.ndarray, str, list[str]]:
        rng = np.random.default_rng((self._seed, step, row))
        problems: list[str] = []
        while len(problems) < 10:
            clip, start = self._place(rng)
            try:
                return self._load(clip, start), clip.key, problems
            except EchoError as error:
                problems.append(str(error))
        raise EchoError(f"ten crops one after the other could not be read; {problems[-1]}")

    def _place(self, rng: np.random.Generator) -> tuple[Clip, float]:
        """A clip, and where a crop of it begins."""
        place = rng.uniform(0, self._ends[-1])
        clip = self._clips[min(bisect.bisect(self._ends, place), len(self._clips) - 1)]
        length = self._samples / self._sample_rate
        return clip, rng.uniform(0, max(0.0, clip.seconds - length))

    def _load(self, clip: Clip, start: float) -> np.ndarray:
        begin = clip.start + start
        length = (self._samples + 1) / self._sample_rate
        end = begin + length if clip.stop is None else min(begin + length, clip.stop)
        audio = replace(clip, start=begin, stop=end).load(self._sample_rate)[: self._samples]
        return np.pad(audio, (0, self._samples - len(audio)))

    def _count(self, crops: list[tuple[np.ndarray, str, list[str]]]) -> None:
        self._crops += len(crops)
        for _, _, problems in crops:
            for problem in problems:
                self.broken[problem] = self.broken.get(problem, 0) + 1
        broken = sum(self.broken.values())
        if broken > max(1.0, self._max_broken * self._crops):
            raise EchoError(
                f"{broken} of {self._crops} crops could not be read; {next(iter(self.broken))}"
            )
