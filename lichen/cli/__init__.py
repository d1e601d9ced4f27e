"""The command line: one thin layer of typer and rich over the library and the daemon."""
