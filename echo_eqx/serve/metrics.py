"""Counters of the server in the text form of Prometheus."""

import threading
from collections import Counter

import jax
import psutil

FIRST_BYTE_BUCKETS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)


class Metrics:
    """Counts of this process, safe to change from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first_bytes: Counter[float] = Counter()
        self._compilations_at_ready: int | None = None
        self._compilations = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            self._compilations += 1

    def set_ready(self) -> None:
        """Compilations count from here on; there should be none."""
        self._compilations_at_ready = self._compilations

    @property
    def compilations(self) -> int:
        """Programs compiled, or read from the cache, since the server said that it is ready."""
        ready = self._compilations_at_ready
        return 0 if ready is None else self._compilations - ready

    def add(self, name: str, amount: float = 1, labels: str = "") -> None:
        with self._lock:
            self._counts[name, labels] += amount  # type: ignore[assignment]

    def add_first_byte(self, seconds: float) -> None:
        with self._lock:
            for bucket in FIRST_BYTE_BUCKETS:
                self._first_bytes[bucket] += seconds <= bucket
            self._counts["first_byte_seconds_count", ""] += 1
            self._counts["first_byte_seconds_sum", ""] += seconds  # type: ignore[assignment]

    def text(self, gauges: dict[str, float]) -> str:
        """All of them, with the values of now in `gauges`."""
        with self._lock:
            counts, first_bytes = dict(self._counts), dict(self._first_bytes)
        lines = []
        for name, what in _COUNTERS.items():
            lines += [f"# HELP echo_{name} {what}", f"# TYPE echo_{name} counter"]
            found = {labels: n for (key, labels), n in counts.items() if key == name} or {"": 0}
            lines += [f"echo_{name}{labels} {n:g}" for labels, n in sorted(found.items())]
        name = "echo_first_byte_seconds"
        lines += [
            f"# HELP {name} Time from a request to its first audio.",
            f"# TYPE {name} histogram",
        ]
        total = counts.get(("first_byte_seconds_count", ""), 0)
        lines += [
            f'{name}_bucket{{le="{b:g}"}} {first_bytes.get(b, 0)}' for b in FIRST_BYTE_BUCKETS
        ]
        lines += [f'{name}_bucket{{le="+Inf"}} {total}', f"{name}_count {total}"]
        lines += [f"{name}_sum {counts.get(('first_byte_seconds_sum', ''), 0):g}"]
        memory = psutil.Process().memory_info().rss
        now = gauges | {"compilations_since_ready": self.compilations, "memory_bytes": memory}
        for name, value in now.items():
            lines += [f"# TYPE echo_{name} gauge", f"echo_{name} {value:.15g}"]
        return "\n".join(lines) + "\n"


_COUNTERS = {
    "requests_total": "Answered requests by path and status.",
    "audio_seconds_total": "Seconds of speech made.",
    "input_bytes_total": "Bytes of text spoken.",
    "cancelled_total": "Requests whose client went away.",
    "failed_total": "Requests that failed after their answer had begun.",
}
