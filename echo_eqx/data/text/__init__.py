"""Text for the models: cleaned as in training, expanded, measured, and split into chunks."""

from echo_eqx.data.text.clean import check_text, encode_text, normalize_text, says_something
from echo_eqx.data.text.split import halve_text, split_text
from echo_eqx.data.text.width import CHARACTERS_PER_SECOND, speaking_width

__all__ = [
    "CHARACTERS_PER_SECOND",
    "check_text",
    "encode_text",
    "halve_text",
    "normalize_text",
    "says_something",
    "speaking_width",
    "split_text",
]
