"""What decoding raises when bytes are not what an encoder wrote."""

from __future__ import annotations

from vocabfold.errors import UserError


class DamagedStream(UserError):
    """Coded bytes that were cut, changed or made up."""
