"""``python -m veneer`` is the command ``veneer``."""

from veneer.cli.launch import main

main()
