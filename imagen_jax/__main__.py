"""`python -m imagen_jax VERB`: dispatches to the verb's file in cli/."""

from imagen_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main.main())
