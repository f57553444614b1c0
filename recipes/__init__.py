"""The recipes of all families."""

from common.errors import require_environment

require_environment()
