"""What an export is made of: the models that were loaded, and checks that a format can hold them."""

from dataclasses import dataclass

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.errors import UsageError
from echo_eqx.model.dit import EchoDiT


@dataclass(frozen=True)
class Models:
    """The models to export. A format writes all that it can hold."""

    dit: EchoDiT | None = None
    codec: DACVAE | None = None

    def need_dit(self, form: str) -> EchoDiT:
        if self.dit is None:
            raise UsageError(f"{form}: expected an EchoDiT, got a codec")
        return self.dit

    def need_codec(self, form: str) -> DACVAE:
        if self.codec is None:
            raise UsageError(f"{form}: expected a codec, got an EchoDiT")
        return self.codec
