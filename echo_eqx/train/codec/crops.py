"""Random crops of recordings to train a codec on, the same on any number of hosts."""

import bisect
import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from echo_eqx.data.audio import SilentAudioError
from echo_eqx.data.loader import LoadedBatch
from echo_eqx.errors import EchoError
from echo_eqx.prepare.clips import Clip
from echo_eqx.train.codec.augment import change_length, draw_speed, vary

_PREFETCH = 8
"""Batches that are decoded in advance."""


class HostAudioBatch(NamedTuple):
    """This host's rows of an `AudioBatch` (`echo_eqx.train.codec.step`), as NumPy arrays."""

    audio: np.ndarray
    """(rows, samples) float32."""


class CropStream:
    """An endless iterator over batches from `step` on, each a function of seed, step and row.

    Crops are uniform over all audio, so longer recordings come up more often. Recordings shorter
    than a crop are padded with silence. A crop that cannot be decoded is replaced by another one.
    With `augment` each is varied, see `vary`.
    Cursors are empty: the step is enough to resume.

    **Raises**: `EchoError`, from `next`, if more than `max_broken` of the crops cannot be decoded.
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
        augment: bool = False,
    ):
        self._clips = clips
        self._ends = list(itertools.accumulate(clip.seconds for clip in clips))
        self._sample_rate, self._samples = sample_rate, samples
        self._rows, self._seed, self._max_broken = rows, seed, max_broken
        self._augment = augment
        self.broken: dict[str, int] = {}
        self._crops = 0
        self._step = step
        self._pool = ThreadPoolExecutor(4)
        self._prefetched: deque[list[Future]] = deque()
        for _ in range(_PREFETCH):
            self._submit()

    @property
    def examples(self) -> dict[str, str]:
        """For each counter, a sentence about its first case."""
        problem = next(iter(self.broken), None)
        return {} if problem is None else {"broken_records": f"skipped a crop: {problem}"}

    def __next__(self) -> LoadedBatch:
        crops = [future.result() for future in self._prefetched.popleft()]
        self._submit()
        self._count(crops)
        audio = np.stack([audio for audio, _, _ in crops])
        counts = {"broken_records": sum(self.broken.values())}
        return LoadedBatch(HostAudioBatch(audio), [key for _, key, _ in crops], {}, counts)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        step = self._step
        self._prefetched.append([self._pool.submit(self._crop, step, row) for row in self._rows])
        self._step += 1

    def _crop(self, step: int, row: int) -> tuple[np.ndarray, str, list[str]]:
        rng = np.random.default_rng((self._seed, step, row))
        problems: list[str] = []
        while len(problems) < 10:
            speed = draw_speed(rng) if self._augment else 1.0
            samples = round(self._samples * speed)
            clip, start = self._sample_crop(rng, samples)
            try:
                audio = self._load(clip, start, samples)
                if self._augment:
                    audio = vary(change_length(audio, self._samples), self._sample_rate, rng)
                return audio, clip.key, problems
            except EchoError as error:
                problems.append(str(error))
        raise EchoError(f"ten crops in a row could not be read; the last: {problems[-1]}")

    def _sample_crop(self, rng: np.random.Generator, samples: int) -> tuple[Clip, float]:
        """A clip, and the start of `samples` in it, in seconds."""
        place = rng.uniform(0, self._ends[-1])
        clip = self._clips[min(bisect.bisect(self._ends, place), len(self._clips) - 1)]
        length = samples / self._sample_rate
        return clip, rng.uniform(0, max(0.0, clip.seconds - length))

    def _load(self, clip: Clip, start: float, samples: int) -> np.ndarray:
        begin = clip.start + start
        length = (samples + 1) / self._sample_rate
        end = begin + length if clip.stop is None else min(begin + length, clip.stop)
        try:
            audio = replace(clip, start=begin, stop=end).load(self._sample_rate)[:samples]
        except SilentAudioError:  # a pause
            audio = np.zeros(0, np.float32)
        return np.pad(audio, (0, samples - len(audio)))

    def _count(self, crops: list[tuple[np.ndarray, str, list[str]]]) -> None:
        self._crops += len(crops)
        for _, _, problems in crops:
            for problem in problems:
                self.broken[problem] = self.broken.get(problem, 0) + 1
        broken = sum(self.broken.values())
        if broken > max(1.0, self._max_broken * self._crops):
            raise EchoError(
                f"expected at most {self._max_broken:.1%} unreadable crops (--max_broken), got "
                f"{broken} of {self._crops}; the first: {next(iter(self.broken))}"
            )
