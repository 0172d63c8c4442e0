"""`python -m perpetune.cli run …`, and so `torchrun -m perpetune.cli run …`."""

from . import main

if __name__ == "__main__":  # processes of a comparison import this module again
    main()
