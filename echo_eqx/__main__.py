"""`python -m echo_eqx infer ...` is `echo-eqx infer ...`."""

from echo_eqx.commands import main

if __name__ == "__main__":
    main()
