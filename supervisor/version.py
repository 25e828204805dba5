"""The version of the daemon, in one place: packaging, reports and `--version` read it here."""

__version__ = "0.6.0"
