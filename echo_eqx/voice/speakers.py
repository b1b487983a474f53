"""The speakers of Kokoro: its English voices, and mixtures of two or three of them.

A mixture is a convex combination of voices, and sounds like a person of its own. The speakers are
the same for every seed of a corpus. Some are held out: four voices, which are in no mixture, and
twenty mixtures. No two mixtures have the same set of voices.
"""

import random
from dataclasses import dataclass
from functools import cache

HELD_OUT_VOICES = ("af_sarah", "am_fenrir", "bf_isabella", "bm_george")
VOICES = (
    *("af_alloy", "af_aoede", "af_bella", "af_heart", "af_jessica", "af_kore", "af_nicole"),
    *("af_nova", "af_river", "af_sky", "am_adam", "am_echo", "am_eric", "am_liam", "am_michael"),
    *("am_onyx", "am_puck", "am_santa", "bf_alice", "bf_emma", "bf_lily", "bm_daniel"),
    *("bm_fable", "bm_lewis"),
)
"""American (a) and British (b) women (f) and men (m)."""
NUM_MIXTURES, NUM_HELD_OUT_MIXTURES = 216, 20
_CONCENTRATION = 2.0
"""Of the Dirichlet distribution of the weights. Above 1, mixtures close to one voice are rare."""
_SLOWEST, _FASTEST = 0.9, 1.15


@dataclass(frozen=True)
class Speaker:
    """A mixture of voices."""

    name: str
    weights: dict[str, float]
    """Share of each voice; they add up to 1."""
    speed: float
    """Pace, relative to the model's own."""
    held_out: bool

    @property
    def is_british(self) -> bool:
        """Whether British voices have the larger share."""
        return sum(share for name, share in self.weights.items() if name[0] == "b") > 0.5


@cache
def all_speakers() -> dict[str, Speaker]:
    """All speakers by name: 240 to train on, and 24 held out."""
    rng = random.Random(0)

    def speaker(name: str, weights: dict[str, float], held_out: bool) -> Speaker:
        return Speaker(name, weights, round(rng.uniform(_SLOWEST, _FASTEST), 3), held_out)

    speakers = [
        speaker(name, {name: 1.0}, name in HELD_OUT_VOICES) for name in (*VOICES, *HELD_OUT_VOICES)
    ]
    sets: dict[frozenset[str], list[str]] = {}
    while len(sets) < NUM_MIXTURES + NUM_HELD_OUT_MIXTURES:
        names = rng.sample(VOICES, rng.choice((2, 3)))
        sets.setdefault(frozenset(names), names)
    for number, names in enumerate(sets.values(), 1):
        held_out = number > NUM_MIXTURES
        speakers.append(speaker(f"mixture_{number:03d}", _weights(names, rng), held_out))
    return {one.name: one for one in speakers}


def _weights(names: list[str], rng: random.Random) -> dict[str, float]:
    draws = [rng.gammavariate(_CONCENTRATION, 1.0) for _ in names]
    shares = [round(draw / sum(draws), 3) for draw in draws[1:]]
    return dict(zip(names, (round(1 - sum(shares), 3), *shares), strict=True))
