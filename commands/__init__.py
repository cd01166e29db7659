"""The command line: the only layer that prints, exits or knows Typer. Installed as ``ulbq.commands``."""
