"""What the subcommands share: exit statuses, an error, the settings that options select."""

import argparse
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from cpanbridge.supervisor import config_sources
from cpanbridge.supervisor.config import DEFAULT_FILE, Loaded, OperatorError, Settings

if TYPE_CHECKING:
    from cpanbridge.workers.modules.registry import Registry

FAILED, WRONG_USAGE, NOT_RUNNING, INTERRUPTED = 1, 2, 3, 128 + signal.SIGINT  # exit statuses


class CommandError(OperatorError):
    """The command failed: one line for each problem."""

    def __init__(self, *problems: str, exit_status: int = FAILED) -> None:
        super().__init__(*problems)
        self.exit_status = exit_status


def load(options: argparse.Namespace) -> Loaded:
    """The configuration with the flags of the command line. Raises ConfigError."""
    listen = [f"listen={options.socket}"] if options.socket else []
    loaded = config_sources.load(options.config, [*options.set, *listen], folder=options.folder)
    if not loaded.settings.modules and not loaded.settings.module_dirs:
        loaded.warnings.append(
            "nothing is exposed, clients can only call system and test: a configuration file with "
            f"[modules.NAME] or [[module_dirs]] says what ({DEFAULT_FILE}, or --config FILE)"
        )
    return loaded


def load_modules(settings: Settings, on_import: Callable[[str], None]) -> "Registry":
    """Import all that is exposed, as a worker would. Raises ModuleLoadError.

    `on_import` is called before each import, with the module as errors name it.
    """
    # Not at the top: few commands need it, and all would start later.
    from cpanbridge.supervisor.memory.layout import Shared
    from cpanbridge.workers.modules import builtin
    from cpanbridge.workers.modules.loader import Loader

    built_in = builtin.built_in(Shared.create(1, settings.limits), settings, list)
    loader = Loader(settings, builtin.NAMES)
    loader.on_import = on_import
    return loader.load(built_in)
