"""`echo-eqx eval_codec`."""

from echo_eqx.commands import run_command

if __name__ == "__main__":
    run_command("eval_codec")
