"""``python -m ununennium`` is the ``ununennium`` command."""

from ununennium.cli import main

if __name__ == "__main__":
    main()
