"""`python -m saetrain` is the command `saetrain`."""

from saetrain.cli import main

main()
