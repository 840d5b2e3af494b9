"""`python -m zepad` is the command line."""

from .cli import main

main()
