"""``python -m veneer`` is the command ``veneer``."""

from veneer.cli.__main__ import main

main()
