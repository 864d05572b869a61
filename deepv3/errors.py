"""What a user can meet: one exception class per kind of trouble, each with an exit code.

Exit codes (also written to ``run_dir/exit.json``): 0 done, 2 the user's input, 75 stopped on request
or by a fault and safe to restart, anything else is a bug of ours.
"""

EXIT_DONE = 0
EXIT_USER = 2
EXIT_RESTART = 75


class DeepV3Error(Exception):
    """Base of every error a user can meet. The message names both sides of what failed and the knob that mends it."""

    exit_code = EXIT_USER


class ConfigError(DeepV3Error):
    """A field is unknown, mistyped or impossible in combination with others."""


class DataError(DeepV3Error):
    """A source is missing, empty or unreadable, or a document is damaged."""


class ScheduleError(DeepV3Error):
    """A pipeline schedule cannot be built or fails its dry run."""


class NumericsError(DeepV3Error):
    """Loss or gradients left the finite numbers for longer than the run allows."""

    exit_code = EXIT_RESTART


class CheckpointError(DeepV3Error):
    """A checkpoint or export is incomplete, damaged, or belongs to another run."""


class ResourceError(DeepV3Error):
    """Memory or disk does not suffice; the message says what holds it and which knobs free it."""


class PeerLost(DeepV3Error):
    """Another rank died or hangs."""

    exit_code = EXIT_RESTART


class Stopped(DeepV3Error):
    """The run was asked to stop, saved its state and may be restarted."""

    exit_code = EXIT_RESTART
