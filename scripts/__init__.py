"""The commands, `python -m scripts.NAME`."""

from common.errors import require_environment

require_environment()
