"""``python -m bitnet_ops`` is the command ``bitnet-ops``."""

from .cli.main import main

if __name__ == "__main__":
    main()
