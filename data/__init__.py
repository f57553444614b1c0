"""The corpora, `python -m data.NAME OUT`."""

from common.errors import require_environment

require_environment()
