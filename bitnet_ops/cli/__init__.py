"""The command ``bitnet-ops``: `main` has the smaller subcommands, the others have a file each."""
