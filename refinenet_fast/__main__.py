"""``python -m refinenet_fast`` is the command ``refinenet-fast``."""

from refinenet_fast.command import main

if __name__ == "__main__":
    main()
